"""Statistics of features and of sets of activations; tensors or arrays enter, numbers leave.

`auc`: ranks, 1-D probes, AUC with its variance. `logistic`: fitted probes (scikit-learn), 1-D, sparse and dense.
`scaler`: standardised features. `bootstrap`: intervals. `frechet`, `distances`: Fréchet, sliced Wasserstein and
classifier two-sample distances. `gaussian`: a Gaussian as a prior. Nothing here knows where activations come from.
"""
