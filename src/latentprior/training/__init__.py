"""Training a prior: activations enter, a folder with the prior, its checkpoints and its log is left.

`fit` is the entry: it locks the folder and makes a `Trainer` (`trainer`), whose loop draws batches (`sources`), makes
optimizer steps (`loop`: noise from `noise` and `times`, loss from `loss`, updates from `optim`), and logs (`logger`,
`tracking`), evaluates and saves (`checkpoint`) in between. `parallel` says how a denoiser lies on several devices.
"""
