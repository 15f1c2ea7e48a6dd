"""The model card of a prior: what it is, how to use it, and what its provenance says of training and evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from latentprior.config import EMBEDDED
from latentprior.lm.hooks import Hookpoint
from latentprior.prior.denoiser import Denoiser
from latentprior.utils.formatting import decimals, estimate, number

Json = Mapping[str, Any]


def model_card(
    denoiser: Denoiser, layers: Sequence[int], hookpoints: Sequence[Hookpoint], provenance: Json, *, stored: torch.dtype
) -> str:
    """The README, in Markdown, of a prior of `layers` whose weights are `stored` in some precision.

    The keys "package", "training", "storage", "evaluations" and "license" of the provenance, where they are there, are
    told in words and tables; at the end it stands as a whole.
    """
    config, size = denoiser.config, sum(p.numel() for p in denoiser.parameters())
    shape = f"{config.n_layers} blocks, d_model {config.d_model}, d_mlp {config.d_mlp}, {size / 1e6:.1f} M parameters"
    kept = "" if stored == denoiser.dtype else f", stored in {str(stored).removeprefix('torch.')}"
    name, license_id = _name(provenance), provenance.get("license", {}).get("hub")
    places = [(h.model, h.layer, h.side, h.width) for h in hookpoints]
    parts = [
        "---\nlibrary_name: latentprior",
        *([f"license: {license_id}"] if license_id else []),
        "tags: [interpretability, activations, flow-matching]\n---",
        f"# Generative latent prior {name}".rstrip() + "\n",
        "A flow-matching model of a language model's activations ([method](https://arxiv.org/abs/2602.06964)):",
        f"{shape}{kept}.\n",
        _table(("language model", "layer", "side", "width"), places),
        f"```python\n{_example(name, config.d_input, layers, hookpoints)}\n```\n",
        *_training(provenance),
        *_evaluations(provenance.get("evaluations", [])),
        *([f"## Licence\n\n{provenance['license']['text']}\n"] if "license" in provenance else []),
        f"## Provenance\n\n```json\n{json.dumps(provenance, indent=2)}\n```\n",
    ]
    return "\n".join(parts)


def _name(provenance: Json) -> str:
    """What `GLP.from_pretrained` knows the prior by, if it is a package."""
    return provenance.get("package", {}).get("prior", "")


def _table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"


def _example(name: str, width: int, layers: Sequence[int], hookpoints: Sequence[Hookpoint]) -> str:
    """How to draw activations and, if it is known where they belong, to repair a language model's."""
    layer = [f"layer={layers[0]}"] if len(layers) > 1 else []
    embedded = next((h.model for h in hookpoints if h.model in EMBEDDED), None)
    lines = [f"from latentprior import GLP{', load_llm' if embedded else ''}\n"]
    lines += [f'glp = GLP.from_pretrained("{name or "this folder or repository"}")']
    lines += [f"activations = glp.sample({', '.join(['16', *layer])})  # [16, {width}]"]
    if embedded:
        lines += [f'model, tokenizer = load_llm("{embedded}")']
    if hookpoints:
        loaded = "" if embedded else "  # the language model of the table, as transformers loads it"
        lines += [f"with glp.attach({', '.join(['model', *layer])}):{loaded}"]
        lines += ['    model.generate(**tokenizer("The weather today", return_tensors="pt").to(model.device))']
    return "\n".join(lines)


def _training(provenance: Json) -> Iterator[str]:
    training = provenance.get("training", {})
    if "activations" not in training:
        return
    distinct = f" ({training['distinct']:,} different ones)" if "distinct" in training else ""
    texts = provenance.get("source", {}).get("text", {}).get("dataset")
    yield f"## Training\n\n{training['activations']:,} activations{distinct}" + (f" of `{texts}`." if texts else ".")
    recipe = training.get("settings", {}).get("recipe", {})
    told = [
        f"{key.replace('_', ' ')} {recipe[key]}"
        for key in ("optimizer", "learning_rate", "batch_size")
        if key in recipe
    ]
    if told:
        yield f"Recipe: {', '.join(told)}; all of it is below."
    if losses := training.get("heldout_loss_by_t"):
        mean, n = decimals(training["heldout_loss"], 4), len(losses)
        yield f"\nHeld-out loss {mean}: mean squared error of the velocity on standardised activations, near 2 if"
        yield "untrained. By noise level t, up to:\n"
        yield _table([f"{(i + 1) / n:.1f}" for i in range(n)], [list(map(number, losses))])
    if stored := provenance.get("storage"):
        trained, rounded, computed = (f"{stored['heldout_loss'][k]:.5f}" for k in ("trained", "stored", "computed"))
        yield f"On {stored['rows']:,} held-out rows the loss is {trained} with the weights as trained, {rounded} with"
        yield f"the stored ones, and {computed} where {stored['dtype']} computes, too.\n"


def _evaluations(evaluations: Sequence[Json]) -> Iterator[str]:
    """A table with a row for each layer that was evaluated."""
    if not evaluations:
        return
    yield "## Evaluation\n\n`latentprior evaluate`, on text that was held out."
    replaced = list(dict.fromkeys(name for row in evaluations for name in row["delta_lm"]))
    if replaced:
        noised = ", ".join(dict.fromkeys(f"{row['t_start']:g}" for row in evaluations if row["delta_lm"]))
        yield "Delta LM: nats a token that replacing every activation adds to the language model's loss; the prior, the"
        yield f"Gaussian's posterior mean and noise alone replace it by what noise to t = {noised} leaves of it."
    header = ["layer", "held-out loss", "Fréchet distance over its lower bound", "two-sample AUC", "sampler"]
    rows = [
        [
            row["layer"],
            estimate(row["heldout_loss"], row["interval"], lambda loss: decimals(loss, 4)),
            number(row["frechet_over_bound"]),
            number(row["two_sample_auc"]),
            row["sampler"],
            *(number(row["delta_lm"].get(name)) for name in replaced),
        ]
        for row in evaluations
    ]
    yield "\n" + _table(header + [f"delta LM: {name}" for name in replaced], rows)
