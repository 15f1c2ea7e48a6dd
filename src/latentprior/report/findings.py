"""What a result says: its leading figures, in sentences and in large type, and the rules by which they are chosen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from latentprior.report.markup import Number, duration, interval, number

Json = Mapping[str, Any]

PARTS = ("record", "train", "evaluate", "steer")
SUBJECTS = {"sweep": "Scaling of latent priors", "probe": "1-D probing", "frontier": "Steering"}
SOLVERS = {"euler": "Euler", "midpoint": "midpoint", "heun": "Heun", "ab2": "AB2"}
SOURCES = {
    "real": "Real activations (lower bound)",
    "gaussian-full": "Gaussian, full covariance",
    "gaussian-diagonal": "Gaussian, diagonal covariance",
    "sae": "SAE reconstructions",
}


class Headline(NamedTuple):
    """One figure in large type."""

    label: str
    value: str
    unit: str
    note: str


def title(parts: Json) -> str:
    """Of which model and layer, where the result says so."""
    trained_on = parts.get("train", {}).get("settings", {}).get("hookpoints", [])
    found = [*(part.get("hookpoint") for part in parts.values()), *trained_on[:1]]
    hookpoint = next(filter(None, found), None)
    subject = next((subject for part, subject in SUBJECTS.items() if part in parts), "A latent prior")
    return f"{subject} of {hookpoint['model']}, layer {hookpoint['layer']}" if hookpoint else subject


def sentences(parts: Json) -> Iterator[str]:
    """The result in plain words, a sentence for each part and measure."""
    record, train, evaluate = (parts.get(name, {}) for name in ("record", "train", "evaluate"))
    if record:
        hookpoint, left_out = record["hookpoint"], record["left_out"]
        beyond = (
            f" {left_out['cut_documents']:,} documents are cut, by {left_out['cut_tokens']:,} tokens in all."
            if left_out.get("cut_tokens")  # demos from before documents were counted lack it
            else ""
        )
        yield (
            f"Recorded {record['rows']:,} activations of {hookpoint['width']:,} dimensions from "
            f"{record['documents']:,} documents, at the {hookpoint['side']} of block {hookpoint['layer']} of "
            f"{hookpoint['model']}; {left_out['sinks']:,} attention sinks and {left_out['nonfinite']:,} rows that were "
            f"not finite are left out.{beyond}"
        )
    if summary := train.get("summary"):
        took = f", in {duration(spent)}" if (spent := seconds(train)) else ""
        loss = f"; its held-out loss is {number(summary['heldout_loss'])}" if "heldout_loss" in summary else ""
        yield (
            f"The prior was trained on {summary['activations']:,} activations, {summary['distinct']:,} of them "
            f"distinct{took}{loss}."
        )
    if row := delta_lm(evaluate, "prior"):
        others = [f"{number(other['delta'])} with {name}" for name, other in references(evaluate, row)]
        against = f" ({', '.join(others)})" if others else ""
        yield (
            f"Noising every activation to t = {row['t_start']:g} and letting the prior repair it adds "
            f"{number(row['delta'])} nats to the next-token loss of the language model{against}."
        )
    if found := frechet(evaluate):
        bound, best = found
        yield (
            f"Generated activations lie at a standardised Fréchet distance of {number(best['frechet']['total'])} "
            f"from real ones; two sets of real ones lie {number(bound)} apart."
        )


def headlines(parts: Json) -> Iterator[Headline]:
    """What a prior achieves, in figures worth large type, the most telling first."""
    evaluate, summary = parts.get("evaluate", {}), parts.get("train", {}).get("summary", {})
    if heldout := evaluate.get("heldout_loss"):
        yield Headline("Held-out loss", number(heldout["mean"]), "", f"95% interval {interval(heldout['interval'])}")
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
    """What the prior's delta LM loss is read against, at the same noise level."""
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
    if row["source"] != "prior":
        return str(SOURCES.get(row["source"], row["source"]))
    return f"Prior, {solver_name(row)}, {row['nfe']}\N{NO-BREAK SPACE}NFE"


def solver_name(row: Json) -> str:
    return str(SOLVERS.get(row["solver"], row["solver"]))
