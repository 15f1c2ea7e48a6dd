"""The page of a result: which sections, sentences and leading figures it has, each from one part of the result."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import UndefinedError
from markupsafe import Markup

from latentprior.report import evaluation, probing, scaling, steering, templating
from latentprior.report.blocks import Headline, code, facts, fold, stack
from latentprior.utils.errors import InputError, unknown
from latentprior.utils.files import replace_text
from latentprior.utils.formatting import duration

Json = Mapping[str, Any]

KINDS = ("demo", "train", "evaluate", "sweep", "frontier", "probe")
DEMO_PARTS = ("record", "train", "shipped", "evaluate", "steer")
HEADLINES = 4
SUBJECTS = {"sweep": "Scaling of latent priors", "probe": "1-D probing", "frontier": "Steering"}


def write_report(result: Json, path: str | Path) -> Path:
    """Draw a result as one HTML file that needs no network and no script.

    Args:
        result: of kind "demo" with any of the parts "record", "train", "shipped" (the installed "prior", or how to
            "install" it), "evaluate" and "steer", or one part alone: what is in ``evaluate.json``, ``sweep.json``,
            ``steer.json`` (kind "frontier"), ``probe.json``, or ``train.json`` (add the lines of ``log.jsonl`` as "log"
            for its curve).
        path: the file; its folder is made if need be.
    """
    path = Path(path)
    page = render(result)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, page)
    return path


def render(result: Json) -> str:
    """The page of `write_report` as text; the same result always gives the same text."""
    result = templating.printable(result)  # drawings show its names too
    kind = result.get("kind")
    if kind not in KINDS:
        raise unknown("kind of result", kind, KINDS)
    parts = {name: result[name] for name in DEMO_PARTS if result.get(name)} if kind == "demo" else {kind: result}
    try:
        return templating.render(
            "page.html.jinja",
            kind=kind,
            title=_title(parts),
            sentences=[sentence for module, part in _told_by(parts) for sentence in module.sentences(part)],
            headlines=list(islice(_headlines(parts), HEADLINES)),
            sections={name: content for name, content in _sections(result, parts).items() if content},
        )
    except (KeyError, IndexError, UndefinedError) as error:
        raise InputError(f"this {kind} result lacks a figure: {error}") from error


def _title(parts: Json) -> str:
    trained_on = parts.get("train", {}).get("settings", {}).get("hookpoints", [])
    found = [*(part.get("hookpoint") for part in parts.values()), *trained_on[:1]]
    hookpoint = next(filter(None, found), None)
    subject = next((subject for part, subject in SUBJECTS.items() if part in parts), "A latent prior")
    return f"{subject} of {hookpoint['model']}, layer {hookpoint['layer']}" if hookpoint else subject


def _sections(result: Json, parts: Json) -> dict[str, Markup]:
    evaluate, steer = parts.get("evaluate", {}), _steering(parts)
    return {
        "Training": evaluation.training(parts.get("train", {}), evaluate),
        "Distribution": evaluation.distribution(evaluate),
        "Language model loss": evaluation.language_model_loss(evaluate),
        "Steering": steering.section(steer),
        "Texts": steering.texts(steer),
        "Scaling": scaling.section(parts.get("sweep", {})),
        "Probing": probing.section(parts.get("probe", {})),
        "Provenance": _provenance(result, parts),
    }


def _told_by(parts: Json) -> list[tuple[Any, Json]]:
    """The modules that say something of a result, with the part that each of them reads."""
    others = [(scaling, parts.get("sweep", {})), (probing, parts.get("probe", {})), (steering, _steering(parts))]
    return [(evaluation, parts), *others]


def _headlines(parts: Json) -> Iterator[Headline]:
    for module, part in _told_by(parts):
        yield from module.headlines(part)
    yield from evaluation.further_headlines(parts)


def _steering(parts: Json) -> Json:
    """The steering experiment, a part of a demo or alone."""
    return parts.get("steer") or parts.get("frontier", {})


def _provenance(result: Json, parts: Json) -> Markup:
    seconds = {name: evaluation.seconds(part) for name, part in parts.items()}
    rows: list[tuple[str, Any]] = [(f"Time: {name}", duration(spent)) for name, spent in seconds.items() if spent]
    if result["kind"] == "demo" and "wall_seconds" in result:
        rows.append(("Time: everything", duration(result["wall_seconds"])))
    if "seed" in result:
        rows.append(("Seed", result["seed"]))
    if "git" in result:
        rows.append(("Git revision", result["git"] or "not run from a checkout"))
    rows += [(f"Version: {name}", version) for name, version in result.get("versions", {}).items()]
    configured = {**parts, "run": result} if result["kind"] == "demo" else parts
    configs = {name: part["config"] for name, part in configured.items() if part.get("config")}
    return stack(
        fold("Versions, seed and times", facts(rows)),
        *(fold(f"Configuration: {name}", code(json.dumps(config, indent=2))) for name, config in configs.items()),
    )
