"""The checks: each gives the figures of its line, or raises `InputError` with what is wrong in plain words."""

from __future__ import annotations

import platform
import resource
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from latentprior.data.activations import activations, model_inputs
from latentprior.data.sinks import SINK_FACTOR, sink_threshold
from latentprior.data.tokens import TokenBatch, encode, pad, padding_id
from latentprior.doctor.subject import (
    PUSH,
    TEXTS,
    TOLERANCE,
    Generated,
    Identity,
    Subject,
    dtype_name,
    in_float32,
    in_words,
    logit_distance,
    require_edits,
    require_equal,
)
from latentprior.lm.hooks import Hookpoint, capture, find_blocks
from latentprior.prior.loading import packages_of
from latentprior.prior.repair import attach, hookpoints_on
from latentprior.utils.chips import device_memory, time_on
from latentprior.utils.devices import fast_dtype, resolve_device
from latentprior.utils.errors import InputError
from latentprior.utils.provenance import versions

SPEED = (4, 128)  # rows and tokens of a timed forward pass
SECONDS = 0.3  # that are timed at least
RECORDED = {torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 2e-3}  # from the hidden state, over its norm


def _versions(subject: Subject) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions().items()) + f"; {platform.platform()}"


def _device(subject: Subject) -> str:
    device = resolve_device(subject.device)
    if device.type == "cuda":
        what = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    else:
        what = f"{platform.machine()}, {torch.get_num_threads()} threads"
    return f"{device} ({what}), {device_memory(device) / 2**30:.0f} GiB; fast in {dtype_name(fast_dtype(device))}"


def _language_model(subject: Subject) -> str:
    model, tokenizer = subject.llm
    if model.training:
        raise InputError("the model is in training mode: call model.eval() first")
    bos = "no BOS token" if tokenizer.bos_token is None else f"BOS {tokenizer.bos_token!r}"
    kind = f"{type(model).__name__} {model.config._name_or_path}"
    return f"{kind}: {_millions(model)}, {dtype_name(model.dtype)} on {model.device}; {bos}"


def _millions(module: torch.nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:,.1f} M parameters"


def _blocks(subject: Subject) -> str:
    hookpoint, blocks = subject.hookpoint, find_blocks(subject.model)
    kind, path = type(blocks[subject.layer]).__name__, hookpoint.path.rpartition(".")[0]
    return f"{len(blocks)} at {path} ({kind}), width {hookpoint.width}; layer {subject.layer} is examined"


def _prior(subject: Subject) -> str:
    subject.prior = glp = subject.load_prior()
    packages = "".join(f"{name} {version}; " for name, version in packages_of([glp]).items())
    return f"{packages}{_millions(glp.denoiser)}; {', '.join(map(str, glp.hookpoints)) or 'no hookpoint'}"


def _prior_fits(subject: Subject) -> str:
    return "model and width are those of " + ", ".join(h.path or f"layer {h.layer}" for h in _hookpoints(subject))


def _hookpoints(subject: Subject) -> list[Hookpoint]:
    """The prior's, at the layer asked for if there is one."""
    assert subject.prior is not None
    return hookpoints_on(subject.prior.hookpoints, subject.model, subject.wanted_layer, check_model=True)


@torch.no_grad()
def _recording(subject: Subject) -> str:
    depth = len(find_blocks(subject.model))
    with capture(subject.model, range(depth)) as captured:
        inputs = model_inputs(subject.model, subject.batch)
        given = subject.model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
    if len(captured) < depth:
        raise InputError(f"the hooks of {depth - len(captured)} of {depth} blocks did not run")
    if given is None or len(given) != depth + 1:
        raise InputError(f"{depth} blocks gave {0 if given is None else len(given)} hidden_states instead of one more")
    for block in range(depth - 1):  # the last entry has the final norm applied
        if not _same(captured[block], given[block + 1]):
            entry = next((f", but hidden_states[{i}]" for i, x in enumerate(given) if _same(captured[block], x)), "")
            raise InputError(f"the output of block {block} is not hidden_states[{block + 1}]{entry}")
    rows, error = _recorded(subject, captured[subject.layer].cpu())
    identical = f"identical for {depth - 1} of {depth} blocks (the last entry has the final norm)"
    return f"{identical}; {rows} recorded at layer {subject.layer}, {error:.1g} norms away"


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b.to(a.device), rtol=0, atol=0, equal_nan=True)


def _recorded(subject: Subject, hidden: Tensor) -> tuple[int, float]:
    """How many activations are recorded, and how far at most from a whole pass's `hidden` [B, T, d], in norms."""
    dtype, layer, batch = subject.model.dtype, subject.layer, subject.batch
    (recorded,) = activations(subject.model, [batch], [layer])
    row = (batch.doc == recorded.doc[:, None]).long().argmax(dim=1)
    expected = hidden[row, recorded.position].float()
    error = float(((recorded.x.float() - expected).norm(dim=-1) / expected.norm(dim=-1)).nan_to_num().max())
    if error > (allowed := RECORDED[dtype]):
        kind = f"{dtype_name(dtype)}, tolerance {allowed:g}"
        raise InputError(f"activations recorded at layer {layer} are {error:.2g} norms from a whole pass's ({kind})")
    return len(recorded), error


def _norms(subject: Subject) -> str:
    recorded, first = subject.norms
    median = float(recorded.median())
    sinks = int((recorded > sink_threshold(median)).sum())
    limit = f"over {SINK_FACTOR} times the median norm, {median:.3g}"
    rest = f"first positions, which are never recorded, up to {float(first.max()):.3g}"
    return f"all finite in {dtype_name(subject.model.dtype)}; {sinks} of {len(recorded)} {limit}; {rest}"


def _identity(subject: Subject) -> str:
    rows, dtype, prior = subject.prompts, subject.model.dtype, Identity(subject.hookpoint)
    plain = subject.generate(rows)
    with attach(prior, subject.model, generator=0) as counts:
        found = subject.generate(rows)
    require_edits(prior.count, rows)
    require_edits(counts.edited, rows)
    distance = require_equal(found, plain, dtype, "a prior that changes nothing changes what the model writes")
    tokens = "identical tokens" if torch.equal(found[0], plain[0]) else "tokens differ at a tie"
    return f"{tokens}, {counts.edited} positions edited; {in_words(distance, dtype)}"


def _cached(subject: Subject) -> str:
    differs, distances = "generation with a key-value cache differs from generation without", []
    with in_float32(subject.model) as dtype:
        for rows in (subject.prompts, subject.prompts[:1]):  # a batch without padding may come without a mask
            plain = subject.generate(rows)
            require_equal(subject.generate(rows, cache=False), plain, dtype, f"even without an edit, {differs}")
            pushed = subject.generate_pushed(rows)
            uncached = subject.generate_pushed(rows, cache=False)
            distances.append(require_equal(uncached, pushed, dtype, f"under a push, {differs}"))
            effect = _effect(pushed, plain, dtype)
    return f"{effect}; {in_words(max(distances), dtype)}"


def _effect(pushed: Generated, plain: Generated, dtype: torch.dtype) -> str:
    """What a push does to the logits, which must be more than is tolerated: else a push that is lost would pass."""
    effect = logit_distance(pushed, plain)
    if not effect > TOLERANCE[dtype]:
        raise InputError(f"a push of {PUSH:g} median norms changes next to nothing: {in_words(effect, dtype)}")
    return f"a push of {PUSH:g} median norms moves logits by {effect:.2g} sd"


def _left_padding(subject: Subject) -> str:
    rows, distances = subject.prompts, []
    lengths = ", ".join(str(len(row)) for row in rows)
    with in_float32(subject.model) as dtype:
        for generate, when in ((subject.generate, "even without an edit"), (subject.generate_pushed, "under a push")):
            tokens, logits = generate(rows)
            for row, *part in zip(rows, tokens.split(1), logits.split(1), strict=True):
                otherwise = f"{when}, a row of {len(row)} tokens differs alone and in a batch of {lengths} tokens"
                distances.append(require_equal((part[0], part[1]), generate([row]), dtype, otherwise))
    return f"rows of {lengths} tokens; {in_words(max(distances), dtype)}"


@torch.no_grad()
def _model_speed(subject: Subject) -> str:
    batch = _timed_batch(subject)
    inputs = model_inputs(subject.model, batch)
    rate = _rate(subject, lambda: subject.model(**inputs, use_cache=False))
    return f"{rate * batch.ids.numel():,.0f} tokens/s in {_shape(batch)}, {dtype_name(subject.model.dtype)}"


def _recording_speed(subject: Subject) -> str:
    batch = _timed_batch(subject)
    rate = _rate(subject, lambda: list(activations(subject.model, [batch], [subject.layer])))
    return f"{rate * int((batch.position > 0).sum()):,.0f} activations/s at layer {subject.layer} in {_shape(batch)}"


def _timed_batch(subject: Subject) -> TokenBatch:
    rows, length = SPEED
    row = sum(encode([*TEXTS], subject.tokenizer), [])[:length]
    ids, mask, position = pad([row] * rows, padding_id(subject.tokenizer), "right")
    return TokenBatch.whole(ids, mask, torch.arange(rows), position, 0)


def _shape(batch: TokenBatch) -> str:
    return f"batches of {' x '.join(map(str, batch.ids.shape))}"


def _rate(subject: Subject, run: Callable[[], object]) -> float:
    """Calls of `run` a second, after one that is not counted."""
    device = subject.model.device
    run()
    began = now = time_on(device)
    calls = 0
    while calls == 0 or now - began < SECONDS:
        run()
        calls, now = calls + 1, time_on(device)
    return calls / (now - began)


def _prior_repairs(subject: Subject) -> str:
    hookpoint, glp = _hookpoints(subject)[0], subject.prior
    assert glp is not None
    (rows,) = activations(subject.model, [subject.batch], [hookpoint.layer], side=hookpoint.side)
    x, layer = rows.x.to(glp.device), hookpoint.layer if len(glp.hookpoints) > 1 else None
    repaired = glp.project(x, layer=layer, generator=0).float()
    if broken := int((~repaired.isfinite().all(dim=-1)).sum()):
        raise InputError(f"{broken} of {len(x)} repaired activations are infinite or NaN")
    moved = (repaired - x.float()).norm(dim=-1) / x.float().norm(dim=-1)
    if not moved.any():
        raise InputError(f"the repair changed none of {len(x)} activations")
    with glp.attach(subject.model, layer=hookpoint.layer, generator=0) as counts:
        subject.generate(subject.prompts)
    require_edits(counts.edited + counts.passed_over["sink"], subject.prompts)
    rate = _rate(subject, lambda: glp.project(x, layer=layer, generator=0)) * len(x)
    finite = f"{len(x)} activations finite, moved by {float(moved.median()):.2g} of their norm"
    return f"{finite}; {rate:,.0f} activations/s in 4 steps; text under repair is finite"


def _memory(subject: Subject) -> str:
    unit = 1 if sys.platform == "darwin" else 1024  # bytes that the system counts in
    used = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB resident at most"
    if torch.cuda.is_available():
        used += f", {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB of GPU memory"
    return used


CHECKS: dict[str, tuple[tuple[str, ...], Callable[[Subject], str]]] = {
    "versions": ((), _versions),
    "device and precision": ((), _device),
    "language model": (("device and precision",), _language_model),
    "prior loads": (("device and precision",), _prior),
    "blocks found": (("language model",), _blocks),
    "recording equals hidden_states": (("blocks found",), _recording),
    "norms and sinks": (("blocks found",), _norms),
    "identity prior": (("blocks found",), _identity),
    "prior fits the model": (("blocks found", "prior loads"), _prior_fits),
    "prior repairs": (("prior fits the model", "norms and sinks"), _prior_repairs),
    "language model's speed": (("language model",), _model_speed),
    "recording's speed": (("blocks found",), _recording_speed),
    "memory": ((), _memory),
    # Last, as the weights in float32 would count for the memory.
    "cached equals uncached": (("norms and sinks",), _cached),
    "left padding equals single rows": (("norms and sinks",), _left_padding),
}
"""Each check with those that must be well before it can run."""
