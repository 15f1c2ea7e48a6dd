"""The first page: what this is, the search, the lists by block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from latentprior.report.markup import printable, text
from latentprior.report.site.listing import Listing
from latentprior.report.site.shell import link, list_path, page, source_words

HINT = (
    "All words must occur in a unit’s description, promoted tokens, top tokens or tasks; "
    "<kbd>&quot;in quotes&quot;</kbd> they stay together, blanks too. <kbd>b1 n532</kbd> finds a unit. "
    "<kbd>/</kbd> starts a search."
)


def render_index(listing: Listing) -> str:
    """The page of all units."""
    info = listing.info
    title = f"Meta-neurons of {info.get('prior') or 'a prior'}"
    body = "\n".join(
        [
            f'<header>\n<p class="kicker">latentprior neurons</p>\n<h1>{text(title)}</h1>',
            f'<p class="lede">{_paragraph(info, len(listing))}</p>\n</header>\n<main>',
            "<noscript><p>Searching needs JavaScript; the lists by block below do not.</p></noscript>",
            _form(listing),
            '<p id="count" role="status"></p>',
            _table(listing),
            '<p><button type="button" id="more" hidden></button></p>',
            f'<section>\n<h2>Lists by block</h2>\n<ul class="blocks">{_blocks(listing)}</ul>\n</section>',
            "</main>\n<footer>Drawn by latentprior from a neuron store.</footer>",
        ]
    )
    return page(title, body, root="", scripts=("units.js", "site.js"))


def _paragraph(info: Mapping[str, Any], units: int) -> str:
    name = (info.get("corpus") or {}).get("dataset")
    return (
        f"{units:,} hidden units of a generative prior of <bdi>{text(source_words(info))}</bdi>, "
        f"{info['blocks']} blocks of {info['d_mlp']:,}. Each was read at noise level t = {info.get('t')} over "
        f"{info.get('tokens', 0):,} tokens of {info.get('documents', 0):,} documents"
        f"{f' of <bdi>{text(name)}</bdi>' if name else ''}. "
        "A unit’s page shows the documents that move it most, how it fires, the tokens that it promotes through the "
        "language model’s head, and the units nearest to it."
    )


def _form(listing: Listing) -> str:
    blocks = "".join(f'<option value="{block}">Block {block}</option>' for block in listing.blocks())
    won = Counter(task for tasks in listing.columns["won"] for task in tasks)
    tasks = "".join(
        f'<option value="{text(printable(task))}">{text(printable(task))} ({won[place]:,})</option>'
        for task, place in sorted(listing.tasks.items())
    )
    statistics = listing.statistics().items()
    orders = "".join(f'<option value="{key}">{text(words)}</option>' for key, (_, words) in statistics)
    fields = [
        '<div class="wide"><label for="q">Search</label><input type="search" id="q" aria-describedby="hint" '
        'autocomplete="off" autocapitalize="off" spellcheck="false"></div>',
        _menu("block", "Block", f'<option value="">all</option>{blocks}'),
        _menu("task", "Task won", f'<option value="">any or none</option>{tasks}') if tasks else "",
        _menu("sort", "Sort by", f'{orders}<option value="unit">block and unit</option>'),
    ]
    return f'<form role="search" id="search" hidden>\n{"".join(fields)}\n<p class="note" id="hint">{HINT}</p>\n</form>'


def _menu(name: str, label: str, options: str) -> str:
    return f'<div><label for="{name}">{label}</label><select id="{name}">{options}</select></div>'


def _table(listing: Listing) -> str:
    headings = [("unit", "Unit", ""), *((key, name, " stat") for key, (name, _) in listing.statistics().items())]
    cells = [
        f'<th scope="col" class="sortable{kind}" data-key="{key}"><button type="button">{text(name)}</button></th>'
        for key, name, kind in headings
    ]
    cells.insert(1, '<th scope="col" class="what">Description</th>')
    return (
        '<table class="units" id="results" hidden><caption class="vh">Units that match</caption>'
        f"<thead><tr>{''.join(cells)}</tr></thead><tbody></tbody></table>"
    )


def _blocks(listing: Listing) -> str:
    return "".join(
        f"<li>{link('', list_path(block), f'Block {block}')} ({len(units):,})</li>"
        for block, units in listing.blocks().items()
    )
