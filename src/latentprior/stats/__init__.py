"""Statistics of plain arrays: intervals, distances, AUC, logistic regression, Gaussians."""
