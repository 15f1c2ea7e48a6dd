"""The report page: every part optional, nothing executable, nothing loaded, the same bytes every time."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib.axes import Axes

from html_page import Page
from latentprior.report import figures, render, write_report
from latentprior.report.blocks import table
from latentprior.utils.errors import InputError
from latentprior.utils.formatting import duration, interval, number

SAMPLE = Path(__file__).parents[1] / "golden" / "demo.json"
EVIL = "\"'><script>alert(1)</script><img src=https://example.org/x onerror=alert(1)></style></svg>&\x00\ud800\u202e"


@pytest.fixture
def demo() -> dict[str, Any]:
    return json.loads(SAMPLE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def demo_page() -> str:
    return render(json.loads(SAMPLE.read_text(encoding="utf-8")))


def without(result: dict[str, Any], *path: str) -> dict[str, Any]:
    result = copy.deepcopy(result)
    part = result
    for key in path[:-1]:
        part = part[key]
    del part[path[-1]]
    return result


def headings(page: str) -> list[str]:
    return Page(page).texts["h2"]


def headlines_of(page: str) -> dict[str, str]:
    """Label and figure of the large type."""
    found = re.findall(r'<dt>([^<]*)</dt><dd class="value">([^ <]*)', page)
    return dict(found)


def check_page(page: str) -> Page:
    """What holds for every page."""
    parsed = Page(page)
    ids = parsed.values("id")
    assert len(ids) == len(set(ids)), [name for name, n in Counter(ids).items() if n > 1]
    for value in parsed.values("href") + parsed.values("src") + parsed.values("xlink:href"):
        assert value == "data:," or (value[0] == "#" and value[1:] in ids), value
    assert all(target in ids for target in re.findall(r"url\(#([^)]+)\)", page))
    assert not re.search(r"url\((?!#)|@import|[ \">]nan\b", page)
    assert not parsed.tags.keys() & {"script", "img", "iframe", "object", "embed", "form", "base"}
    assert not [name for _, name, _ in parsed.attributes if name.startswith("on")]
    assert parsed.tags["h1"] == parsed.tags["main"] == parsed.tags["title"] == 1
    assert all(scope in ("col", "row") for scope in parsed.values("scope"))
    assert len(parsed.values("scope")) == parsed.tags["th"]
    assert all(parsed.drawings) and len(set(parsed.drawings)) == len(parsed.drawings)
    return parsed


def test_demo_page_has_every_section_and_figure(demo: dict[str, Any], tmp_path: Path) -> None:
    path = write_report(demo, tmp_path / "new" / "report.html")
    page = path.read_text(encoding="utf-8")
    parsed = check_page(page)
    assert headings(page) == ["Training", "Distribution", "Language model loss", "Steering", "Texts", "Provenance"]
    assert parsed.drawings == [
        "Training and held-out loss over activations seen",
        "Held-out loss by noise level",
        "Real activations on two principal components",
        "Generated activations on two principal components",
        "Delta LM loss of each replacement",
        "Concept gained, fluency lost along sentiment, difference of means",
        "Edit kept along sentiment, difference of means",
        "Off-manifold score along sentiment, difference of means",
    ]
    assert list(parsed.tables) == [
        "Distance from held-out real activations",
        "Added loss, nats",
        "Repairs",
        "Areas under the frontiers",
        "Differences at matched fluency and at matched concept",
        "All strengths",
        "Versions, seed and times",
    ]
    assert parsed.inside["title"] == parsed.inside["h1"] == "A latent prior of smollm2-135m, layer 15"
    for figure in ("0.476", "2.20", "0.0896", "1.27", "0f3c9e1d5b7a4c2e8f6071829a3b4c5d6e7f8091+", "11 min 43 s"):
        assert figure in parsed.text


def test_colours_are_variables_that_the_page_defines(demo_page: str) -> None:
    used = set(re.findall(r"var\(--([a-z]+)\)", demo_page))
    light, dark = demo_page.split("prefers-color-scheme: dark", 1)
    for name in used - {"series"}:
        assert f"--{name}: #" in light and f"--{name}: #" in dark
    drawings = "".join(re.findall("<svg.*?</svg>", demo_page, flags=re.DOTALL))
    assert not re.findall(r"(?:fill|stroke): #\w+", drawings)


@pytest.mark.parametrize("part", ["record", "train", "evaluate", "steer"])
def test_any_part_is_enough(demo: dict[str, Any], part: str) -> None:
    page = render({"kind": "demo", part: demo[part]})  # nor is there config, versions, git, seed or wall time
    assert "Version: " not in check_page(page).text


def test_a_demo_without_parts_is_a_page() -> None:
    assert headings(render({"kind": "demo"})) == []


@pytest.mark.parametrize(
    "path",
    [
        ("train", "log"),
        ("train", "summary"),
        ("train", "seconds"),
        ("train", "config"),
        ("evaluate", "heldout_loss"),
        ("evaluate", "distribution"),
        ("evaluate", "pca"),
        ("evaluate", "delta_lm"),
        ("evaluate", "hookpoint"),
        ("evaluate", "wall_seconds"),
        ("steer", "summary"),
        ("steer", "mean_norm"),
        ("steer", "repairs"),
        ("steer", "priors"),
        ("steer", "judges"),
        ("steer", "texts"),
        ("steer", "seconds"),
    ],
)
def test_a_piece_of_a_part_may_be_missing(demo: dict[str, Any], path: tuple[str, str]) -> None:
    check_page(render({"kind": "demo", path[0]: without(demo, *path)[path[0]]}))


def test_rows_may_be_missing(demo: dict[str, Any]) -> None:
    evaluate = demo["evaluate"]
    evaluate["distribution"] = [row for row in evaluate["distribution"] if row["source"] == "prior"]
    evaluate["delta_lm"]["rows"] = evaluate["delta_lm"]["rows"][:1]
    (direction,) = demo["steer"]["summary"]["directions"]
    direction["methods"] = [entry for entry in direction["methods"] if entry["method"] == "plain"]
    check_page(render(demo))


@pytest.mark.parametrize(
    ("part", "sections"),
    [
        ("train", ["Training", "Provenance"]),
        ("evaluate", ["Training", "Distribution", "Language model loss", "Provenance"]),
        ("steer", ["Steering", "Texts", "Provenance"]),
    ],
)
def test_a_lone_result_gives_a_page(demo: dict[str, Any], part: str, sections: list[str]) -> None:
    page = render({"kind": part} | demo[part])
    check_page(page)
    assert headings(page) == sections


def test_train_json_names_its_hookpoint(demo: dict[str, Any]) -> None:
    hookpoint = demo["record"]["hookpoint"]
    result = demo["train"] | {"kind": "train", "settings": {"hookpoints": [hookpoint]}}
    assert "<h1>A latent prior of smollm2-135m, layer 15</h1>" in render(result)


def test_smallest_run_draws_without_a_warning(demo: dict[str, Any]) -> None:
    demo["train"]["log"] = [{"step": 1, "activations": 64, "loss": 2.0}]
    (direction,) = demo["steer"]["summary"]["directions"]
    direction["methods"] = direction["methods"][:1]
    direction["methods"][0]["points"] = direction["methods"][0]["points"][:1]
    demo["evaluate"]["delta_lm"]["rows"] = demo["evaluate"]["delta_lm"]["rows"][:1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_page(render(demo))


def test_figures_that_are_not_numbers_show_as_dashes(demo: dict[str, Any]) -> None:
    row = demo["evaluate"]["distribution"][1] | {"sliced_wasserstein": float("nan"), "two_sample_interval": None}
    page = render({"kind": "evaluate", "distribution": [row]})
    header, cells = check_page(page).tables["Distance from held-out real activations"]
    unknown = [name for name, cell in zip(header, cells, strict=True) if cell == "–"]
    assert unknown == ["Times lower bound", "Sliced Wasserstein", "95% interval"]


@pytest.mark.filterwarnings("ignore:constrained_layout")  # names as long as a sentence leave an axis no room
def test_generated_text_is_shown_and_never_executed(demo: dict[str, Any], demo_page: str) -> None:
    def poisoned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: poisoned(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [poisoned(entry) for entry in value]
        return value + EVIL if isinstance(value, str) else value  # names stay apart

    elements = check_page(demo_page).tags.keys()
    page = render({**poisoned(demo), "kind": "demo"})
    assert check_page(page).tags.keys() <= elements
    page.encode("utf-8")
    demo["steer"]["texts"][0]["text"] = EVIL
    shown = check_page(render({"kind": "demo", "steer": demo["steer"]})).text
    assert EVIL.replace("\x00", "\ufffd").replace("\ud800", "\ufffd") in shown


def test_same_result_same_bytes_whatever_the_global_style(demo: dict[str, Any], demo_page: str) -> None:
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "path"}):
        styled = dict(matplotlib.rcParams)
        assert render(demo) == demo_page
        assert dict(matplotlib.rcParams) == styled


@pytest.mark.parametrize("result", [{}, {"kind": "demmo"}])
def test_unknown_kind_is_refused(result: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="demo.*frontier"):
        write_report(result, tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_malformed_part_is_refused_by_name(demo: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="frechet_raw"):
        render(without(demo, "evaluate", "distribution") | {"evaluate": {"distribution": [
            {key: value for key, value in demo["evaluate"]["distribution"][0].items() if key != "frechet_raw"}
        ]}})  # fmt: skip


def test_headlines_follow_the_rules(demo_page: str) -> None:
    assert headlines_of(demo_page) == {
        "Held-out loss": "1.27",
        "Delta LM loss": "0.476",
        "Fréchet over lower bound": "2.20",
        "Gain over plain": "0.0896",
    }
    assert "Prior, AB2, 20\N{NO-BREAK SPACE}NFE, best of 8" in Page(demo_page).text  # least Fréchet distance


def test_a_demo_says_what_its_steering_found(demo: dict[str, Any], demo_page: str) -> None:
    shown = Page(demo_page).text
    assert "the gain of paired over plain steering at the same fluency is 0.0896 [0.0627, 0.115]" in shown
    assert "multiple of the layer's mean activation norm, 181." in shown
    assert "A latent prior of" in shown and "held-out accuracy is 0.811" in shown
    alone = render(demo["steer"])
    for pattern in (r'<section id="steering">.*?</section>', r'<section id="texts">.*?</section>'):
        assert re.findall(pattern, alone, re.DOTALL) == re.findall(pattern, demo_page, re.DOTALL) != []


def test_another_prior_stands_beside_the_demos(demo: dict[str, Any], demo_page: str) -> None:
    evaluate, other = demo["evaluate"], {"prior": "its-name"}
    by_t = [row | {"loss": 0.9 * row["loss"]} for row in evaluate["heldout_loss"]["by_t"]]
    evaluate["compared"] = [other | {"heldout_loss": {"mean": 1.1, "interval": [1.0, 1.2], "by_t": by_t}}]
    best = min(
        (row for row in evaluate["distribution"] if row["source"] == "prior"), key=lambda r: r["frechet"]["total"]
    )
    evaluate["distribution"].append(best | other | {"source": "compared", "frechet": best["frechet"] | {"total": 31.4}})
    rows = evaluate["delta_lm"]["rows"]
    rows.append(next(row for row in rows if row["method"] == "prior") | other | {"method": "compared", "delta": 0.123})
    page = check_page(render(demo | {"shipped": {"prior": "its-name", "install": None}}))
    for said in (
        "The shipped prior its-name is measured beside this prior, on the same rows, noise and texts; its held-out",
        "Of its-name it is 1.10 [1.00, 1.20], standardised by that prior's own statistics.",
        "those of its-name at 31.4; two sets of real ones",
        "(0.123 with its-name, ",
        "this prior",  # in the legend
    ):
        assert said in " ".join(page.text.split()), said
    assert page.row("Distance from held-out real activations", "Prior its-name, AB2, 20\N{NO-BREAK SPACE}NFE")
    assert page.row("Added loss, nats", "Prior its-name, t = 0.5") and page.drawings == Page(demo_page).drawings
    missing = Page(render(demo | {"shipped": {"prior": None, "install": "pip install this"}})).text
    assert (
        "No shipped prior of these activations is installed to be measured" in missing and ": pip install th" in missing
    )


def test_bars_are_logarithmic_only_if_all_are_positive() -> None:
    rows = [
        {"method": "prior", "delta": 0.02, "interval": [-0.01, 0.05]},
        {"method": "mean", "delta": 6.4, "interval": [6, 7]},
    ]
    log = figures.delta_bars(rows, ["a", "b"], ["0.0200", "6.40"])
    assert "log scale" in log and ">0.0200<" in log and ">6.40<" in log
    rows[0] |= {"delta": -0.02}
    assert "log scale" not in figures.delta_bars(rows, ["a", "b"], ["x", "y"])


def test_bars_of_which_no_interval_is_above_zero_are_drawn() -> None:
    rows = [{"method": "prior", "delta": 0.1, "interval": (-0.1, 0.3)}]
    assert "log scale" in figures.delta_bars(rows, ["a"], ["0.100"])


def test_crowded_labels_are_left_out_rather_than_written_over() -> None:
    line = [(2 + 1e-3 * i, 0.5 + 1e-4 * i * i) for i in range(30)] + [(9.0, 0.9)]

    def draw(axes: Axes) -> None:
        axes.plot(*zip(*line, strict=True), "o-")
        figures.place(axes, [(*point, str(10 + i), figures.INK) for i, point in enumerate(line)], [line])

    labels = re.findall(r">(1\d|[23]\d|40)<", figures.svg("crowd", draw, "Many points"))
    assert "40" in labels and 2 <= len(labels) < 31


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0.00"),
        (1, "1.00"),
        (0.4764, "0.476"),
        (-1.905, "−1.91"),
        (9.999, "10.0"),
        (21649.9, "21,600"),
        (999_999, "1.00 × 10⁶"),
        (1.234e7, "1.23 × 10⁷"),
        (0.000123, "0.000123"),
        (-4.56e-7, "−4.56 × 10⁻⁷"),
        (float("inf"), "–"),
        (float("nan"), "–"),
        (None, "–"),
    ],
)
def test_numbers_have_three_significant_digits(value: float | None, shown: str) -> None:
    assert number(value) == shown


def test_intervals_and_durations() -> None:
    assert interval([-0.1, 2]) == "[−0.100, 2.00]"
    assert interval(None) == "–"
    assert [duration(s) for s in (0.5, 59.94, 61, 3725)] == ["0.500 s", "59.9 s", "1 min 1 s", "1 h 2 min"]


def test_table_aligns_decimal_points() -> None:
    page = table("T", "", ["a", "b"], [["x", "301"], ["y", "0.25"], ["z", "–"]])
    assert re.findall("<td>(.*?)</td>", page) == ["301\u2008\u2007\u2007", "0.25", "–"]
    assert not table("T", "", ["a", "b"], [])
