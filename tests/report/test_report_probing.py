"""The page of a probing result: every figure and table, negatives said, and whatever is missing left out."""

from __future__ import annotations

import copy
import itertools
import json
import re
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
from test_report import EVIL, check_page, headings, headlines_of

from html_page import Page
from latentprior.probe.names import short_names
from latentprior.probe.tables import difference, leading, tables, verdict
from latentprior.report import render
from latentprior.report.probing import headlines, section, sentences
from latentprior.utils.errors import InputError

# name, label, kind, units, mean AUC of the screened units
SOURCES = [
    ("layer", "Layer output", "raw", 576, 0.701),
    ("rotation", "Layer output, randomly rotated", "control", 576, 0.684),
    ("mlp-neurons", "MLP neurons of blocks 0 to 15", "mlp", 24_576, 0.702),
    ("sae", "SAE latents", "sae", 4608, 0.697),
    ("random-denoiser", "Denoiser of random weights", "control", 3456, 0.690),
    ("meta-neurons", "Meta-neurons", "prior", 3456, 0.711),
    ("meta-neurons: early", "Meta-neurons: runs/early/prior", "prior", 3456, 0.694),
]
FAMILIES = {
    "sentiment": 7,
    "topic": 20,
    "language and script": 15,
    "code": 11,
    "facts": 34,
    "questions": 9,
    "other": 17,
}
LEAD = ("meta-neurons", "meta-neurons: early")
SOURCES_DRAWN = "Mean test AUC of every source with its interval"
DRAWN = {
    "sparse": "Mean test AUC over the number of units in a probe",
    "grid": "Mean test AUC by block of the prior and noise level",
    "mlp_blocks": "Mean test AUC of MLP neurons by block of the language model",
    "scaling": "Mean test AUC over held-out loss of the priors",
}


def ends(value: float, half: float = 0.019) -> list[float]:
    return [value - half, value + half]


def probe_result(rows: bool = True) -> dict[str, Any]:
    """What ``probe.json`` holds after all 113 tasks, the figures like those of a real run."""
    rng = np.random.default_rng(0)
    tasks = [
        {"name": f"{i}_{family.replace(' ', '_')}_{i}", "family": family, "train": 1024, "test": 500, "left_out": i % 3}
        for i, family in enumerate(itertools.chain(*([family] * n for family, n in FAMILIES.items())))
    ]
    means = {name: auc for name, *_, auc in SOURCES}
    base = rng.normal(0, 0.09, len(tasks))
    single = {name: np.clip(auc + base + rng.normal(0, 0.03, len(tasks)), 0.5, 1) for name, auc in means.items()}
    scores = []
    for name, auc in means.items():
        for selection, value, gap in (("screened", auc, 0.031), ("all", auc + 0.006, 0.047), ("chance", 0.502, 0.06)):
            scores.append({"source": name, "selection": selection, "auc": value, "interval": ends(value),
                           "validation": value + gap})  # fmt: skip
    paired = [
        {"a": a, "b": b, "selection": selection, "difference": means[a] - means[b],
         "interval": ends(means[a] - means[b], 0.0105), "wins": 64, "ties": 2, "tasks": 113}
        for a in LEAD for b in means for selection in ("screened", "all") if b not in (a, "meta-neurons")
    ]  # fmt: skip
    by_family = [
        {"family": family, "tasks": n,
         "scores": {name: float(np.mean([s for s, t in zip(single[name], tasks, strict=True) if t["family"] == family]))
                    for name in means}}
        for family, n in FAMILIES.items()
    ]  # fmt: skip
    times = [0.05, 0.1, 0.3, 0.5, 0.7, 0.9]
    grid = [[0.70 - 0.012 * block - 0.1 * max(0, t - 0.3) for t in times] for block in range(3)]
    budgets = [(65_536, 1.71, 0.681), (262_144, 1.42, 0.688), (524_288, 1.31, 0.694), (1_048_576, 1.22, 0.702),
               (1_572_864, 1.19, 0.711), (3_145_728, 1.165, 0.709)]  # fmt: skip
    sparse = [
        {"source": name, "k": k, "auc": auc + gain, "interval": ends(auc + gain)}
        for name, auc in means.items()
        for k, gain in ((1, 0.0), (2, 0.03), (5, 0.075), (16, 0.12), (None, 0.17))
    ]
    result = {
        "kind": "probe",
        "method": "rank",
        "hookpoint": {"model": "smollm2-135m", "layer": 15, "width": 576, "side": "output"},
        "protocol": {"candidates": 512, "folds": 5, "seed": 42, "max_length": 256, "max_test": 500},
        "tasks": tasks,
        "skipped": [
            {"task": "201_tiny", "reason": "99 rows: a task needs at least 120"},
            {"task": "202_one", "reason": "only one class: every target is 'yes', and a probe must tell two apart"},
        ],
        "sources": [
            {"name": name, "label": label, "kind": kind, "units": units,
             "prior": "runs/prior" if kind == "prior" else None,
             "heldout_loss": 1.19 if kind == "prior" else None, "activations": None}
            for name, label, kind, units, _ in SOURCES
        ],
        "summary": {
            "scores": scores,
            "paired": paired,
            "families": by_family,
            "grid": {"prior": "runs/prior", "blocks": [0, 1, 2], "times": times, "auc": grid},
            "mlp_blocks": [{"block": i, "auc": 0.62 + 0.08 * i / 15 - 0.002 * (i % 2)} for i in range(16)],
            "scaling": [
                {"source": "meta-neurons", "prior": f"runs/steps/{n}/prior", "heldout_loss": loss, "activations": n,
                 "auc": auc, "interval": ends(auc)}
                for n, loss, auc in budgets
            ],
            "sparse": sparse,
        },
        "seconds": {"features": 12.0, "probes": 80.4},
        "config": {"candidates": 512},
        "seed": 42,
        "versions": {"torch": "2.10"},
        "git": "abc",
        "wall_seconds": 401.5,
    }  # fmt: skip
    if rows:
        result["rows"] = [
            {"task": task["name"], "family": task["family"], "scores": {n: float(s[i]) for n, s in single.items()}}
            for i, task in enumerate(tasks)
        ]
    return json.loads(json.dumps(result, allow_nan=False))


@pytest.fixture
def result() -> dict[str, Any]:
    return probe_result()


@pytest.fixture(scope="module")
def page() -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return render(probe_result())


def row_of(result: dict[str, Any], other: str, selection: str = "screened") -> dict[str, Any]:
    return next(
        row
        for row in result["summary"]["paired"]
        if (row["a"], row["b"], row["selection"]) == ("meta-neurons", other, selection)
    )


def told(result: dict[str, Any]) -> str:
    return " ".join(sentences(result))


def test_a_result_has_its_figures_tables_and_sentences(page):
    parsed = check_page(page)
    assert headings(page) == ["Probing", "Provenance"]
    assert parsed.drawings == [SOURCES_DRAWN, *DRAWN.values()]
    assert list(parsed.tables) == [
        "All sources",
        "Paired differences, meta-neurons minus the others",
        "Paired differences, meta-neurons: runs/early/prior minus the others",
        "Probes of several units, test AUC",
        "Meta-neurons by block and noise level, test AUC",
        "MLP neurons by block of the language model",
        "Priors",
        "Test AUC by task family",
        "Test AUC by task",
        "2 skipped tasks",
        "Versions, seed and times",
    ]
    assert parsed.inside["h1"] == "1-D probing of smollm2-135m, layer 15"
    assert headlines_of(page)["Mean test AUC"] == "0.711"
    for shown in ("0.711 [0.692, 0.730]", "+0.0090", "[−0.0015, +0.0195]", "24,576", "0.742", "Mean test AUC", "512 of",
                  "201_tiny", "99 rows: a task needs at least 120", "All 113 tasks", "1 min 20 s", "6 min 42 s",
                  "screened units", "permuted labels"):  # fmt: skip
        assert shown in parsed.text, shown


def test_tables_hold_the_figures_of_their_row(page):
    parsed = Page(page)
    wanted = ["3,456", "0.711", "[0.692, 0.730]", "0.742", "0.717", "[0.698, 0.736]", "0.764", "0.502"]
    assert parsed.row("All sources", "Meta-neurons") == wanted
    assert parsed.row("MLP neurons by block of the language model", "0") == ["0.620"]


def test_verdicts_are_said_honestly(result):
    assert "+0.0090 [−0.0015, +0.0195]: not told from zero, better on 64 of 113 tasks" in told(result)
    assert "random weights is +0.0210 [+0.0105, +0.0315]: above zero" in told(result)
    row_of(result, "mlp-neurons").update(difference=-0.02, interval=[-0.03, -0.001])
    assert "−0.0200 [−0.0300, −0.0010]: below zero" in told(result)
    (against,) = [line for line in headlines(result) if line.label.startswith("Against MLP")]
    assert against.value == "−0.020" and "below zero" in against.note
    assert verdict({"interval": [0.0, 0.1], "tasks": 20}) == verdict({"interval": None, "tasks": 20})
    assert verdict({"interval": None, "tasks": 20}) == "not told from zero"


def test_few_tasks_give_no_verdict(result):
    for ends in ([0.1, 0.2], [-0.2, -0.1], [-0.1, 0.1], None):
        assert verdict({"interval": ends, "tasks": 9}) == "too few tasks to compare"
    assert verdict({"interval": [0.1, 0.2], "tasks": 10}) == "above"
    few = copy.deepcopy(result)
    for row in few["summary"]["paired"]:
        row |= {"tasks": 2, "wins": 2, "ties": 0, "interval": [0.01, 0.02]}
    assert "too few tasks to compare, better on 2 of 2 tasks" in told(few) and "above zero" not in told(few)
    shown = [cell for _, _, rows in tables(few) for row in rows for cell in row]
    assert "too few tasks to compare" in shown and not {"above", "below"} & set(shown)
    page = section(few)
    assert "too few tasks to compare" in page and not re.search(r">(above|below)<", page)


def test_labels_inside_sentences_are_lower_case_save_for_abbreviations(result):
    assert "The mean test AUC of meta-neurons is" in told(result)
    assert "from denoiser of random weights is" in told(result) and "from MLP neurons of" in told(result)


def test_only_times_that_were_spent_are_named(result):
    assert "Time: features 12.0 s, probes 1 min 20 s." in render(result)
    result["seconds"] = {"features": 12.0, "sparse": 0.02}
    assert "Time: features 12.0 s." in render(result)
    result["seconds"] = {"sparse": 0.02}
    assert " Time: " not in render(result)


def test_a_difference_is_found_either_way_round(result):
    row = row_of(result, "mlp-neurons")
    turned = copy.deepcopy(result)
    turned["summary"]["paired"] = [row | {"a": row["b"], "b": row["a"]}]
    found = difference(turned, "meta-neurons", "mlp-neurons")
    assert found and found["difference"] == -row["difference"] and found["wins"] == 113 - 64 - 2
    assert found["interval"] == [-row["interval"][1], -row["interval"][0]]
    assert "MLP neurons of blocks 0 to 15 is −0.0090 [−0.0195, +0.0015]: not told" in told(turned)
    assert difference(result, "meta-neurons", "nothing") is None


def test_the_leading_source_is_not_chosen_by_its_auc(result):
    for score in result["summary"]["scores"]:
        score["auc"] += 0.2 * (score["source"] == "meta-neurons: early")
    assert leading(result) == "meta-neurons"
    assert leading({"sources": [{"name": "layer", "kind": "raw"}]}) is None


@pytest.mark.parametrize("part", [*DRAWN, "paired", "families"])
def test_an_empty_part_leaves_its_figure_out(result, part):
    result["summary"][part] = None
    others = [label for name, label in DRAWN.items() if name != part]
    assert check_page(render(result)).drawings == [SOURCES_DRAWN, *others]
    assert tables(result)


@pytest.mark.parametrize("missing", [False, True])
def test_scores_alone_are_enough(result, missing):
    parts = {part: [] for part in result["summary"]} | {"grid": None, "scores": result["summary"]["scores"]}
    result["summary"] = {"scores": parts["scores"]} if missing else parts
    assert check_page(render(result)).drawings == [SOURCES_DRAWN]
    assert len(tables(result)) == 2


def test_figures_that_are_not_known_are_dashes(result):
    summary = result["summary"]
    for score in summary["scores"]:
        score.update(interval=None, validation=None)
    summary["scores"][0]["auc"] = None
    summary["grid"]["auc"][0][0] = None
    summary["scaling"][0]["heldout_loss"] = summary["scaling"][1]["auc"] = None
    summary["sparse"][0]["auc"] = summary["mlp_blocks"][3]["auc"] = None
    summary["families"][0]["scores"] = {"layer": None}
    for row in summary["paired"]:
        row["interval"] = None
    for source in result["sources"]:
        source["units"] = None
    parsed = check_page(render(result))
    assert parsed.drawings == [SOURCES_DRAWN, *DRAWN.values()] and "None" not in parsed.text
    assert "None" not in str(tables(result))


def test_the_least_result_is_drawn_without_a_warning(result):
    least = {key: result[key] for key in ("kind", "method", "hookpoint", "protocol")}
    least |= {"tasks": result["tasks"][:1], "skipped": [], "sources": result["sources"][:1]}
    least["summary"] = {"scores": result["summary"]["scores"][:1]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parsed = check_page(render(least))
    assert parsed.drawings == [SOURCES_DRAWN]
    assert "1 source of single features" in parsed.text and "1 binary task." in parsed.text
    one = result["summary"] | {"scaling": result["summary"]["scaling"][:1], "mlp_blocks": [{"block": 0, "auc": 0.6}]}
    one |= {"grid": {"prior": "p", "blocks": [0], "times": [0.1], "auc": [[0.7]]}, "sparse": one["sparse"][:1]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_page(render(result | {"summary": one})).drawings == [SOURCES_DRAWN, *DRAWN.values()]
    check_page(render({"kind": "probe"}))


def test_a_result_that_lacks_a_figure_is_refused_by_name(result):
    del result["summary"]["scores"][0]["auc"]
    with pytest.raises(InputError, match="'auc'"):
        render(result)


def test_families_are_sorted_and_their_best_is_bold(result, page):
    drawn = next(part for part in page.split("<figcaption>") if part.startswith("<b>Test AUC by task family"))
    assert re.findall(r'<th scope="row">(.*?)</th>', drawn) == [
        "facts", "topic", "other", "language and script", "code", "questions", "sentiment"
    ]  # fmt: skip
    for family, row in zip(
        sorted(result["summary"]["families"], key=lambda f: -f["tasks"]),
        re.findall("<tr><th scope=.row.*?</tr>", drawn),
        strict=True,
    ):
        assert re.findall("<b>(.*?)</b>", row) == [f"{max(family['scores'].values()):.3f}"]


def test_ties_are_all_bold(result):
    result["summary"]["families"] = [
        {"family": "f", "tasks": 2, "scores": {"layer": 0.7004, "sae": 0.7001, "rotation": 0.69}}
    ]
    drawn = next(part for part in render(result).split("<figcaption>") if part.startswith("<b>Test AUC by task family"))
    assert re.findall("<b>(0.*?)</b>", drawn) == ["0.700", "0.700"]
    assert ["f", "2", "–", "0.700", "Layer output, SAE latents"] in tables(result)[2][2]


def test_cells_of_the_grid_are_one_colour_at_rising_opacity(page):
    drawn = next(svg for svg in re.findall("<svg.*?</svg>", page, re.DOTALL) if "probe-grid" in svg)
    cells = re.findall(r'style="fill: var\(--(\w+)\); opacity: ([\d.]+)', drawn)
    assert len(cells) == 18 and {colour for colour, _ in cells} == {"blue"}
    opacity = [float(value) for _, value in cells]
    assert (min(opacity), max(opacity)) == (0.05, 0.5) and opacity[:6] == sorted(opacity[:6], reverse=True)
    assert re.findall(r">(0\.\d{3})<", drawn)[:6] == ["0.700", "0.700", "0.700", "0.680", "0.660", "0.640"]


def test_sources_stand_from_high_to_low_with_whole_names(result):
    long = "A source whose name goes on and on for so long that one line could not hold it"
    result["sources"][0]["label"] = long
    drawn = re.findall("<svg.*?</svg>", render(result), re.DOTALL)[0]
    words = " ".join(re.findall(r"<text[^>]*>([^<]*)</text>", drawn))
    assert long in words
    assert words.index("Meta-neurons") < words.index("MLP neurons") < words.index("A source") < words.index("rotated")
    left = [float(x) for x in re.findall(r"<text[^>]*translate\((-?[\d.]+)", drawn)]
    assert min(left) >= 0


@pytest.mark.filterwarnings("ignore:constrained_layout")
def test_hostile_names_are_shown_and_do_nothing(result, page):
    def poisoned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: poisoned(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [poisoned(entry) for entry in value]
        return value + EVIL if isinstance(value, str) else value

    elements = Page(page).tags.keys()
    assert check_page(render({**poisoned(result), "kind": "probe"})).tags.keys() <= elements
    named = copy.deepcopy(result)
    for source in named["sources"]:
        source["label"] += EVIL
    for entry in named["summary"]["scaling"]:
        entry["prior"] += EVIL
    named["summary"]["grid"]["prior"] += EVIL
    named["skipped"][0]["reason"] += EVIL
    parsed = check_page(render(named))
    assert parsed.tags.keys() <= elements and parsed.drawings == [SOURCES_DRAWN, *DRAWN.values()]
    assert EVIL.replace("\x00", "\ufffd").replace("\ud800", "\ufffd") in parsed.text


def test_same_result_same_bytes(result, page):
    assert render(result) == page


def test_names_of_priors_lose_what_they_share():
    assert short_names(["runs/a/prior", "runs/b/prior"]) == ["a", "b"]
    assert short_names(["runs/a", "runs/a/more"]) == ["runs/a", "more"]
    assert short_names(["a", "a"]) == ["a", "a"] and short_names(["x/y"]) == ["x/y"] and short_names([]) == []


def test_tables_for_a_terminal(result):
    shown = tables(result)
    assert [title for title, _, _ in shown] == [
        "Mean test AUC over 113 tasks, 95% intervals", "Sources less others, task by task", "By task family",
        "Skipped tasks",
    ]  # fmt: skip
    assert all(isinstance(cell, str) for _, _, rows in shown for row in rows for cell in row)
    assert all(len(row) == len(header) for _, header, rows in shown for row in rows)
    sources, paired, families, skipped = (rows for _, _, rows in shown)
    assert ["Meta-neurons", "3,456", "0.711 [0.692, 0.730]", "0.742", "0.717 [0.698, 0.736]", "0.502"] in sources
    against = ["Meta-neurons less MLP neurons of blocks 0 to 15", "screened", "+0.0090 [−0.0015, +0.0195]"]
    assert [*against, "64, 2, 47", "not told from zero"] in paired
    leading = [row for row in result["summary"]["paired"] if row["a"] == "meta-neurons"]
    only = tables(result | {"summary": result["summary"] | {"paired": leading}})[1]
    assert only[0] == "Meta-neurons less others, task by task"
    assert "MLP neurons of blocks 0 to 15" in [row[0] for row in only[2]]
    assert families[0][:2] == ["facts", "34"] and len(families) == 7
    assert skipped[0] == ["201_tiny", "99 rows: a task needs at least 120"]
    assert [title for title, _, _ in tables(result | {"skipped": []})][-1] == "By task family"


def test_terminal_tables_need_no_drawing():
    code = "import sys, latentprior.probe.tables; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_draws_are_a_row_with_their_spread(result, page):
    assert "SD of draws" not in page and "are drawn at random" not in page
    label = "MLP neurons, as many as meta-neurons (10 draws)"
    drawn = {"name": "mlp-neurons-drawn", "label": label, "units": 3456, "draws": 10}
    result["sources"].insert(3, result["sources"][2] | drawn)
    spread = {"number": 10, "sd": 0.00234, "sd_within_task": 0.01, "lowest": 0.681, "highest": 0.694}
    score = {"source": drawn["name"], "selection": "screened", "auc": 0.688, "interval": ends(0.688), "validation": 0.7}
    result["summary"]["scores"].append(score | {"draws": spread})
    row = row_of(result, "mlp-neurons") | {"b": drawn["name"], "difference": 0.023, "interval": [0.01, 0.03]}
    result["summary"]["paired"].append(row)
    parsed = check_page(render(result))
    assert "3,456 are drawn at random, 10 times, the same for every task" in parsed.text
    assert "the standard deviation of the 10 draws' means, which lie between 0.681 and 0.694" in parsed.text
    cells = parsed.row("All sources", label)
    assert cells[:2] == ["3,456", "0.688"] and cells[-1] == "0.0023"
    assert parsed.row("All sources", "Meta-neurons")[-1] == "–"
    assert f"The paired difference from {label} is +0.0230 [+0.0100, +0.0300]: above zero" in told(result)
    assert headlines_of(render(result))[f"Against {label}"] == "+0.023"
    _, header, rows = tables(result)[0]
    assert header[-1] == "SD of draws" and all(len(row) == len(header) for row in rows)
    assert [row[-1] for row in rows if row[0] == label] == ["0.0023"]
    spread.update(number=1, sd=None)
    assert "which lie between" not in check_page(render(result)).text
