"""The paper's evidence on one language model and one trained prior, command by command.

python benchmarks/evidence.py --llm smollm2-135m --layer 15 --run RUN --store STORE --heldout HELDOUT --output DIR

`RUN` is the folder of `latentprior train`; its checkpoints say what a better prior buys. Every part is a command of
`latentprior` in a folder of its own: a part that is finished is not run again, one that was interrupted goes on, and
``DIR/commands.sh`` has all of them as they were given.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PARTS = ("evaluate", "checkpoints", "scaling", "steering", "probing")


class Part(NamedTuple):
    """One command, and the file that it leaves when it is done."""

    name: str
    result: Path
    command: list[str]


def parts(options: argparse.Namespace) -> Iterator[Part]:
    """All commands, the cheap ones first."""
    out, run, llm = Path(options.output), str(options.run), ["--llm.model", options.llm]
    stores = ["--heldout", options.heldout, "--train", options.store]
    chosen = checkpoints(options.run, options.checkpoints)

    def evaluated(name: str, prior: str, *more: str) -> Part:
        folder = out / "evaluate" / name
        return Part(
            "evaluate" if name == "final" else "checkpoints",
            folder / "evaluate.json",
            ["evaluate", "--prior", prior, *stores, *llm, "--output", str(folder), *more],
        )

    sae = ["--baseline", "sae", "--sae.activations", str(options.sae_activations)]
    yield evaluated("final", run, *sae, "--solvers", "euler,ab2")
    for path in chosen:
        yield evaluated(path.name, str(path), "--solvers", "ab2", "--nfes", "20", "--text.limit", "64")
    priors = ",".join([run, *map(str, reversed(chosen))])
    yield Part(
        "steering",
        out / "steering" / "steer.json",
        [
            *("steer", "--experiment", "sentiment", "--priors", priors, *llm, "--output", str(out / "steering")),
            *("--methods", "plain,repaired,paired-mean", "--directions", "difference_of_means,pca,probe"),
            *("--strengths", "0.25,0.5,0.75,1.0,1.4", "--prompts", str(options.prompts)),
        ],
    )
    yield Part(
        "probing",
        out / "probing" / "probe.json",
        [
            *("probe", "--priors", priors, *llm, "--output", str(out / "probing"), "--sparse", "[]", "--dense", "no"),
            *("--sae", str(out / "evaluate" / "final" / "sae"), "--max-test", str(options.max_test)),
        ],
    )
    yield Part(
        "scaling",
        out / "scaling" / "sweep.json",
        [
            *("sweep", "--store", options.store, "--heldout", options.heldout, *llm, "--preset", "fast"),
            *("--widths", options.width, "--mlp-ratio", "2", "--blocks", "1,2,3,6,12", "--lm-documents", "24"),
            *("--budgets", options.budgets, "--output", str(out / "scaling")),
        ],
    )


def checkpoints(run: Path, count: int) -> list[Path]:
    """The last `count` checkpoints of a run, the earliest of them first."""
    found = sorted((run / "checkpoints").iterdir(), key=lambda path: int(path.name))
    return found[-count:] if count else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", required=True, help="language model, as --llm.model")
    parser.add_argument("--layer", required=True, type=int, help="the prior's layer")
    parser.add_argument("--run", required=True, type=Path, help="folder of the training run")
    parser.add_argument("--store", required=True, help="activations that it was trained on")
    parser.add_argument("--heldout", required=True, help="activations of held-out documents")
    parser.add_argument("--output", required=True, help="folder of everything")
    parser.add_argument("--only", default=",".join(PARTS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--checkpoints", type=int, default=5, help="how many of them (default: %(default)s)")
    parser.add_argument("--sae-activations", type=int, default=20_000_000, help="as the prior's (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=100, help="of the steering (default: %(default)s)")
    parser.add_argument("--max-test", type=int, default=500, help="test rows of a probing task (default: %(default)s)")
    parser.add_argument("--width", default="576", help="of the denoisers of the scaling law (default: %(default)s)")
    parser.add_argument("--budgets", default="131072,524288,2097152", help="activations of each (default: %(default)s)")
    options = parser.parse_args()
    wanted = options.only.split(",")
    if strange := set(wanted) - set(PARTS):
        parser.error(f"unknown part {min(strange)!r}: {', '.join(PARTS)}")
    check_layer(parser, options.run, options.layer)
    every = [part for part in parts(options) if part.name in wanted]
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"latentprior {shlex.join(part.command)}\n" for part in every]
    (folder / "commands.sh").write_text("".join(lines), encoding="utf-8")
    failed = 0
    for part, line in zip(every, lines, strict=True):
        if part.result.is_file():
            continue
        print(line, end="", file=sys.stderr, flush=True)
        failed += subprocess.run([sys.executable, "-m", "latentprior", *part.command]).returncode != 0
    return min(failed, 1)


def check_layer(parser: argparse.ArgumentParser, run: Path, layer: int) -> None:
    """Stop unless `run` holds a prior of this layer: hours would be spent on another."""
    try:
        hookpoints = json.loads((run / "config.json").read_text(encoding="utf-8"))["hookpoints"]
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"{run} holds no finished prior: {error}")
    if [hookpoint["layer"] for hookpoint in hookpoints] != [layer]:
        parser.error(f"{run} is a prior of layers {[hookpoint['layer'] for hookpoint in hookpoints]}, not of {layer}")


if __name__ == "__main__":
    sys.exit(main())
