"""The command line: `parser` takes it apart, `commands` runs it, `help` says what there is, `console` shows results.

`main` is given the words of a command line and returns the exit status; every option is a field of `config`.
"""

from latentprior.cli.commands import main

__all__ = ["main"]
