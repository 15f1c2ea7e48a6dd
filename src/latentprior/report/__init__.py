"""Results as pages: figures inline, nothing loaded, no script but the site's own search.

`page` chooses the sections of a result (JSON): `evaluation`, `steering`, `scaling` and `probing` say what they hold.
`blocks` are their tables, captions and folds, `figures`, `frontiers` and `probe_figures` their drawings. All HTML is in
`templates`. `site` is that of a neuron store. A result or a store enters; files leave.
"""

from latentprior.report.page import render, write_report

__all__ = ["render", "write_report"]
