"""Directions from texts and from chat responses: activations at one hookpoint, one row each, then an estimator.

A row is the mean over a span of tokens. The first position is never in it, nor are attention sinks: tokens whose norm
is over 10 times the median norm of their own text (not of the batch: a row depends on no other text).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from latentprior.data.activations import activations
from latentprior.data.chat import Conversation, Span, prompt_ids, response_span
from latentprior.data.sinks import sink_threshold
from latentprior.data.tokens import TokenBatch, encode, pad, padding_id
from latentprior.lm.hooks import Hookpoint
from latentprior.steer import estimate
from latentprior.steer.direction import Direction
from latentprior.steer.estimate import Labels
from latentprior.steer.traits import Trait
from latentprior.utils.errors import InputError, unknown
from latentprior.utils.random import keyed_generator, seed_of

Read = Literal["last", "mean"]
LabelledKind = Literal["difference_of_means", "probe", "random", "shuffled"]
PairedKind = Literal["pca", "difference_of_means"]


class SpanMeans(NamedTuple):
    x: Float[Tensor, "n d"]  # mean activation over a span of each text, float32
    norms: float  # sum of the norms at all positions but first ones and attention sinks, in a span or not
    positions: int


def mean_norm_of(*parts: SpanMeans) -> float:
    """Mean norm of an activation, the unit of strength."""
    return sum(part.norms for part in parts) / sum(part.positions for part in parts)


def text_activations(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    hookpoint: Hookpoint,
    *,
    read: Read = "last",
    max_length: int = 128,
    batch_tokens: int = 4096,
) -> SpanMeans:
    """Activations of `texts` at `hookpoint`, one row each and in their order: none is dropped, as rows match labels.

    Args:
        read: "last", the last token; "mean", the mean over all tokens but the first and attention sinks.
        max_length: texts are cut to this many tokens, the beginning-of-sequence token included.
        batch_tokens: most tokens of one forward pass, padding included.
    """
    if read not in get_args(Read):
        raise unknown("read", read, get_args(Read))
    if isinstance(texts, str) or not len(texts):
        raise InputError("texts must be a list of at least one string")
    if max_length < 2:
        raise InputError(f"max_length must be at least 2, got {max_length}")
    hookpoint.check(model)
    rows = encode(list(texts), tokenizer, max_length)
    if short := [i for i, row in enumerate(rows) if len(row) < 2]:
        few = f"{len(short)} of {len(rows)} texts have no token after the first position, which is never read"
        raise InputError(f"{few}: leave them out (the first is number {short[0]})")
    spans = [(len(row) - 1 if read == "last" else 1, len(row)) for row in rows]
    return _span_means(model, tokenizer, rows, spans, hookpoint, batch_tokens)


def response_activations(
    model: Any,
    tokenizer: Any,
    conversations: Sequence[Conversation],
    hookpoint: Hookpoint,
    *,
    max_length: int = 2048,
    batch_tokens: int = 4096,
) -> SpanMeans:
    """Mean activation over the text of each conversation's last response; what the chat template adds is context."""
    if not conversations:
        raise InputError("response activations need at least one conversation")
    hookpoint.check(model)
    rows, spans = [], []
    for i, conversation in enumerate(conversations):
        ids, (start, stop) = response_span(tokenizer, conversation, name=f"conversation {i}")
        if start >= max_length:
            raise InputError(f"the response of conversation {i} begins at token {start}, max_length is {max_length}")
        rows.append(ids[:max_length])
        spans.append((start, min(stop, max_length)))
    return _span_means(model, tokenizer, rows, spans, hookpoint, batch_tokens)


def persona_conversations(
    model: Any,
    tokenizer: Any,
    questions: Sequence[str],
    system_prompt: str | None,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    batch: int = 32,
) -> list[Conversation]:
    """The model's answers to `questions` under a system prompt (or none), as conversations of two or three messages.

    They are greedy at temperature 0, else drawn from the whole distribution; draws depend on `batch`.
    """
    if isinstance(questions, str) or not len(questions):
        raise InputError("questions must be a list of at least one string")
    if max_new_tokens < 1 or batch < 1 or not 0 <= temperature < math.inf:
        given = f"{max_new_tokens}, {batch} and {temperature}"
        raise InputError(f"max_new_tokens and batch must be at least 1 and temperature at least 0, got {given}")
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    prompts: list[Conversation] = [[*system, {"role": "user", "content": question}] for question in questions]
    rows = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "pad_token_id": padding_id(tokenizer)}
    options["do_sample"] = temperature > 0
    if temperature > 0:
        options |= {"temperature": temperature, "top_p": 1.0, "top_k": 0}
    answers: list[str] = []
    # `generate` draws from the global generator only.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        for begin in range(0, len(rows), batch):
            ids, mask, _ = pad(rows[begin : begin + batch], padding_id(tokenizer), "left")
            inputs = {"input_ids": ids.to(model.device), "attention_mask": mask.long().to(model.device)}
            output = model.generate(**inputs, **options)
            answers += tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    replies = [{"role": "assistant", "content": answer.strip()} for answer in answers]
    return [[*prompt, reply] for prompt, reply in zip(prompts, replies, strict=True)]


def persona_answers(
    model: Any, tokenizer: Any, trait: Trait, *, seed: int = 0, **options: Any
) -> tuple[list[Conversation], list[Conversation]]:
    """`persona_conversations` under every system prompt of a trait, and of its opposite; each has a seed of its own."""
    if not trait.positive or not trait.negative or not trait.questions:
        raise InputError(f"the trait {trait.name!r} needs positive and negative system prompts, and questions")
    sides: tuple[list[Conversation], list[Conversation]] = [], []
    for side, system_prompts in enumerate((trait.positive, trait.negative)):
        for i, prompt in enumerate(system_prompts):
            own = seed_of(keyed_generator(seed, side, i))
            sides[side].extend(persona_conversations(model, tokenizer, trait.questions, prompt, seed=own, **options))
    return sides


def persona_direction(
    model: Any,
    tokenizer: Any,
    trait: Trait,
    hookpoint: Hookpoint,
    *,
    answers: tuple[list[Conversation], list[Conversation]] | None = None,
    name: str | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    batch: int = 32,
    batch_tokens: int = 4096,
) -> Direction:
    """Difference of mean response activations between system prompts for a trait and for its opposite.

    The protocol of persona vectors (Chen et al., 2025): the model answers every question under every system prompt,
    and a response's activation is the mean over its tokens. Their filter, which keeps only answers that a judge finds
    to follow the system prompt, is not applied. Empty answers are left out and counted in the provenance. `answers`
    are what `persona_answers` gave with the same options, where they are there already.
    """
    hookpoint.check(model)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "batch": batch}
    sides, empty = [], 0
    for side in answers or persona_answers(model, tokenizer, trait, seed=seed, **options):
        given = [conversation for conversation in side if conversation[-1]["content"]]
        if not given:
            raise InputError(f"the model gave only empty answers for the trait {trait.name!r}: raise max_new_tokens")
        sides.append(response_activations(model, tokenizer, given, hookpoint, batch_tokens=batch_tokens))
        empty += len(side) - len(given)
    positive, negative = (side.x for side in sides)
    vector = estimate.mean_difference(positive, negative)
    counts = {"positive": len(positive), "negative": len(negative), "empty": empty}
    made: dict[str, Any] = {"trait": trait.name, **counts, "read": "response", "seed": seed, **options}
    return Direction.of(vector, hookpoint, name or trait.name, "persona", mean_norm=mean_norm_of(*sides), **made)


def labelled_direction(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    labels: Labels,
    hookpoint: Hookpoint,
    *,
    kind: LabelledKind = "difference_of_means",
    read: Read = "last",
    name: str,
    seed: int = 0,
    l2: float = 1.0,
    max_length: int = 128,
    batch_tokens: int = 4096,
) -> Direction:
    """The direction from texts of label 0 to those of label 1, or a control for it.

    Args:
        kind: "difference_of_means"; "probe", the normal of a logistic probe; and two controls: "shuffled", the
            difference of means after the labels were permuted, and "random", for which no text is read.
        l2: penalty of the probe, see `estimate.probe_normal`.
        read, max_length, batch_tokens: see `text_activations`.
    """
    if kind not in get_args(LabelledKind):
        raise unknown("kind of direction from labelled texts", kind, get_args(LabelledKind))
    hookpoint.check(model)
    if kind == "random":
        return Direction.of(estimate.random_direction(hookpoint.width, seed), hookpoint, name, kind, seed=seed)
    positive = estimate.binary_labels(labels, len(texts))
    options: dict[str, Any] = {"read": read, "max_length": max_length}
    found = text_activations(model, tokenizer, texts, hookpoint, batch_tokens=batch_tokens, **options)
    made: dict[str, Any] = {"positive": int(positive.sum()), "negative": int((~positive).sum()), **options}
    if kind == "probe":
        vector, made["l2"] = estimate.probe_normal(found.x, positive, l2=l2), l2
    elif kind == "shuffled":
        vector, made["seed"] = estimate.shuffled_mean_difference(found.x, positive, seed), seed
    else:
        vector = estimate.mean_difference(found.x[positive], found.x[~positive])
    return Direction.of(vector, hookpoint, name, kind, mean_norm=mean_norm_of(found), **made)


def paired_direction(
    model: Any,
    tokenizer: Any,
    positives: Sequence[str],
    negatives: Sequence[str],
    hookpoint: Hookpoint,
    *,
    kind: PairedKind = "pca",
    read: Read = "last",
    name: str,
    max_length: int = 128,
    batch_tokens: int = 4096,
) -> Direction:
    """The direction from `negatives` to `positives`, whose i-th texts belong together (`paired_pca` by default).

    For read, max_length and batch_tokens see `text_activations`.
    """
    if kind not in get_args(PairedKind):
        raise unknown("kind of direction from pairs", kind, get_args(PairedKind))
    if len(positives) != len(negatives):
        raise InputError(f"pairs need as many positives as negatives, got {len(positives)} and {len(negatives)}")
    pairs, texts = len(positives), [*positives, *negatives]
    options: dict[str, Any] = {"read": read, "max_length": max_length}
    found = text_activations(model, tokenizer, texts, hookpoint, batch_tokens=batch_tokens, **options)
    sides = found.x[:pairs], found.x[pairs:]
    vector = estimate.paired_pca(*sides) if kind == "pca" else estimate.mean_difference(*sides)
    return Direction.of(vector, hookpoint, name, kind, mean_norm=mean_norm_of(found), pairs=pairs, **options)


def _span_means(
    model: Any, tokenizer: Any, rows: list[list[int]], spans: list[Span], hookpoint: Hookpoint, batch_tokens: int
) -> SpanMeans:
    """A row of token ids gives one row; sinks count only where its span holds nothing else."""
    means, total, positions = torch.empty(len(rows), hookpoint.width), 0.0, 0
    batches = _batches(rows, padding_id(tokenizer), batch_tokens)
    for batch in activations(model, batches, [hookpoint.layer], side=hookpoint.side):
        norms = batch.norms()
        for doc in batch.doc.unique().tolist():
            start, stop = spans[doc]
            mine = batch.doc == doc
            ordinary = mine & (norms <= sink_threshold(float(norms[mine].median())))
            inside = mine & (batch.position >= start) & (batch.position < stop)
            chosen = inside & ordinary
            means[doc] = batch.x[chosen if chosen.any() else inside].double().mean(dim=0)
            total, positions = total + float(norms[ordinary].double().sum()), positions + int(ordinary.sum())
    return SpanMeans(means, total, positions)


def _batches(rows: list[list[int]], filler: int, batch_tokens: int) -> Iterator[TokenBatch]:
    if batch_tokens < 1:
        raise InputError(f"batch_tokens must be at least 1, got {batch_tokens}")
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    while order:
        size = max(1, batch_tokens // len(rows[order[0]]))
        chosen, order = order[:size], order[size:]
        ids, mask, position = pad([rows[i] for i in chosen], filler, "right")
        yield TokenBatch.whole(ids, mask, torch.tensor(chosen), position, 0)
