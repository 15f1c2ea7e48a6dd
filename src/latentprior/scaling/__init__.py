"""Scaling: what training costs, and how the loss falls with compute.

`cost`: language models and stores in FLOPs and bytes. `plan`: what one training run needs, before it. `sweep`: a grid
of runs, trained and measured. `law`: the power law, its envelope and correlations, from [N] computes and losses.
`tables`: a sweep as text. Configurations enter; JSON-ready results leave.
"""

from latentprior.scaling.law import Correlation, PowerLaw, correlation, envelope, fit_power_law

__all__ = ["Correlation", "PowerLaw", "correlation", "envelope", "fit_power_law"]
