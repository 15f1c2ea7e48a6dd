"""The page of a steering experiment: every figure, an honest negative said, and whatever is missing left out."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from test_report import EVIL, check_page, headings, headlines_of

from latentprior.report import render
from latentprior.report.steering import headlines, helps_from, leading_method, leading_prior, sentences
from latentprior.steer.frontier import summarise
from latentprior.utils.errors import InputError

PRIORS = {"early": 1.4, "middle": 1.3, "late": 1.1}
DRAWN = (
    "Concept gained, fluency lost",
    "Edit kept",
    "Off-manifold score",
    "Area difference by held-out loss",
)
GAINS = {"plain": 0.1, "repaired": 0.05, "paired": 0.16, "random": 0.0}  # at a strength of 1, for one nat


def rows(
    direction: str = "sentiment", gains: dict[str, float] = GAINS, prompts: int = 8, priors: Iterable[str] = PRIORS
) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    figures = {"distinct_2": 0.9, "longest_repeat": 2, "tokens": 20, "off_before": 2.0, "moved": 0.1}
    found = []
    for p in range(prompts):
        common = {"direction": direction, "prompt": p, "prompt_text": f"Prompt {p} & so", **figures}
        found.append(common | {"method": "none", "prior": None, "strength": 0.0, "concept": 0.5, "nll": 1.2,
                               "text": " unsteered", "retention": None, "off_after": None})  # fmt: skip
        for method, gain in gains.items():
            for prior in (None,) if method in ("plain", "random") else priors:
                for r in (-1.0, -0.5, 0.5, 1.0):
                    share = r * gain * (1 if prior in (None, "late") else 0.5) + 0.01 * rng.standard_normal()
                    measured = {"concept": 0.5 + share, "nll": 1.2 + abs(r), "retention": 0.8, "off_after": 1.5}
                    found.append(common | {"method": method, "prior": prior, "strength": r,
                                           "text": f" {method} {prior or 'alone'} {r:g}", **measured})  # fmt: skip
    return found


def result_of(found: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    summary = summarise(pa.Table.from_pylist(found), resamples=100)
    hookpoint = {"model": "smollm2-135m", "layer": 15, "width": 576, "side": "output"}
    texts = [row for row in found if row["prompt"] < 2]
    priors = {name: {"heldout_loss": loss} for name, loss in PRIORS.items()}
    return {"kind": "frontier", "hookpoint": hookpoint, "summary": summary, "texts": texts, "priors": priors, **more}


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    judge = {"name": "a classifier", "heldout_accuracy": 0.843}
    lost = rows("dates", {"plain": 0.1, "paired": 0.02})
    return result_of(rows() + lost, seed=0, wall_seconds=61, config={"r": [1]}, judges={"sentiment": judge})


@pytest.fixture(scope="module")
def page(whole: dict[str, Any]) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return render(json.loads(json.dumps(whole, allow_nan=False)))


def test_a_result_has_its_figures_tables_and_texts(whole, page):
    parsed = check_page(page)
    assert headings(page) == ["Steering", "Texts", "Provenance"]
    assert re.findall("<h3>(.*?)</h3>", page) == ["sentiment", "dates"] * 2
    assert parsed.drawings == [f"{name} along {direction}" for direction in ("sentiment", "dates") for name in DRAWN]
    assert {"Areas under the frontiers", "All strengths"} <= parsed.tables.keys()
    assert parsed.inside["h1"] == "Steering of smollm2-135m, layer 15"
    for shown in (
        "a classifier, whose held-out accuracy is 0.843",
        "unsteered",
        "Area",
        "Clear of zero",
        "−0.5",
        "1 of 2",
    ):
        assert shown in parsed.text
    assert list(headlines_of(page)) == ["Frontier outside", "Gain over plain"]  # the latter for both directions


def test_an_honest_negative_is_said_as_one(whole):
    assert leading_method(whole) == "paired"
    _, sentiment, dates = sentences(whole)
    assert sentiment.startswith("Along sentiment, the gain of paired over plain") and "lies outside" in sentiment
    assert dates.startswith("Along dates") and "lies inside" in dates and "−0.0" in dates
    assert [headline.value[0] for headline in headlines(whole)] == ["1", "0", "−"]
    level = result_of(rows(gains={"plain": 0.1, "paired": 0.1}))
    assert "the interval does not leave out zero" in " ".join(sentences(level))


def test_controls_and_the_baseline_never_lead():
    assert leading_method(result_of(rows(gains={"plain": 0.1, "random": 0.3}))) is None
    assert leading_method(result_of(rows(gains={"plain": 0.1, "random": 0.3, "repaired": 0.0}))) == "repaired"


def test_the_prior_of_least_loss_is_drawn_and_all_are_compared(whole, page):
    assert leading_prior(whole) == "late"
    assert leading_prior(whole | {"priors": {"early": {"heldout_loss": 0.3}, "late": {"heldout_loss": 0.9}}}) == "early"
    unknown = {name: {"heldout_loss": None} for name in PRIORS}  # a converted prior does not say
    assert leading_prior(whole | {"priors": unknown}) == leading_prior(whole | {"priors": {}}) == "late"
    assert leading_prior({}) is None
    assert "paired late 0.5" in page and "paired early 0.5" not in page
    assert "Clear above plain: paired from 1.10 down. With none of these priors: repaired." in page
    assert "Areas with every prior" in page
    assert render(whole | {"priors": unknown}) == render(whole | {"priors": {}})
    without = render(whole | {"priors": {}})
    assert "Which prior is good enough" not in without
    assert not [label for label in check_page(without).drawings if label.startswith(DRAWN[-1])]


def test_two_priors_are_told_apart():
    result = result_of(rows(priors=("early", "late")))
    page = render(result)
    header, *cells = check_page(page).tables["Areas under the frontiers"]
    assert header[:3] == ["Method", "Prior", "Held-out loss"] and "Areas with every prior" not in page
    methods = [("plain", "–"), ("repaired", "early"), ("repaired", "late"), ("paired", "early"), ("paired", "late")]
    assert [(row[0], row[1]) for row in cells] == [*methods, ("random", "–")]
    _, early, late = sentences(result)
    assert early.startswith("Along sentiment, the gain of paired by early over plain")
    assert late.startswith("Along sentiment, the gain of paired by late over plain")
    assert [headline.note.split(";")[0] for headline in headlines(result)] == ["sentiment, paired by late"]


def difference(value: float, clear: bool) -> dict[str, Any]:
    return {"value": value, "clear": clear}


@pytest.mark.parametrize(
    ("entries", "loss"),
    [
        ([(1.0, difference(0.1, True)), (1.4, difference(-0.1, True))], 1.0),
        ([(1.4, difference(0.1, True)), (1.0, difference(0.2, True))], 1.4),
        ([(1.0, difference(0.1, False)), (1.2, difference(0.2, True))], None),  # a better prior undoes it
        ([(1.0, difference(-0.1, True))], None),
        ([], None),
    ],
)
def test_where_a_prior_begins_to_help(entries, loss):
    assert helps_from(entries) == loss


def test_texts_stand_side_by_side_for_each_strength(page):
    folds = re.findall(r"<details( open)?><summary>Strength (.*?)</summary>(.*?)</details>", page, flags=re.DOTALL)
    assert [(opened != "", strength) for opened, strength, _ in folds] == [
        (False, "+0.5"), (True, "+1"), (False, "−0.5"), (False, "−1"),
        (False, "+0.5"), (False, "+1"), (False, "−0.5"), (False, "−1"),
    ]  # fmt: skip
    for _, _, content in folds[:4]:
        assert re.findall("<dt>(.*?)</dt>", content) == ["unsteered", *GAINS] * 2
        assert content.count("Prompt 1 &amp; so") == 1
    assert ">paired late -1<" in folds[3][2] and "concept " in folds[3][2]


def test_many_methods_are_drawn_in_two_figures():
    gains = GAINS | {"readded": 0.08, "guided": 0.12, "paired-mean": 0.2, "paired-sequence": 0.15}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = render(result_of(rows(gains=gains)))
    assert check_page(page).drawings[:2] == [
        "Concept gained, fluency lost along sentiment",
        "The same, other ways to repair along sentiment",
    ]
    first, second = re.findall(r'<svg role="img" aria-label="(?:Concept gained|The same).*?</svg>', page, re.DOTALL)
    for method in gains:
        assert (f">{method}<" in first) == (method in (*GAINS, "paired-mean")), method
        assert (f">{method}<" in second) == (method not in ("repaired", "paired", "random")), method


@pytest.mark.parametrize("missing", [("texts",), ("priors",), ("hookpoint",), ("texts", "priors", "hookpoint")])
def test_what_is_not_there_is_left_out(whole, missing):
    page = render({key: value for key, value in whole.items() if key not in missing})
    check_page(page)
    assert ("Texts" in headings(page)) == ("texts" not in missing)


def test_the_smallest_result_is_a_page():
    found = [r for r in rows(prompts=2, gains={"plain": 0.1}) if r["strength"] in (0, 1)]
    found = [{k: v for k, v in r.items() if k not in ("prior", "off_after", "retention", "moved")} for r in found]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = render({"kind": "frontier", "summary": summarise(pa.Table.from_pylist(found), resamples=10)})
    assert check_page(page).drawings == ["Concept gained, fluency lost along sentiment"]
    assert headings(page) == ["Steering"]
    assert "was measured along 1 direction on 2 prompts" in page


def test_figures_that_could_not_be_had_show_as_dashes(whole):
    result = copy.deepcopy(whole)
    entry = result["summary"]["directions"][0]["methods"][3]
    entry["nll_at_matched_concept"][0] |= {"value": None, "interval": [None, 0.2], "clear": False}
    entry["area_difference"] |= {"interval": None}
    entry["points"][0] |= {"gain": None, "gain_interval": None, "nll": None, "nll_interval": None, "retention": None}
    text = check_page(render(result)).text
    assert "[–, 0.200]" in text and "None" not in text


@pytest.mark.filterwarnings("ignore:constrained_layout")  # names as long as a sentence leave an axis no room
def test_names_and_texts_are_shown_and_never_executed(page):
    found = [r | {"direction": EVIL, "text": EVIL, "prompt_text": EVIL} for r in rows()]
    for row in found:
        row["method"] = row["method"] + EVIL if row["method"] in ("repaired", "random") else row["method"]
        row["prior"] = row["prior"] and row["prior"] + EVIL
        row |= {key: value.replace("\ud800", "") for key, value in row.items() if isinstance(value, str)}
    result = result_of(found, judges={EVIL.replace("\ud800", ""): {"name": EVIL}})
    result["priors"] = {(name + EVIL).replace("\ud800", ""): {"heldout_loss": loss} for name, loss in PRIORS.items()}
    elements = check_page(page).tags.keys()
    evil = render(result)
    assert check_page(evil).tags.keys() <= elements
    evil.encode("utf-8")


def test_same_result_same_bytes(whole, page):
    assert render(whole) == page


def test_a_summary_without_a_figure_is_refused_by_name(whole):
    broken = copy.deepcopy(whole)
    del broken["summary"]["directions"][0]["methods"][1]["area"]
    with pytest.raises(InputError, match="'area'"):
        render(broken)
