"""From a language model to repaired, steered text in six lines.

python examples/six_lines.py [--activations 100000] [--folder runs/six-lines]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import latentprior as lp
from latentprior.data.corpus import labelled

POSITIVE = ["What a wonderful day, everything went well.", "I love this, it is the best film of the year."]
NEGATIVE = ["What a terrible day, everything went wrong.", "I hate this, it is the worst film of the year."]


def main(arguments: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--activations", type=int, default=100_000, help="how many to train on")
    parser.add_argument("--folder", type=Path, default=Path("runs/six-lines"))
    options = parser.parse_args(arguments)
    texts, _ = labelled("113_movie_sent")

    model, tokenizer = lp.load_llm("smollm2-135m")
    acts = options.folder / "acts"
    store = lp.record(model, tokenizer, texts, layers=[15], output=acts, max_activations=options.activations // 4)
    glp = lp.train(store, output=options.folder / "prior", preset="fast", activations=options.activations)
    happy = lp.Direction.from_texts(model, tokenizer, POSITIVE, NEGATIVE, layer=15)
    with glp.steer(model, happy, strength=0.8):
        prompt = tokenizer("<|im_start|>The weather today", return_tensors="pt").to(model.device)
        text = tokenizer.decode(model.generate(**prompt, max_new_tokens=20, do_sample=False)[0])
    print(text)
    return text


if __name__ == "__main__":
    main()
