"""Every command of the command line once, small, on one device: that each runs there, and the seconds that it takes.

python benchmarks/bench_commands.py [--device cuda]

They work in one folder, each with what the ones before have made. Language model and text are SmolLM2-135M and the
embedded corpus (packages of requirements-assets.txt) unless others are named; `steer` and `demo` need the latter for
their labelled sentences.
"""

from __future__ import annotations

import argparse
import json
import shlex
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from latentprior.cli import commands as cli
from latentprior.config import LLMConfig, TextConfig
from latentprior.utils.devices import resolve_device

OF_ASSETS = ("steer", "demo")
WORDS = {  # of two classes to probe
    "colour": ("red", "green", "blue", "white", "black"),
    "number": ("one", "two", "three", "four", "five"),
}


def commands(
    folder: Path,
    llm: str = LLMConfig().model,
    text: str = TextConfig().dataset,
    layer: int = 15,
    device: str = "auto",
    samples: int = 1200,
) -> dict[str, list[str]]:
    """The arguments of each command by its name, in the order in which they need one another.

    Args:
        folder: of everything; a file of labelled texts is written into it.
        samples: generated activations that are compared with real ones; held-out rows are three times as many.
    """
    store, heldout, prior, live, out, labelled = (
        shlex.quote(str(folder / name)) for name in ("store", "heldout", "prior", "live", "out", "labelled.csv")
    )
    model = f"--device {device} --llm.model {shlex.quote(llm)}"
    documents = f"--text.dataset {shlex.quote(text)} --text.heldout 0.3 --max-length 64 --batch-tokens 1024"
    record = f"record {model} {documents} --layers {layer}"
    small = "--activations 2560 --blocks 2 --heldout-activations 256 --recipe '{\"batch_size\": 128}'"
    stores = f"--heldout {heldout} --text.part heldout --samples {samples}"
    lines = {
        "plan": f"plan {model} --chip measured --max-length 64",
        "record": f"{record} --max-activations {4 * samples} --output {store}",
        "record held-out": f"{record} --max-activations {3 * samples} --output {heldout} --text.part heldout",
        "train": f"train --device {device} {small} --store {store} --heldout {heldout} --output {prior}",
        "train from the model": f"train --from llm {model} {documents} --layers {layer} {small} --statistics 1024 "
        f"--buffer 512 --document-shards 2 --output {live}",
        "sample": f"sample --device {device} --prior {prior} --output {out}/samples.safetensors",
        "evaluate": f"evaluate {model} {documents} {stores} --prior {prior} --train {store} --nfes 4 --solvers ab2 "
        f"--text.limit 8 --baseline sae --sae.activations 4096 --output {out}/evaluate",
        "steer": f"steer {model} --priors {prior} --prompts 4 --new-tokens 6 --labelled 200 --both-signs false "
        f"--directions difference_of_means --strengths 0.5,1.5 --methods repaired,paired --output {out}/steer",
        "probe": f"probe {model} --priors {prior} --tasks {labelled} --times 0.5 --folds 2 --sparse 2 "
        f"--sae {out}/evaluate/sae --output {out}/probe",
        "neurons": f"neurons {model} {documents} --prior {prior} --tokens 1500 --top 4 --reservoir 8 "
        f"--output {out}/neurons",
        "sweep": f"sweep {model} {documents} {stores} --store {store} --widths 32,64 --blocks 1 --budgets 1280,2560 "
        f"--recipe '{{\"batch_size\": 128}}' --lm-documents 4 --output {out}/sweep",
        "convert": f"convert --source {prior} --output {out}/official --to official",
        "demo": f"demo {model} --tiny --layer {layer} --output {out}/demo",
    }
    if "doctor" in cli.COMMANDS:
        lines["doctor"] = f"doctor {model} --prior {prior}"
    write_labelled(folder / "labelled.csv")
    return {name: shlex.split(line) for name, line in lines.items()}


def write_labelled(path: Path) -> None:
    """A file of 130 texts of two classes, for `probe`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["prompt,target"]
    for i in range(130):
        name = list(WORDS)[i % 2]
        lines.append(f"{' '.join(WORDS[name][i * j % 5] for j in range(1, 5))} {i},{name}")
    path.write_text("\n".join(lines) + "\n")


def measure(
    work: str | None = None, device: str = "auto", *, assets: bool | None = None, **options: Any
) -> dict[str, Any]:
    """Seconds of each command.

    Args:
        assets: also those that need the packages of requirements-assets.txt; by default if these are installed.
        options: of `commands`.

    Raises:
        RuntimeError: a command ends with another status than 0; what it said is on standard error.
    """
    assets = find_spec("sae_probes") is not None if assets is None else assets
    seconds, left_out = {}, () if assets else OF_ASSETS
    with tempfile.TemporaryDirectory() as scratch:
        for name, arguments in commands(Path(work or scratch), device=device, **options).items():
            if name in left_out:
                continue
            began = time.perf_counter()
            if (status := cli.main(arguments)) != 0:
                raise RuntimeError(f"{name} ended with status {status}: latentprior {' '.join(arguments)}")
            seconds[name] = round(time.perf_counter() - began, 2)
    place = str(resolve_device(device))
    return {"benchmark": "commands", "device": place, "seconds": seconds, "left_out": list(left_out)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", help="folder of everything (default: a temporary one)")
    parser.add_argument("--llm", default=LLMConfig().model, help="language model (default: %(default)s)")
    parser.add_argument("--text", default=TextConfig().dataset, help="text, as of train (default: %(default)s)")
    parser.add_argument("--layer", type=int, default=15, help="block to model (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=1200, help="of the evaluation (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="torch device (default: %(default)s)")
    print(json.dumps(measure(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
