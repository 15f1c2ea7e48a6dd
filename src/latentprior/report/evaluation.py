"""What a page says of a prior: its training, the distribution of its samples, and the loss of the language model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from latentprior.report import figures
from latentprior.report.blocks import NOTHING, Headline, figure, pair, prose, stack, table
from latentprior.report.templating import lines, macros, paragraph
from latentprior.utils.formatting import MISSING, Number, duration, interval, number, with_intervals

Json = Mapping[str, Any]

_TEXTS = macros("evaluation.html.jinja")
SOLVERS = {"euler": "Euler", "midpoint": "midpoint", "heun": "Heun", "ab2": "AB2"}
SOURCES = {
    "real": "Real activations (lower bound)",
    "gaussian-full": "Gaussian, full covariance",
    "gaussian-diagonal": "Gaussian, diagonal covariance",
    "sae": "SAE reconstructions",
}
REPLACEMENTS = {
    "prior": "Prior",
    "gaussian": "Gaussian posterior mean",
    "noise": "Noise alone",
    "mean": "Mean activation",
    "sae": "SAE reconstruction",
}


def training(train: Json, evaluate: Json) -> Markup:
    """Loss over training and by noise level, of an evaluation rather than of training; or nothing."""
    heldout = evaluate.get("heldout_loss")
    log, summary = train.get("log", []), train.get("summary", {})
    drawn = []
    if any(row["activations"] > 0 for row in log):
        note = "Mean squared error of the velocity on standardised activations; an untrained prior is near 2."
        drawn.append(figure("Loss over training", note, figures.training_curve(log)))
    if by_t := heldout["by_t"] if heldout else _bins(summary.get("heldout_loss_by_t", [])):
        note = f"Mean in {len(by_t)} bins of t."
        note += " Band: 95% interval over activations." if "interval" in by_t[0] else ""
        others = {row["prior"]: row["heldout_loss"]["by_t"] for row in evaluate.get("compared", [])}
        drawn.append(figure("Held-out loss by noise level", note, figures.loss_by_t(by_t, others)))
    said = paragraph(_TEXTS.training(rate(train), heldout, evaluate.get("compared", [])))
    return stack(prose(said) if said else NOTHING, pair(*drawn), velocity(evaluate))


def velocity(evaluate: Json) -> Markup:
    """The velocity's error at single noise levels beside the Gaussian's; nothing without them."""
    if not (rows := evaluate.get("velocity")):
        return NOTHING
    header = ("t", "Prior", "Gaussian, full covariance", "Prior less Gaussian", "95% interval")
    exact = [
        [
            f"{row['t']:g}",
            number(row["prior"]),
            number(row["gaussian"]),
            *with_intervals((row["difference"], row["interval"])),
        ]
        for row in rows
    ]
    note = "Mean squared error on held-out activations, every time with the same noise; t = 0 is data, t = 1 is noise."
    return table("Velocity at single noise levels", note, header, exact)


def _bins(losses: Sequence[Number]) -> list[Json]:
    """Losses by noise level as ``evaluate.json`` has them, without intervals."""
    n = len(losses)
    return [{"t": [i / n, (i + 1) / n], "loss": loss} for i, loss in enumerate(losses)]


def distribution(evaluate: Json) -> Markup:
    """Distances from real activations, and principal components."""
    content = []
    if rows := evaluate.get("distribution"):
        content += [prose(paragraph(_TEXTS.distribution())), _distances(rows, lower_bound(evaluate))]
    if pca := evaluate.get("pca"):
        note = "Standardised, on the two leading principal components of the real ones, on equal axes."
        content.append(figure("Real and generated activations", note, *figures.pca_scatter(pca)))
    return stack(*content)


def _distances(rows: Sequence[Json], bound: Number | None) -> Markup:
    header = ("Source", "Fréchet", "Mean part", "Covariance part", "Times lower bound", "Fréchet, raw")
    header += ("Sliced Wasserstein", "Two-sample AUC", "95% interval")
    exact = [
        [
            source_name(row),
            *(number(row["frechet"][part]) for part in ("total", "mean", "covariance")),
            number(row["frechet"]["total"] / bound) if bound else MISSING,
            number(row["frechet_raw"]["total"]),
            number(row["sliced_wasserstein"]),
            *with_intervals((row["two_sample_auc"], row.get("two_sample_interval"))),
        ]
        for row in rows
    ]
    note = "Standardised activations unless it says raw. NFE: denoiser evaluations."
    return table("Distance from held-out real activations", note, header, exact)


def language_model_loss(evaluate: Json) -> Markup:
    """Delta LM loss of the prior and of other replacements; nothing without them."""
    if not (delta := evaluate.get("delta_lm")):
        return NOTHING
    rows = delta["rows"]
    names = [_replacement_name(row) for row in rows]
    text = paragraph(_TEXTS.language_model_loss(delta, solver_name(delta)))
    bars = figures.delta_bars(rows, names, [number(row["delta"]) for row in rows])
    note = f"Mean over {delta['weighted_by']}s; lines are 95% intervals over documents. Lower is better."
    header = ("Replacement", "Per token", "95% interval", "Per document", "95% interval")
    exact = [
        [
            name,
            *with_intervals(*((row[by]["delta"], row[by].get("interval")) for by in ("per_token", "per_document"))),
        ]
        for name, row in zip(names, rows, strict=True)
    ]
    losses = table("Added loss, nats", "The official definition is the mean per document.", header, exact)
    return stack(pair(prose(text), figure("Added next-token loss", note, bars)), losses)


def _replacement_name(row: Json) -> str:
    compared = row["method"] == "compared"
    name = f"Prior {row['prior']}" if compared else str(REPLACEMENTS.get(row["method"], row["method"]))
    return name if row["t_start"] is None else f"{name}, t = {row['t_start']:g}"


def sentences(parts: Json) -> list[Markup]:
    """The result in plain words, a sentence for each part and measure."""
    train, evaluate = parts.get("train", {}), parts.get("evaluate", {})
    delta = delta_lm(evaluate, "prior")
    others = list(references(evaluate, delta)) if delta else []
    compared = evaluate.get("compared", [])
    generated = [row for row in evaluate.get("distribution", []) if row["source"] == "compared"]
    said = (
        _TEXTS.sentences(parts.get("record"), train.get("summary"), seconds(train)),
        _TEXTS.beside(parts.get("shipped"), compared),
        _TEXTS.quality(delta, others, frechet(evaluate), generated),
    )
    return [line for written in said for line in lines(written)]


def headlines(parts: Json) -> Iterator[Headline]:
    """What a prior achieves, in figures worth large type, the most telling first."""
    evaluate, summary = parts.get("evaluate", {}), parts.get("train", {}).get("summary", {})
    if heldout := evaluate.get("heldout_loss"):
        others = [f"; {row['prior']} {number(row['heldout_loss']['mean'])}" for row in evaluate.get("compared", [])]
        note = f"95% interval {interval(heldout['interval'])}{''.join(others)}"
        yield Headline("Held-out loss", number(heldout["mean"]), "", note)
    elif "heldout_loss" in summary:
        yield Headline("Held-out loss", number(summary["heldout_loss"]), "", "mean over all noise levels")
    if row := delta_lm(evaluate, "prior"):
        others = [f"{name} {number(other['delta'])}" for name, other in references(evaluate, row)]
        yield Headline("Delta LM loss", number(row["delta"]), "nats", "; ".join(others))
    if found := frechet(evaluate):
        bound, best = found
        note = f"{source_name(best)}, best of {len(prior_rows(evaluate))}; a full Gaussian is near 1 by construction"
        yield Headline("Fréchet over lower bound", number(best["frechet"]["total"] / bound), "times", note)


def further_headlines(parts: Json) -> Iterator[Headline]:
    """What takes the large type's place where there is less to tell: another distance, and amounts."""
    record, train = parts.get("record"), parts.get("train", {})
    if found := frechet(parts.get("evaluate", {})):
        best = found[1]
        note = f"{source_name(best)}; at 0.5 it cannot be told from real"
        yield Headline("Two-sample AUC", number(best["two_sample_auc"]), "", note)
    if summary := train.get("summary"):
        yield Headline("Trained on", f"{summary['activations']:,}", "activations", f"{summary['distinct']:,} distinct")
    if spent := seconds(train):
        yield Headline("Training time", duration(spent), "", rate(train))
    if record:
        yield Headline("Recorded", f"{record['rows']:,}", "activations", f"from {record['documents']:,} documents")


def prior_rows(evaluate: Json) -> list[Json]:
    """The distances of the prior's samples, a row for each sampler."""
    return [row for row in evaluate.get("distribution", []) if row["source"] == "prior"]


def lower_bound(evaluate: Json) -> Number | None:
    """Standardised Fréchet distance between two sets of real activations."""
    rows = evaluate.get("distribution", [])
    return next((row["frechet"]["total"] for row in rows if row["source"] == "real"), None)


def frechet(evaluate: Json) -> tuple[Number, Json] | None:
    """The lower bound, and the row of the sampler that comes nearest to it."""
    bound, rows = lower_bound(evaluate), prior_rows(evaluate)
    return (bound, min(rows, key=lambda row: row["frechet"]["total"])) if bound and rows else None


def delta_lm(evaluate: Json, method: str, t_start: Number = 0.5) -> Json | None:
    """Delta LM loss of a method at `t_start`, else at its first noise level."""
    rows = [row for row in evaluate.get("delta_lm", {}).get("rows", []) if row["method"] == method]
    return next((row for row in rows if row["t_start"] == t_start), rows[0] if rows else None)


def references(evaluate: Json, prior: Json) -> Iterator[tuple[str, Json]]:
    """What the prior's delta LM loss is read against, at the same noise level; other priors by their names."""
    for row in evaluate["delta_lm"]["rows"]:
        if row["method"] == "compared" and row["t_start"] == prior["t_start"]:
            yield row["prior"], row
    for method, name in (("gaussian", "a full Gaussian"), ("noise", "noise alone")):
        if row := delta_lm(evaluate, method, prior["t_start"]):
            yield name, row


def seconds(part: Json) -> Number | None:
    """How long a part took; where it says so for each phase, over all of them."""
    spent = part.get("seconds", part.get("wall_seconds"))
    return part.get("wall_seconds", sum(spent.values())) if isinstance(spent, Mapping) else spent


def rate(train: Json) -> str:
    """Training speed, where both amount and time are known."""
    spent, summary = seconds(train), train.get("summary")
    return f"{number(summary['activations'] / spent)} activations a second" if spent and summary else ""


def source_name(row: Json) -> str:
    """Where the activations of a row of distances come from."""
    if row["source"] not in ("prior", "compared"):
        return str(SOURCES.get(row["source"], row["source"]))
    name = f"Prior {row['prior']}" if row["source"] == "compared" else "Prior"
    return f"{name}, {solver_name(row)}, {row['nfe']}\N{NO-BREAK SPACE}NFE"


def solver_name(row: Json) -> str:
    return str(SOLVERS.get(row["solver"], row["solver"]))
