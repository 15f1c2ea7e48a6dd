"""How good a prior is: distances of its samples from real activations, and what its projections cost in LM loss.

`evaluate` runs all of it from a configuration, with Gaussians and sparse autoencoders as baselines, and gives what is
in ``evaluate.json``; `api` does so for a prior and a store in memory; `lm_loss` measures the delta LM loss of any
replacement. Distances and intervals are in `stats`, autoencoders in `sae`.
"""
