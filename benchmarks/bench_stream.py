"""Training straight from a language model: where the time of `train --from llm` goes.

One whole run of `fit` with ``source="llm"``, in a temporary folder: the language model fills the mixing buffer, the
trainer draws from it. The parts are those of the run's train.json: forward passes of the language model, copying into
and drawing from the buffer, training (tokenising and waiting for the GPU included), evaluating and saving. The
buffer's share of them all is to stay under 3%.

The language model is SmolLM2-135M and the text the embedded corpus (packages of requirements-assets.txt) unless others
are named.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from latentprior.config import LLMConfig, StreamConfig, TextConfig, TrainConfig
from latentprior.training.fit import fit
from latentprior.utils.devices import resolve_device


def measure(
    llm: str = LLMConfig().model,
    text: str = TextConfig().dataset,
    activations: int = 200_000,
    layer: int = 15,
    blocks: int = 3,
    batch: int = 1024,
    buffer: str = StreamConfig.buffer,
    batch_tokens: int = StreamConfig.batch_tokens,
    max_length: int = 128,
    statistics: int = StreamConfig.statistics,
    document_shards: int | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Seconds in each part, the buffer's share of their sum, and activations per second of that sum."""
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig.of(
            source="llm",
            llm=LLMConfig(llm),
            text=TextConfig(text),
            layers=[layer],
            activations=activations,
            recipe={"batch_size": batch},
            blocks=blocks,
            buffer=buffer,
            batch_tokens=batch_tokens,
            max_length=max_length,
            statistics=statistics,
            document_shards=document_shards,
            output=folder,
            device=device,
        )
        fit(config)
        result = json.loads((Path(folder) / "train.json").read_text(encoding="utf-8"))
    seconds, total = result["seconds"], sum(result["seconds"].values())
    return {
        "benchmark": "stream",
        "model": llm,
        "layer": layer,
        "blocks": blocks,
        "batch": batch,
        "buffer": buffer,
        "batch_tokens": batch_tokens,
        "device": str(resolve_device(device)),
        "threads": torch.get_num_threads(),
        **result["summary"],
        "seconds": {part: round(value, 3) for part, value in seconds.items()},
        "shares": {part: round(value / total, 4) for part, value in seconds.items()},
        "buffer_share": round(seconds["buffer"] / total, 4),
        "activations_per_second": round(result["summary"]["activations"] / total, 1),
        "wall_seconds": result["wall_seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", default=LLMConfig().model, help="language model (default: %(default)s)")
    parser.add_argument("--text", default=TextConfig().dataset, help="text, as of train (default: %(default)s)")
    parser.add_argument("--activations", type=int, default=200_000, help="to train on (default: %(default)s)")
    parser.add_argument("--layer", type=int, default=15, help="block to model (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=3, help="blocks of the prior (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1024, help="activations of a step (default: %(default)s)")
    parser.add_argument("--buffer", default=StreamConfig.buffer, help="size of the buffer (default: %(default)s)")
    parser.add_argument("--batch-tokens", type=int, default=StreamConfig.batch_tokens, help="(default: %(default)s)")
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a document (default: %(default)s)")
    parser.add_argument("--statistics", type=int, default=StreamConfig.statistics, help="(default: %(default)s)")
    parser.add_argument("--document-shards", type=int, help="as of train")
    parser.add_argument("--device", default="auto", help="torch device (default: %(default)s)")
    print(json.dumps(measure(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
