"""Training a prior: activation sources, noise, optimizers, the loop, checkpoints."""
