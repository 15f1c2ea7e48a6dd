"""Does the package work with this language model on this machine?"""

from latentprior.doctor.run import Check, doctor, examine

__all__ = ["Check", "doctor", "examine"]
