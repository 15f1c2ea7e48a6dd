"""Recording: a full forward pass with its attention mask and head against `activations`, which stops after the layer.

The language model is SmolLM2-135M and the text the embedded corpus (packages of requirements-assets.txt) unless others
are named. Both run the same batches in turn, in the same precision and the same run.
"""

from __future__ import annotations

import argparse
import json
from itertools import islice
from typing import Any

import torch
from bench_training import fastest, synchronizer
from transformers import PreTrainedTokenizerBase

from latentprior.config import LLMConfig, TextConfig
from latentprior.data.activations import activations
from latentprior.data.text import documents
from latentprior.data.tokens import TokenBatch, tokenize
from latentprior.lm.loading import load_llm
from latentprior.utils.errors import InputError


def whole_batches(
    tokenizer: PreTrainedTokenizerBase, count: int, batch_tokens: int, length: int, text: str = TextConfig().dataset
) -> list[TokenBatch]:
    """The first `count` batches of documents of exactly `length` tokens, without padding.

    Raises:
        InputError: the text has fewer.
    """
    stream = tokenize(documents(TextConfig(text)), tokenizer, max_length=length, batch_tokens=batch_tokens)
    full = (b for b in stream if b.ids.shape == (batch_tokens // length, length) and b.mask.all())
    found = list(islice(full, count))
    if len(found) < count:
        raise InputError(f"{text} makes {len(found)} batches of documents of {length} tokens, not {count}")
    return found


def measure(
    llm: str = LLMConfig().model,
    text: str = TextConfig().dataset,
    batches: int = 8,
    batch_tokens: int = 4096,
    length: int = 128,
    layer: int = 15,
    repeats: int = 3,
    device: str = "auto",
) -> dict[str, Any]:
    """Tokens per second of both, their ratio, and whether both give the same activations."""
    model, tokenizer = load_llm(LLMConfig(llm), device)
    tokens = whole_batches(tokenizer, batches, batch_tokens, length, text)

    @torch.no_grad()
    def whole() -> None:
        for batch in tokens:
            model(input_ids=batch.ids.to(model.device), attention_mask=batch.mask.to(model.device, torch.long))

    def ours() -> None:
        for _ in activations(model, tokens, [layer]):
            pass

    with torch.no_grad():
        ids, mask = tokens[0].ids.to(model.device), tokens[0].mask.to(model.device, torch.long)
        hidden = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[layer + 1]
    expected = hidden[:, 1:].flatten(0, 1).cpu().double()
    recorded = next(activations(model, tokens, [layer])).x.double()

    seconds = fastest({"whole": whole, "ours": ours}, repeats, synchronizer(model.device))
    total = sum(batch.ids.numel() for batch in tokens)
    return {
        "benchmark": "recording",
        "model": llm,
        "layer": layer,
        "tokens": total,
        "precision": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "whole_tokens_per_second": round(total / seconds["whole"], 1),
        "tokens_per_second": round(total / seconds["ours"], 1),
        "ratio": round(seconds["whole"] / seconds["ours"], 2),
        "difference": float((recorded - expected).norm() / expected.norm()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", default=LLMConfig().model, help="language model (default: %(default)s)")
    parser.add_argument("--text", default=TextConfig().dataset, help="text, as of train (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=8, help="batches (default: %(default)s)")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="tokens of a batch (default: %(default)s)")
    parser.add_argument("--length", type=int, default=128, help="tokens of a document (default: %(default)s)")
    parser.add_argument("--layer", type=int, default=15, help="block to record (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs; the fastest counts (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="torch device (default: %(default)s)")
    print(json.dumps(measure(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
