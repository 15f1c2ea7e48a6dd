"""What repair costs at every decoding step: tokens/s of generation plain, steered, and steered with repair.

All methods generate as many tokens for the same prompts, in turn, in the same run. "repaired 20" is the paper's
20 Euler steps; "repaired 4", "paired 4" and "paired-mean 4" (the default: four noises) are 4 evaluations. The prior is
of random weights, which take as long.
"""

from __future__ import annotations

import argparse
import json
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from bench_training import fastest, synchronizer

from latentprior.config import DenoiserConfig, LLMConfig, RepairConfig
from latentprior.lm.hooks import Hookpoint
from latentprior.lm.loading import load_llm
from latentprior.prior.denoiser import Denoiser
from latentprior.prior.glp import GLP
from latentprior.prior.normalizer import Normalizer
from latentprior.steer import Direction, Edit, PriorRepair, steering
from latentprior.utils.devices import fast_dtype

PROMPT_TOKENS = 20
UNIT, STRENGTH = 1e6, 1e-6  # a unit under which no activation counts as an attention sink: those are not repaired
REPAIRS = {
    "repaired 4": RepairConfig(paired=False, samples=1),
    "paired 4": RepairConfig(samples=1),
    "paired-mean 4": RepairConfig(),
    "repaired 20": RepairConfig(steps=20, paired=False, samples=1),
}


def measure(
    llm: str = "smollm2-135m",
    layer: int = 15,
    rows: int = 32,
    new_tokens: int = 20,
    d_model: int | None = None,
    blocks: int = 3,
    repeats: int = 3,
    device: str = "auto",
) -> dict[str, Any]:
    """Tokens per second of each method, and milliseconds that a repair adds to a decoding step of all rows.

    `ratio` is the speed of "paired 4" over that of "repaired 20".
    """
    model, tokenizer = load_llm(LLMConfig(model=llm), device)
    model_device = model.device
    hookpoint = Hookpoint.of(model, layer)
    d_model = d_model or 2 * hookpoint.width
    torch.manual_seed(0)
    with model_device:
        denoiser = Denoiser(DenoiserConfig(hookpoint.width, d_model, 2 * d_model, blocks))
    normalizer = Normalizer(torch.zeros(1, hookpoint.width), torch.ones(1, hookpoint.width), [layer])
    glp = (
        GLP(denoiser, normalizer, [hookpoint])
        .to(model_device)
        .eval()
        .requires_grad_(False)
        .cast(fast_dtype(model_device))
    )
    direction = Direction.of(torch.randn(hookpoint.width), hookpoint, "random", "random")
    ids = torch.randint(3, min(10_000, len(tokenizer)), (rows, PROMPT_TOKENS), device=model_device)
    options = {"do_sample": False, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens}

    def generate(context: AbstractContextManager[None]) -> None:
        with context:
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)

    def steered(repair: PriorRepair | None) -> AbstractContextManager[None]:
        return steering(model, Edit(direction, STRENGTH), mean_norm=UNIT, positions="last", repair=repair)

    methods = {"plain": lambda: generate(nullcontext()), "steered": lambda: generate(steered(None))}
    for name, config in REPAIRS.items():
        methods[name] = lambda config=config: generate(steered(PriorRepair(glp, config)))
    seconds = fastest(methods, repeats, synchronizer(model_device))
    return {
        "benchmark": "steering",
        "llm": llm,
        "rows": rows,
        "new_tokens": new_tokens,
        "d_model": d_model,
        "blocks": blocks,
        "device": str(model_device),
        "threads": torch.get_num_threads(),
        "tokens_per_second": {name: round(rows * new_tokens / spent, 1) for name, spent in seconds.items()},
        "added_ms_per_step": {
            name: round(1000 * (seconds[name] - seconds["steered"]) / new_tokens, 2) for name in REPAIRS
        },
        "ratio": round(seconds["repaired 20"] / seconds["paired 4"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", default="smollm2-135m", help="language model (default: %(default)s)")
    parser.add_argument("--layer", type=int, default=15, help="block that is steered (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=32, help="texts at once (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=20, help="tokens of each (default: %(default)s)")
    parser.add_argument("--d-model", type=int, help="width of the denoiser (default: twice the activations')")
    parser.add_argument("--blocks", type=int, default=3, help="residual blocks (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs; the fastest counts (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="torch device (default: %(default)s)")
    print(json.dumps(measure(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
