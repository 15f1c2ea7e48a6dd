"""A prior of a language model, trained for real and measured, its weights in files of at most 16 MiB.

python benchmarks/bench_prior.py [--source store] --activations 20000000 --work runs/gpu
python benchmarks/bench_prior.py --join runs/gpu/parts        # the parts to one file again

Measured on held-out documents: the loss by noise level, the Fréchet distance of samples (beside that of other real
activations, the least there can be), and the delta LM loss of noising every position to t = 0.5 and repairing it. The
same command continues an interrupted run. Language model and text are SmolLM2-135M and the embedded corpus (packages of
requirements-assets.txt) unless others are named.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file

from latentprior.config import PRESETS, EvaluateConfig, LLMConfig, RecordConfig, StreamConfig, TextConfig, TrainConfig
from latentprior.data import text as texts
from latentprior.data.store.reader import ActivationStore
from latentprior.data.store.record import record
from latentprior.data.tokens import tokenize
from latentprior.evaluation.evaluate import document_halves, heldout_by_t, lm_replacements
from latentprior.evaluation.lm_loss import delta, lm_losses
from latentprior.lm.loading import load_llm
from latentprior.prior.files import WEIGHTS
from latentprior.prior.glp import GLP
from latentprior.stats.frechet import GaussianMoments, frechet_distance
from latentprior.stats.gaussian import GaussianPrior
from latentprior.training.fit import fit
from latentprior.utils.devices import fast_dtype, resolve_device
from latentprior.utils.errors import InputError

PART_BYTES = 2**24 - 2**16  # of weights in a file; the rest is for its header


def measure(
    work: str,
    llm: str = LLMConfig().model,
    text: str = TextConfig().dataset,
    layer: int = 15,
    source: str = "live",
    activations: int = 20_000_000,
    blocks: int = 3,
    preset: str = "quick",
    recipe: dict[str, Any] | None = None,
    buffer: str = StreamConfig.buffer,
    statistics: int = StreamConfig.statistics,
    document_shards: int | None = None,
    batch_tokens: int = StreamConfig.batch_tokens,
    max_length: int = 128,
    samples: int = 6000,
    documents: int = 256,
    device: str = "auto",
) -> dict[str, Any]:
    """Train a prior in ``work/prior``, measure it as it is run (in bfloat16 where that is fast), write ``work/parts``.

    Args:
        work: folder of the stores, the prior and its parts.
        source: "live" trains on what the language model computes meanwhile, every document once; "store" records the
            whole text first, and goes through it as often as `activations` take.
        samples: generated activations of the Fréchet distance; three times as many held-out ones are recorded.
        documents: held-out documents of the delta LM loss.
    """
    folder, model = Path(work), LLMConfig(llm)
    tokens: dict[str, Any] = {"batch_tokens": batch_tokens, "max_length": max_length}

    def store(name: str, chosen: TextConfig, rows: int | None) -> str:
        path = str(folder / name)
        options: dict[str, Any] = {"max_activations": rows, "text": chosen, "llm": model, "device": device, **tokens}
        record(RecordConfig(path, [layer], resume=True, **options))
        return path

    heldout = store("heldout", TextConfig(text, part="heldout"), 3 * samples)
    data: dict[str, Any] = {"llm": model, "text": TextConfig(text), "layers": [layer], "buffer": buffer, **tokens}
    data |= {"source": "llm", "statistics": statistics, "document_shards": document_shards}
    if source == "store":
        data = {"store": store("activations", TextConfig(text), None), "heldout": heldout}
    options: dict[str, Any] = {"activations": activations, "blocks": blocks, "preset": preset, "recipe": recipe or {}}
    prior = folder / "prior"
    fit(TrainConfig.of(output=str(prior), device=device, **options, **data))
    trained = json.loads((prior / "train.json").read_text(encoding="utf-8"))
    place = resolve_device(device)
    glp = GLP.from_pretrained(prior, device=place, dtype=fast_dtype(place))
    rows = ActivationStore(heldout)
    return {
        "benchmark": "prior",
        "model": llm,
        "layer": layer,
        "source": source,
        "device": str(place),
        "settings": trained["settings"],
        "training": {key: trained[key] for key in ("summary", "seconds", "wall_seconds")},
        "distribution": distribution(glp, rows, samples),
        "delta_lm": lm_loss(glp, rows, model, TextConfig(text, part="heldout", limit=documents)),
        "parts": split_weights(prior, folder / "parts"),
    }


def distribution(glp: GLP, heldout: ActivationStore, samples: int) -> dict[str, Any]:
    """Held-out loss by t, and the Fréchet distance of samples and of other documents' rows, raw and standardised.

    Raises:
        InputError: half of the held-out documents have fewer than `samples` rows.
    """
    halves = document_halves(heldout, None, seed=0)
    if (least := min(map(len, halves))) < samples:
        raise InputError(f"half of the held-out documents hold {least} rows, less than {samples}: lower samples")
    real, other = (heldout.rows(half[:samples]).float().to(glp.device) for half in halves)
    generated = glp.sample(samples, steps=20, generator=0)
    distances = {}
    for space, seen in {"raw": lambda x: x, "standardised": glp.normalizer.normalize}.items():
        reference = GaussianMoments.of(seen(real))
        distances[space] = {
            "prior": frechet_distance(reference, seen(generated)),
            "real": frechet_distance(reference, seen(other)),
        }
    return {"samples": samples, "heldout_loss": heldout_by_t(glp, real, None, seed=0), "frechet": distances}


def lm_loss(glp: GLP, heldout: ActivationStore, llm: LLMConfig, text: TextConfig) -> dict[str, Any]:
    """Next-token loss that noising every position to t = 0.5 adds: repaired by the prior, by a Gaussian, by nobody."""
    config = EvaluateConfig(prior="", heldout=str(heldout.folder), output="")
    model, tokenizer = load_llm(llm, glp.device)
    batches = list(
        tokenize(texts.documents(text), tokenizer, max_length=config.max_length, batch_tokens=config.batch_tokens)
    )
    rows = heldout.rows(torch.arange(min(config.fit_rows, len(heldout)))).to(glp.device)
    gaussian = GaussianPrior.fit(glp.normalizer.normalize(rows))
    replacements = lm_replacements(glp, gaussian, config.t_starts[0], config, None)
    losses = lm_losses(model, batches, glp.hookpoints[0].layer, replacements)
    clean = losses.pop("clean")
    added = {name: asdict(delta(loss, clean)) for name, loss in losses.items()}
    return {"clean_loss": clean.mean(), "tokens": int(clean.tokens.sum()), "steps": config.steps, "delta": added}


def split_weights(prior: Path, folder: Path, most_bytes: int = PART_BYTES) -> dict[str, int]:
    """Write the prior into `folder`, its weights as bfloat16 in files of at most `most_bytes` each and a header.

    Returns:
        the files' sizes by name.
    """
    GLP.from_pretrained(prior, dtype=torch.bfloat16).save_pretrained(folder)
    whole = folder / WEIGHTS
    weights = load_file(whole)
    whole.unlink()
    save_torch_state_dict(weights, folder, max_shard_size=most_bytes)
    return {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}


def join_weights(folder: Path) -> None:
    """Put the parts that `split_weights` wrote together, in the same folder: `GLP.from_pretrained` then reads it.

    Raises:
        InputError: a part is missing, or there are none.
    """
    try:
        index = json.loads((folder / f"{WEIGHTS}.index.json").read_text(encoding="utf-8"))
        parts = [load_file(folder / name) for name in sorted(set(index["weight_map"].values()))]
    except FileNotFoundError as error:
        raise InputError(f"{folder} does not hold all parts of a prior: {error}") from error
    save_file({name: value for part in parts for name, value in part.items()}, folder / WEIGHTS, {"format": "pt"})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--join", type=Path, metavar="FOLDER", help="make one file of a prior's parts, and do nothing else")
    add("--work", default="runs/gpu", help="folder of stores, prior and parts (default: %(default)s)")
    add("--llm", default=LLMConfig().model, help="language model: name or folder (default: %(default)s)")
    add("--text", default=TextConfig().dataset, help="text, as of train (default: %(default)s)")
    add("--layer", type=int, default=15, help="block to model (default: %(default)s)")
    add("--source", default="live", choices=("live", "store"), help="stream, or record first (default: %(default)s)")
    add("--activations", type=int, default=20_000_000, help="to train on (default: %(default)s)")
    add("--blocks", type=int, default=3, help="blocks of the prior (default: %(default)s)")
    add("--preset", default="quick", choices=PRESETS, help="recipe (default: %(default)s)")
    add("--recipe", type=json.loads, default={}, metavar="JSON", help="changes to the preset")
    add("--buffer", default=StreamConfig.buffer, help="size of the mixing buffer (default: %(default)s)")
    add("--batch-tokens", type=int, default=StreamConfig.batch_tokens, help="of the model (default: %(default)s)")
    add("--samples", type=int, default=6000, help="of the Fréchet distance (default: %(default)s)")
    add("--documents", type=int, default=256, help="of the delta LM loss (default: %(default)s)")
    add("--device", default="auto", help="torch device (default: %(default)s)")
    options = vars(parser.parse_args(arguments))
    if (joined := options.pop("join")) is not None:
        join_weights(joined)
        return
    print(json.dumps(measure(**options)))


if __name__ == "__main__":
    main()
