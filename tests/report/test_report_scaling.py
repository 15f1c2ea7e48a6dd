"""The page of a sweep: whatever the runs allow is drawn, and what they do not allow is said."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
from test_report import check_page, headings, headlines_of

from html_page import Page
from latentprior.report import render
from latentprior.report.scaling import leading_law
from latentprior.scaling.sweep import findings
from latentprior.scaling.tables import tables
from latentprior.utils.errors import InputError
from latentprior.utils.formatting import power

LOSS = "Held-out loss over training compute, by size"
FRECHET = "Fréchet distance over held-out loss, by size"


def run(i: int, width: int, *, delta: bool = True, worse: float = 0.0) -> dict[str, Any]:
    flops = width * 1e9 * 2.0**i
    loss = 0.9 + 30 * flops**-0.15 + worse + 1e-3 * ((7 * i + width) % 5)
    row = {"name": f"d{width}-{i}", "d_model": width, "d_mlp": 2 * width, "blocks": 3, "seed": 0}
    row |= {"parameters": 1000 * width, "activations": 65536 * 2**i, "distinct": 50_000, "flops": flops}
    row |= {
        "flops_6nd": 1.5 * flops,
        "heldout_loss": loss,
        "seconds": 12.5,
        "frechet": loss**2,
        "frechet_raw": 9 * loss,
    }
    return row | ({"delta_lm": loss / 10, "delta_lm_interval": [loss / 11, loss / 9]} if delta else {})


def result_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    hookpoint = {"model": "smollm2-135m", "layer": 15, "width": 576, "side": "output"}
    return {
        "kind": "sweep",
        "hookpoint": hookpoint,
        "bound": {"frechet": 0.4, "frechet_raw": 2.0},
        **findings(sorted(rows, key=lambda row: row["flops"])),
    }


@pytest.fixture(scope="module")
def sweep() -> dict[str, Any]:
    return result_of([run(i, width, worse=0.02 * (width == 320)) for i in range(4) for width in (128, 320, 1024)])


def test_a_sweep_has_its_figures_tables_and_sentences(sweep):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = render(sweep | {"seed": 0, "wall_seconds": 61, "config": {"widths": [128]}})
    parsed = check_page(page)
    assert headings(page) == ["Scaling", "Provenance"]
    assert parsed.drawings == [LOSS, FRECHET, "delta LM loss over held-out loss, by size"]
    assert parsed.inside["h1"] == "Scaling of latent priors of smollm2-135m, layer 15"
    assert list(headlines_of(page)) == [
        "Exponent α",
        "Irreducible loss E",
        "Best held-out loss",
        "Loss and delta LM loss",
    ]
    for shown in ("d 128 × 3", "d 1024 × 3", "compute-optimal", "law", "All runs", "6 N D", "Exponent α", "10¹²"):
        assert shown in parsed.text
    optimal = [row[-1] == "yes" for row in parsed.tables["All runs"][1:]]
    assert optimal == [row["optimal"] for row in sweep["runs"]]
    assert "12 priors of 0.128 to 1.02 million parameters" in parsed.text


def test_the_leading_law_is_that_of_the_envelope_where_there_is_one(sweep):
    law = leading_law(sweep)
    assert law and (law["runs"], law["compute"]) == ("envelope", "executed")
    without = copy.deepcopy(sweep)
    without["laws"][0] = {"runs": "envelope", "compute": "executed", "failed": "too few of them"}
    law = leading_law(without)
    assert law and law["runs"] == "all"
    shown = check_page(render(without)).text
    assert "No law through compute-optimal runs: too few of them." in shown
    assert "The held-out loss of all 12 runs follows L(C)" in shown


@pytest.mark.parametrize("count", [1, 3])
def test_few_runs_are_drawn_without_a_law(count):
    result = result_of([run(i, 128, delta=False) for i in range(count)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = check_page(render(result))
    assert page.drawings == [LOSS, FRECHET] and "No law could be fitted" in page.text and "at least 4" in page.text
    missing = {title: rows for title, _, rows in tables(result)}["Could not be computed"]
    assert len(missing) == 6 and all("at least 4" in why for _, why in missing)


def test_an_E_that_is_not_known_is_said(sweep):
    loose = copy.deepcopy(sweep)
    for law in loose["laws"]:
        law |= {"E_pinned": False}
    assert "E is not determined" in check_page(render(loose)).text
    for law in loose["laws"]:
        law |= {"E_pinned": True}
    assert "not determine" not in check_page(render(loose)).text


def test_many_sizes_are_told_apart():
    result = result_of([run(i, width) for i in range(2) for width in range(100, 1000, 100)])
    page = check_page(render(result))
    assert {f"d {width} × 3" for width in range(100, 1000, 100)} <= {row[0] for row in page.tables["All runs"]}
    assert page.inside["svg"].count("d 900 × 3") == 3  # in the legend of each drawing


def test_a_sweep_without_a_column_is_refused_by_name(sweep):
    broken = copy.deepcopy(sweep)
    del broken["runs"][0]["flops_6nd"]
    with pytest.raises(InputError, match="flops_6nd"):
        render(broken)


def test_seeds_are_shown_where_there_are_several(sweep):
    assert "Seed" not in Page(render(sweep)).tables["All runs"][0]
    again = [run(i, 128) | {"seed": seed} for i in range(4) for seed in (0, 1)]
    assert "Seed" in Page(render(result_of(again))).tables["All runs"][0]


def test_a_grid_that_ends_too_early_is_said():
    edge = [run(3, 128), run(3, 1024)]
    assert "2 of the 2 compute-optimal runs have the largest budget" in check_page(render(result_of(edge))).text


def test_powers_of_ten():
    assert [power(v) for v in (1e12, 2e12, 1e-3)] == ["10¹²", "2 × 10¹²", "10⁻³"]


def test_tables_show_every_run_law_and_correlation(sweep):
    shown = {title: (header, rows) for title, header, rows in tables(sweep)}
    sizes = {title: len(rows) for title, (_, rows) in shown.items()}
    assert list(sizes.values()) == [12, 4, 3] and all(len(row) == len(h) for h, rows in shown.values() for row in rows)
