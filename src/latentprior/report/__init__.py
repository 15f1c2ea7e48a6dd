"""Results JSON -> one self-contained HTML page: figures inline, no script, nothing loaded."""

from latentprior.report.page import render, write_report

__all__ = ["render", "write_report"]
