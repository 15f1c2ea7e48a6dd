"""The command line: `commands` says what there is to call, `usage` what was wrong with a call, `console` shows it."""

from latentprior.cli.commands import main

__all__ = ["main"]
