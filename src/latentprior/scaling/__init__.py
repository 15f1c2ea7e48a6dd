"""Scaling: a grid of runs (`grid`) and the law that their losses follow (`law`)."""

from latentprior.scaling.law import Correlation, PowerLaw, correlation, envelope, fit_power_law

__all__ = ["Correlation", "PowerLaw", "correlation", "envelope", "fit_power_law"]
