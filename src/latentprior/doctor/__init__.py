"""Does the package work with this language model, this prior and this machine?

`run` goes through `checks`, which look at a `Subject`: a language model, perhaps a prior, and what it writes with
and without edits. A configuration or a model enters; a list of `Check`, one line each, leaves.
"""

from latentprior.doctor.run import Check, doctor, examine

__all__ = ["Check", "doctor", "examine"]
