"""From a language model to a repaired continuation, in Python: record, train for a minute, steer, repair.

python examples/record_train_repair.py [--activations 100000] [--heldout 2000] [--folder runs/example]
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch

from latentprior import GLP, frechet_distance, record_activations
from latentprior.config import LLMConfig, RecordConfig, TextConfig, TrainConfig
from latentprior.data.store.record import record_from
from latentprior.lm.loading import load_llm
from latentprior.steer import difference_of_means
from latentprior.training.fit import fit

LAYER = 15
GLAD = ["What a wonderful day, everything went well.", "I love this, it is the best film of the year."]
SAD = ["What a terrible day, everything went wrong.", "I hate this, it is the worst film of the year."]


def main(arguments: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--activations", type=int, default=100_000, help="how many to train on")
    parser.add_argument("--heldout", type=int, default=2000, help="how many to hold out, and to sample")
    parser.add_argument("--folder", type=Path, default=Path("runs/example"))
    options = parser.parse_args(arguments)
    model, tokenizer = load_llm(LLMConfig("smollm2-135m"))

    store = RecordConfig(
        output=str(options.folder / "activations"),
        layers=[LAYER],
        max_length=128,
        max_activations=options.activations // 4,
        resume=True,
    )
    record_from(model, tokenizer, store)
    heldout = dataclasses.replace(
        store,
        output=str(options.folder / "heldout"),
        max_activations=options.heldout,
        text=TextConfig(part="heldout"),
    )
    real = record_from(model, tokenizer, heldout).rows(torch.arange(options.heldout)).float().to(model.device)

    folder = str(options.folder / "prior")
    fit(TrainConfig.of(store=store.output, heldout=heldout.output, output=folder, activations=options.activations))
    glp = GLP.from_pretrained(folder, device=model.device)
    samples = glp.normalizer.normalize(glp.sample(options.heldout, steps=20, solver="ab2", generator=0))
    distance = frechet_distance(glp.normalizer.normalize(real), samples)
    print(f"Fréchet distance of {options.heldout:,} samples: {distance:.1f}")

    sides = [record_activations(model, tokenizer, texts, [LAYER], positions="last").x for texts in (GLAD, SAD)]
    push = 0.6 * float(glp.normalizer.mean_norm) * difference_of_means(*sides)
    prompt = tokenizer("<|im_start|>The weather today", return_tensors="pt").to(model.device)
    with glp.attach(model, positions="last", edit=lambda x: x + push.to(x), paired=True, generator=0):
        ids = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    text = tokenizer.decode(ids[0], skip_special_tokens=True)
    print(text)
    return text


if __name__ == "__main__":
    main()
