"""The page: its sections, each from one part of a result.

Every string of a result is escaped where it enters the page (`markup.text`): generated text may hold anything.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from itertools import chain, islice
from pathlib import Path
from string import Template
from typing import Any

from latentprior.report import figures, findings, probing, scaling, steering
from latentprior.report.markup import MISSING, Number, duration, figure, interval, number, printable, table, text
from latentprior.utils.errors import InputError, unknown
from latentprior.utils.files import replace_text

Json = Mapping[str, Any]

KINDS = ("demo", "train", "evaluate", "sweep", "frontier", "probe")
HEADLINES = 4
REPLACEMENTS = {
    "prior": "Prior",
    "gaussian": "Gaussian posterior mean",
    "noise": "Noise alone",
    "mean": "Mean activation",
    "sae": "SAE reconstruction",
}


def write_report(result: Json, path: str | Path) -> Path:
    """Draw a result as one HTML file that needs no network and no script.

    Args:
        result: of kind "demo" with any of the parts "record", "train", "evaluate" and "steer", or one part alone:
            what is in ``evaluate.json``, ``sweep.json``, ``steer.json`` (kind "frontier"), ``probe.json``, or
            ``train.json`` (add the lines of ``log.jsonl`` as "log" for its curve).
        path: the file; its folder is made if need be.

    Raises:
        InputError: a result of another kind, or one that lacks a figure that its parts always have.
    """
    path = Path(path)
    page = render(result)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, page)
    return path


def render(result: Json) -> str:
    """The page of `write_report` as text; the same result always gives the same text."""
    result = printable(result)
    kind = result.get("kind")
    if kind not in KINDS:
        raise unknown("kind of result", kind, KINDS)
    parts = {name: result[name] for name in findings.PARTS if result.get(name)} if kind == "demo" else {kind: result}
    try:
        return _page(result, parts)
    except (KeyError, IndexError) as error:
        raise InputError(f"this {kind} result lacks {error}") from error


def _page(result: Json, parts: Json) -> str:
    evaluate, sweep, probe, train = (parts.get(name, {}) for name in ("evaluate", "sweep", "probe", "train"))
    steer = _steered(parts)
    sections = {
        "Training": _training(train, evaluate.get("heldout_loss")),
        "Distribution": _distribution(evaluate),
        "Language model loss": _delta_lm(evaluate.get("delta_lm")),
        "Steering": steering.section(steer),
        "Texts": steering.texts(steer),
        "Scaling": scaling.section(sweep),
        "Probing": probing.section(probe),
        "Provenance": _provenance(result, parts),
    }
    shown = [(name.lower().replace(" ", "-"), name, content) for name, content in sections.items() if content]
    links = "".join(f'<li><a href="#{anchor}">{name}</a></li>' for anchor, name, _ in shown)
    title = text(findings.title(parts))
    said = chain(
        findings.sentences(parts), scaling.sentences(sweep), probing.sentences(probe), steering.sentences(steer)
    )
    body = [
        f'<header>\n<p class="kicker">latentprior {text(result["kind"])}</p>\n<h1>{title}</h1>',
        f'<p class="lede">{text(" ".join(said))}</p>',
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n{_headlines(parts)}</header>\n<main>',
        *(f'<section id="{anchor}">\n<h2>{name}</h2>\n{content}\n</section>' for anchor, name, content in shown),
        "</main>\n<footer>Drawn by latentprior from JSON alone.</footer>",
    ]
    template, base = (
        resources.files("latentprior.report").joinpath(name).read_text(encoding="utf-8")
        for name in ("template.html", "base.css")
    )
    return Template(template).substitute(title=title, base=base, body="\n".join(body))


def _headlines(parts: Json) -> str:
    found = chain(
        findings.headlines(parts),
        scaling.headlines(parts.get("sweep", {})),
        probing.headlines(parts.get("probe", {})),
        steering.headlines(_steered(parts)),
        findings.further_headlines(parts),
    )
    items = [
        f'<div><dt>{text(label)}</dt><dd class="value">{text(value)} <span class="unit">{text(unit)}</span></dd>'
        f'<dd class="note">{text(note)}</dd></div>'
        for label, value, unit, note in islice(found, HEADLINES)
    ]
    return f'<dl class="headlines">{"".join(items)}</dl>\n' if items else ""


def _steered(parts: Json) -> Json:
    """The steering experiment, a part of a demo or alone."""
    return parts.get("steer") or parts.get("frontier", {})


# The sections. Each gives "" where its part has nothing to show.


def _training(train: Json, heldout: Json | None) -> str:
    log, summary = train.get("log", []), train.get("summary", {})
    drawn = []
    if any(row["activations"] > 0 for row in log):
        note = "Mean squared error of the velocity on standardised activations; an untrained prior is near 2."
        drawn.append(figure(figures.training_curve(log), "Loss over training", note))
    if by_t := heldout["by_t"] if heldout else _bins(summary.get("heldout_loss_by_t", [])):
        band = " Band: 95% interval over activations." if "interval" in by_t[0] else ""
        note = f"Mean in {len(by_t)} bins of t.{band}"
        drawn.append(figure(figures.loss_by_t(by_t), "Held-out loss by noise level", note))
    facts = [f"Trained at {speed}."] if (speed := findings.rate(train)) else []
    if heldout:
        facts.append(f"Held-out loss {number(heldout['mean'])}, 95% interval {interval(heldout['interval'])}.")
    prose = f"<p>{text(' '.join(facts))}</p>\n" if facts else ""
    return prose + (f'<div class="pair">{"".join(drawn)}</div>' if drawn else "")


def _bins(losses: Sequence[Number]) -> list[Json]:
    """Losses by noise level as ``evaluate.json`` has them, without intervals."""
    n = len(losses)
    return [{"t": [i / n, (i + 1) / n], "loss": loss} for i, loss in enumerate(losses)]


def _distribution(evaluate: Json) -> str:
    content = []
    if rows := evaluate.get("distribution"):
        content += [
            "<p>How far activations lie from held-out real ones. A full Gaussian reaches the lower bound of the "
            "Fréchet distance by construction, because that distance sees two moments only, mean and covariance. "
            "That is why the other two distances are there: the sliced Wasserstein distance compares whole "
            "distributions along random directions, and the two-sample AUC is how well a classifier tells an "
            "activation from a real one (0.5: not at all; 1: always).</p>",
            _distances(rows, findings.lower_bound(evaluate)),
        ]
    if pca := evaluate.get("pca"):
        real, generated = figures.pca_scatter(pca)
        note = "Standardised, on the two leading principal components of the real ones, on equal axes."
        panels = f'<div class="pair">{real}{generated}</div>'
        content.append(figure(panels, "Real and generated activations", note, kind="wide"))
    return "\n".join(content)


def _distances(rows: Sequence[Json], bound: Number | None) -> str:
    header = ("Source", "Fréchet", "Mean part", "Covariance part", "Times lower bound", "Fréchet, raw")
    header += ("Sliced Wasserstein", "Two-sample AUC", "95% interval")
    cells = [
        [
            findings.source_name(row),
            *(number(row["frechet"][part]) for part in ("total", "mean", "covariance")),
            number(row["frechet"]["total"] / bound) if bound else MISSING,
            number(row["frechet_raw"]["total"]),
            number(row["sliced_wasserstein"]),
            number(row["two_sample_auc"]),
            interval(row.get("two_sample_interval")),
        ]
        for row in rows
    ]
    note = "Standardised activations unless it says raw. NFE: denoiser evaluations."
    return table("Distance from held-out real activations", note, header, cells)


def _delta_lm(delta: Json | None) -> str:
    if not delta:
        return ""
    rows = delta["rows"]
    names = [_replacement_name(row) for row in rows]
    prose = (
        "Every activation but the first of a document is replaced; attention sinks are let through. Shown is by how "
        "much that raises the next-token loss of the language model, which is "
        f"{number(delta['clean_loss'])} nats without replacement. The prior noises each activation to t and integrates "
        f"back with {findings.solver_name(delta)} and {delta['nfe']} denoiser evaluations. Measured on "
        f"{delta['documents']:,} held-out documents with {delta['tokens']:,} predicted tokens."
    )
    bars = figures.delta_bars(rows, names, [number(row["delta"]) for row in rows])
    note = f"Mean over {delta['weighted_by']}s; lines are 95% intervals over documents. Lower is better."
    header = ("Replacement", "Per token", "95% interval", "Per document", "95% interval")
    cells = [
        [name, *(shown for by in ("per_token", "per_document") for shown in _measured(row[by], "delta", "interval"))]
        for name, row in zip(names, rows, strict=True)
    ]
    exact = table("Added loss, nats", "The official definition is the mean per document.", header, cells)
    return _beside(prose, figure(bars, "Added next-token loss", note)) + exact


def _provenance(result: Json, parts: Json) -> str:
    facts = [(f"Time: {name}", duration(spent)) for name, part in parts.items() if (spent := findings.seconds(part))]
    if result["kind"] == "demo" and "wall_seconds" in result:
        facts.append(("Time: everything", duration(result["wall_seconds"])))
    if "seed" in result:
        facts.append(("Seed", result["seed"]))
    if "git" in result:
        facts.append(("Git revision", result["git"] or "not run from a checkout"))
    facts += [(f"Version: {name}", version) for name, version in result.get("versions", {}).items()]
    rows = "".join(f'<tr><th scope="row">{text(name)}</th><td>{text(value)}</td></tr>' for name, value in facts)
    blocks = {"Versions, seed and times": f'<table class="facts"><tbody>{rows}</tbody></table>'} if rows else {}
    configs = {**parts, "run": result} if result["kind"] == "demo" else parts
    for name, part in configs.items():
        if config := part.get("config"):
            blocks[f"Configuration: {name}"] = f"<pre>{text(json.dumps(config, indent=2))}</pre>"
    return "\n".join(f"<details><summary>{name}</summary>{block}</details>" for name, block in blocks.items())


def _beside(prose: str, drawn: str) -> str:
    return f'<div class="pair"><p>{text(prose)}</p>{drawn}</div>\n'


def _measured(row: Json, value: str, ends: str) -> tuple[str, str]:
    return number(row[value]), interval(row.get(ends))


def _replacement_name(row: Json) -> str:
    name = str(REPLACEMENTS.get(row["method"], row["method"]))
    return name if row["t_start"] is None else f"{name}, t = {row['t_start']:g}"
