"""The site of a neuron store: nothing of the store is executed, every link leads somewhere, the search finds."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlencode

import numpy as np
import pyarrow as pa
import pytest

from html_page import Page
from latentprior import report
from latentprior.neurons.store import (
    DESCRIPTIONS_SCHEMA,
    EXAMPLES_SCHEMA,
    UNITS_SCHEMA,
    Example,
    NeuronStore,
    write_descriptions,
    write_store,
)
from latentprior.report.site import write, write_site
from latentprior.report.site.histogram import histogram
from latentprior.report.site.passages import CONTEXT, activation_levels, passage, shown, token
from latentprior.utils.errors import InputError

BLOCKS, D_MLP = 2, 40
FLAT = 7  # a unit that never moves
PIECES = (" river", " bank", "naïve", " مرحبا", " שלום", ".", "\n", "Donaudampfschifffahrtsgesellschaft" * 3)
EVIL = "</script><img src=x onerror=alert(1)><!--\"'&\u2028\x00\u202e"


def unit_row(number: int, draw: random.Random) -> dict[str, Any]:
    flat = number == FLAT
    low, high = (0.0, 0.0) if flat else (-draw.random() - 0.5, draw.random() + 1)
    won = ["92_glue_sst2", EVIL][: number % 3]
    return {
        "unit": number,
        "block": number // D_MLP,
        "index": number % D_MLP,
        "mean": (low + high) / 2,
        "variance": 0.0 if flat else draw.random(),
        "kurtosis": math.nan if flat else draw.expovariate(0.1),
        "minimum": low,
        "maximum": high,
        "share_above": [0.3, 0.05, 0.001],
        "histogram": [0, 5, 900, 20],
        "histogram_low": low,
        "histogram_high": high,
        "promoted": [] if flat else [EVIL, f" word{number}"],
        "promoted_values": [] if flat else [2.5, 1.25],
        "suppressed": [draw.choice(PIECES)],
        "suppressed_values": [-1.5],
        "neighbours": [(number + 1) % (BLOCKS * D_MLP), 0],
        "neighbour_correlations": [0.75, -0.5],
        "tasks": won,
        "task_aucs": [0.9 - number / 1000, 0.6][: len(won)],
        "task_signs": [1, -1][: len(won)],
    }


def example_rows(number: int, draw: random.Random) -> list[dict[str, Any]]:
    kinds = [("top", 0, None), ("top", 1, None), ("bottom", 0, None), ("quantile", 0, 0.5), ("quantile", 1, 1.0)]
    rows = []
    for kind, rank, quantile in kinds:
        values = [0.0, *(draw.uniform(-0.3, 0.3) for _ in range(7))]
        values[5] = -1.0 if kind == "bottom" else 1.0 - rank / 10
        pieces = [draw.choice(PIECES) for _ in values]
        pieces[5] = EVIL if number % 2 else "\n"
        place = {"kind": kind, "rank": rank, "quantile": quantile, "value": values[5], "doc": draw.randrange(1000)}
        rows.append({"unit": number, **place, "peak": 5, "pieces": pieces, "values": values})
    return rows


def make_store(folder: Path, *, described: bool = True, blocks: int = BLOCKS) -> NeuronStore:
    draw = random.Random(0)
    numbers = range(blocks * D_MLP)
    info = {
        "kind": "neurons",
        "prior": EVIL,
        "hookpoint": {"model": "tiny-llama", "layer": 2, "width": 32, "side": "output"},
        "t": 0.1,
        "blocks": blocks,
        "d_mlp": D_MLP,
        "documents": 1000,
        "tokens": 64000,
        "max_length": 64,
        "corpus": {"dataset": EVIL},
        "thresholds": [1.0, 2.0, 4.0],
        "quantiles": [0.5, 1.0],
    }
    units = [unit_row(number, draw) for number in numbers]
    for row in units:
        row["neighbours"] = [neighbour % len(units) for neighbour in row["neighbours"]]
    examples = [row for number in numbers if number != FLAT for row in example_rows(number, draw)]
    write_store(
        folder,
        info,
        pa.Table.from_pylist(units, UNITS_SCHEMA),
        [pa.Table.from_pylist(examples, EXAMPLES_SCHEMA)],
    )
    if described:
        rows = [description_row(number) for number in numbers if number % 4]
        write_descriptions(folder, pa.Table.from_pylist(rows, DESCRIPTIONS_SCHEMA))
    return NeuronStore(folder)


def description_row(number: int) -> dict[str, Any]:
    offline = number % 2 == 0
    return {
        "unit": number,
        "description": "" if number == 5 else f"{'Rivers' if number % 3 else EVIL} and banks {number}",
        "source": "offline" if offline else "endpoint",
        "consistency": None if offline else 4,
        "complexity": None if offline else 2,
        "detection": None if offline else 0.5 + number / 1000,
        "reason": EVIL if offline else "",
    }


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> NeuronStore:
    return make_store(tmp_path_factory.mktemp("neurons"))


@pytest.fixture(scope="module")
def built(store: NeuronStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    index = write_site(store, tmp_path_factory.mktemp("browser") / "site")
    assert index.name == "index.html"
    return index.parent


@pytest.fixture(scope="module")
def pages(built: Path) -> dict[Path, Page]:
    return {path: Page(path.read_text("utf-8")) for path in sorted(built.rglob("*.html"))}


def units_of(folder: Path) -> dict[str, Any]:
    script = (folder / "units.js").read_text("utf-8")
    assert script.startswith("window.UNITS=") and script.endswith(";\n")
    return json.loads(script.removeprefix("window.UNITS=").removesuffix(";\n"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_there_is_a_page_for_every_unit_a_list_for_every_block_and_an_index(built: Path) -> None:
    wanted = {"index.html", "base.css", "site.css", "site.js", "units.js"} | {f"blocks/{b}.html" for b in range(BLOCKS)}
    wanted |= {f"units/b{b}/n{i}.html" for b in range(BLOCKS) for i in range(D_MLP)}
    assert set(contents(built)) == wanted


def test_every_page_has_a_language_a_title_and_one_heading(pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        assert ("html", "lang", "en") in page.attributes, path
        assert page.inside["title"].strip() and page.inside["h1"].strip() and page.tags["h1"] == 1, path
        assert all(scope in ("col", "row") for scope in page.values("scope")), path
        assert page.tags["th"] == len(page.values("scope")), path


def test_nothing_of_the_store_becomes_markup(built: Path, pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        scripts = 2 if path.name == "index.html" else 1
        assert page.tags["script"] == scripts == len(page.values("src")), path
        assert not page.inside["script"].strip() and not page.tags["img"] and not page.tags["style"], path
        assert not [name for _, name, _ in page.attributes if name.startswith("on") or name == "style"], path
        assert "\x00" not in path.read_text("utf-8"), path
    assert "onerror=alert(1)" in pages[built / "units/b0/n1.html"].inside["mark"]  # the text itself is all there
    script = (built / "units.js").read_text("utf-8")
    assert "<" not in script and "\u2028" not in script and "onerror" in script


def test_every_link_leads_to_a_page_of_the_site(built: Path, pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        for link in [*page.values("href"), *page.values("src")]:
            if link != "data:,":
                target = path.parent / unquote(link.partition("#")[0])
                assert target.is_file() and target.resolve().is_relative_to(built.resolve()), (path, link)


def test_all_pages_are_reached_from_the_index_without_script(built: Path, pages: dict[Path, Page]) -> None:
    seen, todo = set[Path](), [built / "index.html"]
    while todo:
        path = todo.pop()
        if path not in seen:
            seen.add(path)
            links = [value for tag, name, value in pages[path].attributes if (tag, name) == ("a", "href")]
            todo += [(path.parent / link.partition("#")[0]).resolve() for link in links]
    assert {path.resolve() for path in seen} == {path.resolve() for path in pages}


def test_the_search_data_are_those_of_the_store(built: Path, store: NeuronStore) -> None:
    units = units_of(built)
    assert units["unit"] == list(range(len(store))) and units["d_mlp"] == D_MLP
    safe = EVIL.replace("\x00", "\N{REPLACEMENT CHARACTER}")
    for i, unit in enumerate(store):
        row = unit.row
        assert units["description"][i] == (row["description"] or "").replace("\x00", "\N{REPLACEMENT CHARACTER}")
        assert units["promoted"][i] == [piece.replace("\x00", "\N{REPLACEMENT CHARACTER}") for piece in row["promoted"]]
        assert [units["tasks"][task] for task in units["won"][i]] == [t.replace(EVIL, safe) for t in row["tasks"]]
        assert units["aucs"][i] == pytest.approx(row["task_aucs"], rel=1e-3)
        assert units["auc"][i] == (pytest.approx(max(row["task_aucs"]), rel=1e-3) if row["task_aucs"] else None)
        assert units["top"][i] == ([] if i == FLAT else [safe if i % 2 else "\n"])
        assert units["share"][i] == pytest.approx(0.001, rel=1e-3)
        for name in ("variance", "maximum", "detection", "consistency"):
            assert units[name][i] == (None if row[name] is None else pytest.approx(row[name], rel=1e-3))
    assert units["kurtosis"][FLAT] is None  # not NaN, which JSON lacks


def test_statistics_that_no_unit_has_are_left_out(tmp_path: Path) -> None:
    index = write_site(make_store(tmp_path / "store", described=False), tmp_path / "site")
    assert "Detection" not in index.read_text("utf-8") and "Consist" not in index.read_text("utf-8")
    assert "no description" in (tmp_path / "site/units/b0/n1.html").read_text("utf-8")


def test_a_unit_page_says_all_that_the_store_knows(built: Path) -> None:
    page = Page((built / "units/b1/n1.html").read_text("utf-8"))  # unit 41
    text = page.inside["body"]
    assert page.inside["h1"] == "Block 1, unit 1" and "Rivers and banks 41" in text
    assert "Consistency 4 of 5. Complexity 2 of 5. Detection score (AUC) 0.541." in text
    assert page.row("Statistics over all tokens", "Share above 4 sd") == ["0.100%"]
    assert page.row("Direct effect on the logits, largest.", "␣word41") == ["1.25"]
    for wanted in ("Top documents", "Bottom documents", "Quantile 1", "Quantile 0.5", "Share above 4 sd", "0.100%"):
        assert wanted in text
    assert "␣word41" in text and "−1.50" in text and "0.750" in text and "lower" in text
    assert page.tags["mark"] == 5 and page.inside["mark"].count("(peak, 1.00)") == 2
    assert "← b1 n0" in text and "b1 n2 →" in text and "Histogram of activations" in page.inside["svg"]
    first, last = ((built / path).read_text("utf-8") for path in ("units/b0/n0.html", f"units/b1/n{D_MLP - 1}.html"))
    assert 'rel="prev"' not in first and 'rel="next"' not in last
    assert "⏎" in Page(first).inside["mark"]


def test_the_same_store_gives_the_same_site_again(built: Path, store: NeuronStore, tmp_path: Path) -> None:
    write_site(store, tmp_path)
    assert contents(tmp_path) == contents(built)
    write_site(store, tmp_path)
    assert contents(tmp_path) == contents(built)


def test_pages_of_units_that_are_gone_are_removed_and_other_files_are_kept(tmp_path: Path, store: NeuronStore) -> None:
    write_site(store, tmp_path / "site")
    (tmp_path / "site/CNAME").write_text("neurons.example")
    (tmp_path / "site/units/b0/notes.txt").write_text("mine")
    write_site(make_store(tmp_path / "one", blocks=1), tmp_path / "site")
    left = set(contents(tmp_path / "site"))
    assert {"CNAME", "units/b0/notes.txt"} < left
    assert not [path for path in left if path.startswith("units/b1/")] and "blocks/1.html" not in left


def test_a_folder_of_something_else_is_refused(tmp_path: Path, store: NeuronStore) -> None:
    for name, text in (("thesis.tex", "x"), ("index.html", "<!doctype html><title>mine</title>")):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text(text)
        with pytest.raises(InputError, match=folder.name):
            write_site(store, folder)
        assert contents(folder) == {name: text.encode()}
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="file"):
        write_site(store, tmp_path / "file")


@pytest.mark.parametrize("fresh", [True, False])
def test_an_interrupted_run_leaves_the_old_index_and_the_next_completes_it(
    fresh: bool, tmp_path: Path, store: NeuronStore, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fresh:
        write_site(make_store(tmp_path / "one", blocks=1), tmp_path / "site")
    index = tmp_path / "site/index.html"
    old = None if fresh else index.read_bytes()
    write_page, calls = write._write_page, []

    def interrupted(path: Path, page: str) -> None:
        calls.append(path)
        if len(calls) == 50:
            raise KeyboardInterrupt
        write_page(path, page)

    with monkeypatch.context() as patch:
        patch.setattr(write, "_write_page", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_site(store, tmp_path / "site")
    assert (index.read_bytes() if index.exists() else None) == old
    write_site(store, tmp_path / "site")
    assert contents(tmp_path / "site") == contents(built)


def test_progress_ends_at_the_number_of_units(tmp_path: Path, store: NeuronStore) -> None:
    seen: list[tuple[int, int | None]] = []
    write_site(store, tmp_path, report=lambda done, total, figures: seen.append((done, total)))
    assert seen == [(50, 80), (80, 80)]


def test_long_lists_are_cut_into_pages(tmp_path: Path, store: NeuronStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentprior.report.site.listing.ROWS", 25)
    write_site(store, tmp_path)
    rows = [Page((tmp_path / f"blocks/{name}.html").read_text("utf-8")) for name in ("0", "0-2")]
    assert [page.inside["tbody"].count("b0 n") for page in rows] == [25, 15]
    assert "0-2.html" in " ".join(rows[0].values("href"))


# Tokens and histograms


def example(values: list[float], pieces: list[str], peak: int) -> Example:
    return Example("top", 0, None, values[peak], 3, peak, pieces, np.asarray(values, np.float32))


def test_runs_of_tokens_of_equal_level_are_one_element() -> None:
    drawn = passage(example([0, 0, 0.5, 0.45, 1.0, -0.9], ["a", " <b", " c", " d", " e", " f"], 4), 1.0)
    peak = "<mark class=p4> e<span class=vh> (peak, 1.00)</span></mark>"
    assert drawn == f"<bdi class=doc>a &lt;b<span class=p2> c d</span>{peak}<span class=n4> f</span></bdi>"


def test_long_documents_are_cut_around_the_peak() -> None:
    n, peak = 500, 250
    drawn = Page(passage(example([0.0] * n, [f" {i}" for i in range(n)], peak), 0.0)).inside["bdi"]
    assert drawn.startswith(f"… {peak - CONTEXT} ") and drawn.endswith(f" {peak + CONTEXT}…")


def test_levels_are_shares_of_the_scale_by_sign() -> None:
    values = np.array([0, 0.19, 0.2, -0.4, 0.79, 0.8, -5, np.nan, np.inf], np.float32)
    assert activation_levels(values, 1.0).tolist()[:7] == [0, 0, 1, -2, 3, 4, -4]
    assert np.abs(activation_levels(values, 1.0)).max() == 4
    assert not activation_levels(values, 0.0).any()


@pytest.mark.parametrize(
    ("piece", "wanted"),
    [
        (" the", " the"),
        (" ", "␣"),
        ("\n\n", "⏎⏎\n\n"),
        ("\t", "⇥"),
        ("", "(empty)"),
        ("\u200b", "U+200B"),
    ],
)
def test_a_token_is_never_invisible(piece: str, wanted: str) -> None:
    assert shown(piece) == wanted


def test_a_token_is_text() -> None:
    assert token("<b>\x00") == "<bdi class=token>&lt;b&gt;\N{REPLACEMENT CHARACTER}</bdi>"


def test_a_token_by_itself_shows_the_blanks_at_its_ends() -> None:
    assert [Page(token(piece)).inside["bdi"] for piece in (" a ", "b", "  ", "c\n")] == ["␣a␣", "b", "␣␣", "c⏎"]


def test_a_histogram_tells_negative_from_positive_and_says_what_it_shows() -> None:
    drawn = histogram([1, 0, 10, 1000], -2.0, 2.0)
    page = Page(drawn)
    bars = {kind: d for kind, d in zip(page.values("class")[1:], page.values("d"), strict=False)}
    assert bars["minus"].count("M") == 1 and bars["plus"].count("M") == 2
    assert "Histogram" in page.inside["title"] and "1,011 tokens from −2.00 to 2.00" in page.inside["desc"]
    assert drawn.count("NaN") == drawn.count("nan") == 0


@pytest.mark.parametrize(
    ("counts", "low", "high", "wanted"),
    [
        ([], 0.0, 1.0, "No activations"),
        ([0, 0], 0.0, 1.0, "No activations"),
        ([3, 4], math.nan, math.nan, "No activations"),
        (None, None, None, "No activations"),
        ([30, 0], 0.5, 0.5, "Each of the 30 tokens has the activation 0.500"),
    ],
)
def test_a_histogram_of_nothing_is_a_sentence(
    counts: list[int] | None, low: float | None, high: float | None, wanted: str
) -> None:
    assert wanted in histogram(counts, low, high) and "<svg" not in histogram(counts, low, high)


# Style


def palettes() -> list[dict[str, str]]:
    """The colours of light and of dark pages."""
    found: list[dict[str, str]] = [{}, {}]
    for path in write.ASSETS:
        style = (Path(report.__file__).parent / "templates" / path).read_text("utf-8")
        for palette, block in zip(found, re.findall(r":root {(.*?)}", style, re.S), strict=False):
            palette |= dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block))
    assert found[0].keys() == found[1].keys() >= {"ink", "p1"}
    return found


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("palette", palettes(), ids=("light", "dark"))
def test_text_has_contrast_enough_on_every_background(palette: dict[str, str]) -> None:
    levels = [f"{sign}{i}" for sign in "pn" for i in range(1, 5)]
    pairs = [("ink", name) for name in ("paper", "wash", *levels)]
    pairs += [(name, ground) for name in ("muted", "blue") for ground in ("paper", "wash")]
    for text, ground in pairs:
        low, high = sorted(luminance(palette[name]) for name in (text, ground))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)


# In a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")


def opened(address: str, profile: Path) -> str:
    """The document as it stands once a page has run."""
    options = (
        "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync "
        "--disable-component-update --disable-dev-shm-usage --virtual-time-budget=5000 --dump-dom"
    )
    command = [str(CHROMIUM), *options.split(), f"--user-data-dir={profile}", address]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def listed(dom: str) -> list[tuple[int, int]]:
    body = re.search(r'id="results".*?<tbody>(.*?)</tbody>', dom, re.S)
    assert body
    return [(int(b), int(i)) for b, i in re.findall(r">b(\d+) n(\d+)</a>", body[1])]


@needs_chromium
def test_a_linked_search_is_run_from_disk(built: Path, store: NeuronStore, tmp_path: Path) -> None:
    state = urlencode({"q": "rivers", "block": 1, "sort": "variance", "order": "ascending"})
    dom = opened(f"{(built / 'index.html').as_uri()}#{state}", tmp_path)
    found = [u for u in store if u.block == 1 and "rivers" in (u.row["description"] or "").lower()]
    wanted = [(u.block, u.index) for u in sorted(found, key=lambda u: u.row["variance"])]
    assert wanted and listed(dom) == wanted
    assert f"{len(wanted)} of {len(store)} units" in dom and 'aria-sort="ascending"' in dom
    assert 'href="units/b1/n1.html#q=rivers&amp;block=1&amp;sort=variance&amp;order=ascending"' in dom


@needs_chromium
def test_typing_choosing_and_going_back(built: Path, store: NeuronStore, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    shutil.copytree(built, tmp_path / "site", dirs_exist_ok=True)
    page = (built / "index.html").read_text("utf-8").replace("<head>", '<head><script src="steps.js"></script>')
    (tmp_path / "site/steps.html").write_text(page, encoding="utf-8")
    (tmp_path / "site/steps.js").write_text(STEPS, encoding="utf-8")
    dom = opened((tmp_path / "site/steps.html").as_uri(), tmp_path / "profile")
    found = re.search(r'data-seen="([^"]*)"', dom)
    assert found, "the steps did not run to their end"
    seen = json.loads(unquote(found[1]))
    total, rows = len(store), 50
    won = [u for u in store if "92_glue_sst2" in u.row["tasks"]]
    best = max(won, key=lambda u: u.row["task_aucs"][0])
    assert seen["start"] == [rows, f"{total} of {total} units, first 50 shown", ""]
    assert seen["more"] == [total, f"{total} of {total} units", "#rows=80"] and seen["focused after more"] == "50"
    assert seen["slash"] == "q"
    assert seen["id"] == [1, f"1 of {total} units", "#q=b1+n5"] and seen["first"] == "b1 n5"
    assert seen["quoted"][0] == 1 and seen["nothing"][0] == 0 and "No unit matches" in seen["nothing"][1]
    assert seen["task"][0] == min(rows, len(won)) and seen["best"] == f"b{best.block} n{best.index}"
    assert seen["back"] == seen["start"] and seen["header"] == "ascending" and seen["missing"] == f"b0 n{FLAT}"
    assert seen["kept"] == "#q=b1+n5"


@needs_chromium
@pytest.mark.parametrize("width", [390, 1280])
def test_no_page_is_wider_than_the_window(width: int, built: Path, tmp_path: Path) -> None:
    shutil.copytree(built, tmp_path / "site")
    frames = []
    for path in ("index.html", "units/b0/n1.html", f"units/b0/n{FLAT}.html", "blocks/0.html"):
        page, script = tmp_path / "site" / path, "../" * path.count("/") + "width.js"
        measured = f'<head><script src="{script}"></script>'
        page.write_text(page.read_text("utf-8").replace("<head>", measured), encoding="utf-8")
        frames.append(f'<iframe src="{path}" width="{width}" height="600"></iframe>')
    (tmp_path / "site/width.js").write_text(WIDTH)
    (tmp_path / "site/frames.html").write_text(f'<script src="width.js"></script>{"".join(frames)}')
    dom = opened((tmp_path / "site/frames.html").as_uri(), tmp_path / "profile")
    widths = [int(found) for found in re.findall(r'<data value="(\d+)">', dom)]
    assert len(widths) == 4 and max(widths) <= width


WIDTH = """
if (parent === window) {
  addEventListener("message", (event) => {
    const data = document.createElement("data");
    data.value = event.data;
    document.body.append(data);
  });
} else {
  addEventListener("load", () => parent.postMessage(document.documentElement.scrollWidth, "*"));
}
"""

# Virtual time does not serve every animation frame, so that they are timers here.
STEPS = r"""
window.requestAnimationFrame = (draw) => setTimeout(draw, 16);
window.addEventListener("load", async () => {
  const $ = (id) => document.getElementById(id);
  const wait = (ms) => new Promise((done) => setTimeout(done, ms));
  const rows = () => [...$("results").tBodies[0].rows];
  const state = () => [rows().length, $("count").textContent, location.hash];
  const type = async (text) => { $("q").value = text; $("q").dispatchEvent(new Event("input")); await wait(400); };
  const pick = async (id, value) => { $(id).value = value; $(id).dispatchEvent(new Event("change")); await wait(50); };
  const seen = { start: state() };
  document.body.dispatchEvent(new KeyboardEvent("keydown", { key: "/", bubbles: true }));
  seen.slash = document.activeElement.id;
  await type("b1 n5");
  seen.id = state();
  seen.first = rows()[0].cells[0].textContent;
  seen.kept = new URL(document.querySelector(".blocks a").href).hash;
  await type('" word41"');
  seen.quoted = state();
  await type("zzzz");
  seen.nothing = state();
  await type("");
  await pick("task", "92_glue_sst2");
  await pick("sort", "auc");
  seen.task = state();
  seen.best = rows()[0].cells[0].textContent;
  history.go(-2);
  await wait(400);
  seen.back = state();
  $("more").click();
  await wait(50);
  seen.more = state();
  seen["focused after more"] = String(rows().indexOf(document.activeElement.closest("tr")));
  document.querySelector("th[data-key=kurtosis] button").click();
  await wait(50);
  $("more").click();
  seen.header = document.querySelector("th[data-key=kurtosis]").getAttribute("aria-sort");
  seen.missing = rows().at(-1).cells[0].textContent;
  document.documentElement.dataset.seen = encodeURIComponent(JSON.stringify(seen));
});
"""
