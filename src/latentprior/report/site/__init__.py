"""A neuron store -> a static site that is searched from disk: no server, no network."""

from latentprior.report.site.write import write_site

__all__ = ["write_site"]
