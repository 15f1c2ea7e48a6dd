"""Steered generation at several strengths, plain and repaired, and what it does to concept and fluency."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentprior.errors import InputError
from latentprior.evaluate.bootstrap import bootstrap_interval
from latentprior.prior import GLP
from latentprior.progress import Report, silent
from latentprior.repair import PositionNoise, hookpoints_on
from latentprior.rewrite import Site, rewrite
from latentprior.tokens import encode, pad, padding_id

Judge = Callable[[Sequence[str]], np.ndarray]  # texts -> probability of the concept [N]
Method = Literal["plain", "repaired", "paired"]
METHODS: tuple[Method, ...] = ("plain", "repaired", "paired")


@dataclass(frozen=True)
class Continuations:
    """Generated text of one method, a row for each (strength, prompt)."""

    texts: list[str]
    ids: Tensor
    """[S * P, new] token ids; rows are strength-major."""
    retention: np.ndarray
    """[S * P] mean share of the edit's component along the direction that is left after repair."""


def sweep(
    glp: GLP,
    model: Any,
    tokenizer: Any,
    direction: Tensor,
    prompts: Sequence[str],
    judge: Judge,
    *,
    strengths: Sequence[float],
    methods: Sequence[Method] = METHODS,
    layer: int | None = None,
    new_tokens: int = 20,
    t_start: float = 0.5,
    steps: int = 4,
    seed: int = 0,
    report: Report = silent,
) -> dict[str, Any]:
    """Steer greedy continuations of `prompts` along `direction` and judge them (paper, on-manifold steering).

    The edit ``a + r |a| w`` (r the strength, |a| the layer's mean activation norm, w of unit norm) is applied at the
    last position of every decoding step: "plain"; then repaired, as in the paper ("repaired") or against the unedited
    activation ("paired"). All strengths run in one batch.

    Args:
        judge: probability of the concept for each text.
        strengths: in units of the mean activation norm.
        t_start, steps: of the repair.
        seed: of the repair's noise.
        report: gets generation steps done.

    Returns:
        "unsteered" and a row for each method and strength: concept, conditional negative log-likelihood of the
        continuation under the unsteered model, distinct bigrams, retention; with 95% bootstrap intervals over prompts.

    Raises:
        InputError: no prompts or strengths, or a prior of another model or without the layer's mean norm.
    """
    if not prompts or not strengths:
        raise InputError("a sweep needs prompts and strengths")
    hookpoint = hookpoints_on(glp.hookpoints, model, layer, check_model=True)[0]
    mean_norm = float(glp.normalizer.mean_norm[glp.normalizer.rows(layer)])
    if not mean_norm > 0:
        raise InputError("this prior does not know its layer's mean activation norm, the unit of strength")
    inputs = _prompt_inputs(tokenizer, prompts)
    edit = torch.outer(torch.tensor([r * mean_norm for r in strengths]).repeat_interleave(len(prompts)), direction)

    def generated(rewriter: Callable[[Tensor, Site], Tensor] | None, copies: int) -> Tensor:
        batch = {name: value.repeat(copies, 1) for name, value in inputs.items()}
        options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
        if rewriter is None:
            out = model.generate(**batch, **options)
        else:
            with rewrite(model, {hookpoint.layer: rewriter}, positions="last", side=hookpoint.side):
                out = model.generate(**batch, **options)
        return out[:, inputs["input_ids"].shape[1] :]

    total = len(methods) + 1
    clean = Continuations(*_decoded(tokenizer, generated(None, 1)), np.ones(len(prompts)))
    report(1, total, {})
    unsteered = _figures(model, inputs, clean, judge, slice(None), seed)
    rows, examples = [], _examples(clean, prompts, "unsteered", 0.0, slice(None))
    for done, method in enumerate(methods):
        repair = _Repair(glp, edit, method, None if layer is None else hookpoint.layer, t_start, steps, seed)
        ids = generated(repair, len(strengths))
        found = Continuations(*_decoded(tokenizer, ids), repair.retention())
        for i, strength in enumerate(strengths):
            part = slice(i * len(prompts), (i + 1) * len(prompts))
            rows.append({"method": method, "strength": strength, **_figures(model, inputs, found, judge, part, seed)})
            examples += _examples(found, prompts, method, strength, part)
        report(done + 2, total, {})
    return {
        "hookpoint": hookpoint.to_dict(),
        "mean_norm": mean_norm,
        "t_start": t_start,
        "steps": steps,
        "nfe": glp.nfe(steps, t_start=t_start),
        "solver": "euler",
        "prompts": len(prompts),
        "new_tokens": new_tokens,
        "unsteered": unsteered,
        "rows": rows,
        "examples": examples,
    }


class _Repair:
    """The rewriter of one method; measures what is left of the edit along its direction."""

    def __init__(
        self, glp: GLP, edit: Tensor, method: Method, layer: int | None, t_start: float, steps: int, seed: int
    ) -> None:
        self.glp, self.edit, self.method, self.layer = glp, edit, method, layer
        self.t_start, self.steps, self.noise = t_start, steps, PositionNoise(seed)
        self.kept = torch.zeros(len(edit))
        self.seen = torch.zeros(len(edit))

    def __call__(self, x: Tensor, site: Site) -> Tensor:
        edit = self.edit[site.row]
        edited = x.float() + edit
        result = edited
        if self.method != "plain":
            result = self.glp.project(
                edited,
                reference=x.float() if self.method == "paired" else None,
                t_start=self.t_start,
                steps=self.steps,
                noise=self.noise(site, x.shape[-1]),
                layer=self.layer,
            )
        share = ((result - x.float()) * edit).sum(dim=1) / edit.square().sum(dim=1)
        self.kept.index_add_(0, site.row, share)
        self.seen.index_add_(0, site.row, torch.ones(len(site.row)))
        return result

    def retention(self) -> np.ndarray:
        return (self.kept / self.seen).numpy()


def _prompt_inputs(tokenizer: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Left-padded prompts, BOS first."""
    ids, mask, _ = pad(encode(list(prompts), tokenizer), padding_id(tokenizer), "left")
    return {"input_ids": ids, "attention_mask": mask.long()}


def _decoded(tokenizer: Any, ids: Tensor) -> tuple[list[str], Tensor]:
    return tokenizer.batch_decode(ids, skip_special_tokens=True), ids


def _figures(
    model: nn.Module, inputs: dict[str, Tensor], found: Continuations, judge: Judge, part: slice, seed: int
) -> dict[str, Any]:
    """Concept and fluency of the continuations of all prompts at one strength."""
    concept = judge(found.texts[part])
    nll = conditional_nll(model, inputs, found.ids[part])
    return {
        "concept": float(concept.mean()),
        "concept_interval": bootstrap_interval(concept, seed=seed),
        "nll": float(nll.mean()),
        "nll_interval": bootstrap_interval(nll, seed=seed),
        "distinct_2": float(np.mean([distinct_ngrams(row, 2) for row in found.ids[part].tolist()])),
        "retention": float(found.retention[part].mean()),
    }


@torch.no_grad()
def conditional_nll(model: nn.Module, inputs: dict[str, Tensor], ids: Tensor) -> np.ndarray:
    """Mean negative log-likelihood [P] in nats a token of continuations `ids` [P, new] under the plain model."""
    attention = torch.cat([inputs["attention_mask"], torch.ones_like(ids)], dim=1)
    logits = model(
        input_ids=torch.cat([inputs["input_ids"], ids], dim=1),
        attention_mask=attention,
        logits_to_keep=ids.shape[1] + 1,
    ).logits[:, :-1]
    losses = F.cross_entropy(logits.float().flatten(0, 1), ids.flatten(), reduction="none")
    return losses.view(ids.shape).mean(dim=1).double().numpy()


def distinct_ngrams(ids: Sequence[int], n: int) -> float:
    """Share of the n-grams of a text that are distinct; 1 if it is shorter than n."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def _examples(
    found: Continuations, prompts: Sequence[str], method: str, strength: float, part: slice, most: int = 3
) -> list[dict[str, Any]]:
    return [
        {"prompt": prompt, "method": method, "strength": strength, "text": continuation}
        for prompt, continuation in list(zip(prompts, found.texts[part], strict=True))[:most]
    ]
