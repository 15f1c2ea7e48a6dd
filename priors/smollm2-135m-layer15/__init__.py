"""Weights for `latentprior`, which finds them without importing this."""
