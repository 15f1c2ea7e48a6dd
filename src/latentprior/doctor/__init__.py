"""Does the package work with this language model, this prior and this machine?

`run` goes through the checks of `checks`. They look at a `Subject`: a language model, perhaps a prior, and what the
model writes with and without edits. A configuration or a loaded model enters; a list of `Check`, one line each, leaves.
"""

from latentprior.doctor.run import Check, doctor, examine

__all__ = ["Check", "doctor", "examine"]
