"""From a language model to a repaired continuation, step by step: record, train, compare with held-out text, repair.

python examples/record_train_repair.py [--activations 100000] [--heldout 2000] [--folder runs/example]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import latentprior as lp
from latentprior.data.corpus import labelled
from latentprior.steer import difference_of_means

LAYER = 15
GLAD = ["What a wonderful day, everything went well.", "I love this, it is the best film of the year."]
SAD = ["What a terrible day, everything went wrong.", "I hate this, it is the worst film of the year."]


def main(arguments: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--activations", type=int, default=100_000, help="how many to train on")
    parser.add_argument("--heldout", type=int, default=2000, help="how many to hold out, and to sample")
    parser.add_argument("--folder", type=Path, default=Path("runs/example"))
    options = parser.parse_args(arguments)
    model, tokenizer = lp.load_llm("smollm2-135m")
    texts, _ = labelled("113_movie_sent")
    parts = {"train": (texts[1::2], options.activations // 4), "heldout": (texts[::2], options.heldout)}
    stores = {
        part: lp.record(
            model,
            tokenizer,
            documents,
            layers=[LAYER],
            output=options.folder / part,
            max_length=128,
            max_activations=rows,
        )
        for part, (documents, rows) in parts.items()
    }

    prior = options.folder / "prior"
    glp = lp.train(stores["train"], heldout=stores["heldout"], output=prior, activations=options.activations)
    glp = glp.to(model.device)
    real = stores["heldout"][:].float().to(model.device)
    samples = glp.normalizer.normalize(glp.sample(len(real), steps=20, solver="ab2", generator=0))
    distance = lp.frechet_distance(glp.normalizer.normalize(real), samples)
    print(f"Fréchet distance of {len(real):,} samples: {distance:.1f}")

    sides = [lp.record_activations(model, tokenizer, texts, [LAYER], positions="last").x for texts in (GLAD, SAD)]
    push = 0.6 * glp.normalizer.norm_unit() * difference_of_means(*sides)
    prompt = tokenizer("<|im_start|>The weather today", return_tensors="pt").to(model.device)
    with glp.attach(model, positions="last", edit=lambda x: x + push.to(x), paired=True, generator=0):
        ids = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    text = tokenizer.decode(ids[0], skip_special_tokens=True)
    print(text)
    return text


if __name__ == "__main__":
    main()
