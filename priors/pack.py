"""Make the package of a prior from a finished training run:

    python priors/pack.py runs/prior smollm2-135m-layer15 --evaluation runs/evaluation/evaluate.json

The package, ``priors/NAME``, is a prior's folder (weights in bfloat16, at most 40 MB) with what pip needs beside it; a
second call with another run, evaluation or version replaces it. Held-out rows say what rounding the weights costs.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch

from latentprior.config import TrainConfig
from latentprior.data.partition import Batch
from latentprior.lm.hooks import Hookpoint, at_layer
from latentprior.prior.glp import GLP
from latentprior.prior.installed import GROUP
from latentprior.report.evaluation import REPLACEMENTS, delta_lm, frechet, solver_name
from latentprior.training.loss import heldout_loss
from latentprior.training.sources import stored_heldout
from latentprior.utils.errors import InputError
from latentprior.utils.files import replace_text
from latentprior.utils.formatting import decimals, number

Json = dict[str, Any]

HERE = Path(__file__).resolve().parent
REQUIREMENTS, APACHE = HERE.parent / "requirements-assets.txt", HERE.parent / "LICENSE"
STORED = torch.bfloat16
MOST_BYTES = 40_000_000
MOST_ROUNDING = 1e-3  # of the held-out loss
NAME = r"[a-z0-9]+(-[a-z0-9]+)*"
VERSION = r"[0-9]+(\.[0-9]+)*"


@dataclass(frozen=True)
class License:
    """A licence of the weights in a package."""

    spdx: str
    text: str  # what the model card says, with the name of the language model
    notice: str | None = None  # what has to be handed on
    file: Path | None = None  # with the licence's own text

    @property
    def hub(self) -> str:
        """Its name in the Hub's model cards."""
        return self.spdx.removeprefix("LicenseRef-").lower()

    def files(self) -> dict[str, str]:
        """The texts that go into the package, by the names of their files."""
        notice = {"NOTICE": f"{self.notice}\n"} if self.notice else {}
        return notice | ({self.file.name: self.file.read_text(encoding="utf-8")} if self.file else {})


GEMMA = (
    "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms. They, in section"
    " 3.2, and ai.google.dev/gemma/prohibited_use_policy restrict its use."
)
LICENSES = {  # by how the names of language models begin
    "smollm2": License("Apache-2.0", "This prior is under Apache-2.0, as is the language model, {model}.", file=APACHE),
    "gemma": License("LicenseRef-Gemma", f"Trained on activations of {{model}}, and under its terms. {GEMMA}", GEMMA),
}
PYPROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "{package}"
version = "{version}"
description = "Generative latent prior of {places}: weights for latentprior"
readme = "README.md"
requires-python = ">=3.11"
license = "{license}"
license-files = {license_files}

[project.entry-points."{group}"]
"{name}" = "{module}"

[tool.setuptools]
packages = ["{module}"]
package-dir = {{ "{module}" = "." }}

[tool.setuptools.package-data]
"{module}" = ["config.json", "model.safetensors", "README.md"]
"""
MODULE = '"""Weights for `latentprior`, which finds them without importing this."""\n'


def pack(
    run: Path,
    name: str,
    *,
    output: Path = HERE,
    version: str = "0.1.0",
    heldout: str | None = None,
    evaluations: Sequence[Path] = (),
    license: str | None = None,
    license_file: Path | None = None,
) -> Path:
    """Write the package of the prior in the folder of a training `run` into ``output/name``, which is returned.

    Args:
        heldout: store of held-out activations; by default the one that the run was given.
        evaluations: files ``evaluate.json`` of this prior, of one layer each, for the model card.
        license: SPDX expression of the weights' licence, by default known from the language model (`LICENSES`).
        license_file: the licence's own text, to be handed on; known of Apache-2.0 as long as `license` is left out.
    """
    if not re.fullmatch(NAME, name):
        raise InputError(f"the name {name!r} must be lower-case letters and digits, in parts joined by '-'")
    if not re.fullmatch(VERSION, version):
        raise InputError(f"the version {version!r} must be numbers, such as '0.1.0'")
    glp, folder = GLP.from_pretrained(run), output / name
    if not glp.hookpoints:
        raise InputError(f"{run} does not say what it was trained on")
    if (size := stored_bytes(glp)) > MOST_BYTES:
        raise InputError(f"{run} would take {size / 1e6:.1f} MB, and a package takes at most {MOST_BYTES / 1e6:g} MB")
    rows = heldout_rows(run, glp, heldout)
    found = [figures(path, glp, (run, folder, Path(name))) for path in evaluations]
    glp.hookpoints = tuple(replace(h, model=portable(h.model)) for h in glp.hookpoints)
    terms = license_of(glp.hookpoints[0].model, license)
    terms = replace(terms, file=license_file or terms.file)
    glp.provenance = portable(glp.provenance) | {
        "package": {"name": f"latentprior-{name}", "version": version, "prior": name},
        "storage": rounding(glp, rows),
        "license": {"spdx": terms.spdx, "hub": terms.hub, "text": terms.text.format(model=glp.hookpoints[0].model)},
    }
    if found:
        glp.provenance["evaluations"] = sorted(found, key=lambda row: row["layer"])
    write_package(folder, glp, terms)
    return folder


def write_package(folder: Path, glp: GLP, license: License) -> None:
    """Write a prior's folder that is a Python package as well: one module, which is the folder itself."""
    package, model = glp.provenance["package"], glp.hookpoints[0].model
    legal = license.files()
    project = PYPROJECT.format(
        package=package["name"],
        version=package["version"],
        name=package["prior"],
        module=package["name"].replace("-", "_"),
        group=GROUP,
        license=license.spdx,
        license_files=json.dumps(list(legal)),
        places=f"{model}, layer {', '.join(str(h.layer) for h in glp.hookpoints)}",
    )
    glp.save_pretrained(folder, dtype=STORED)
    for file, text in ({"pyproject.toml": project, "__init__.py": MODULE} | legal).items():
        replace_text(folder / file, text)


def stored_bytes(glp: GLP) -> int:
    """How large the weights will be: the denoiser in `STORED`, the statistics as they are."""
    denoiser = sum(tensor.numel() * STORED.itemsize for tensor in glp.denoiser.state_dict().values())
    return denoiser + sum(tensor.nbytes for tensor in glp.normalizer.state_dict().values())


def portable(value: Any) -> Any:
    """JSON values in which a path of this machine is the name of its file or folder only."""
    if isinstance(value, dict):
        return {key: portable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [portable(item) for item in value]
    if isinstance(value, str):
        for path in (PurePosixPath(value), PureWindowsPath(value)):
            if path.is_absolute() or value.startswith(("~", "..")):
                return path.name
    return value


def license_of(model: str, given: str | None) -> License:
    """The licence `given`, else the one under which activations of the language model `model` can be published."""
    if given is not None:
        return License(given, f"This prior is under {given}.")
    for beginning, license in LICENSES.items():
        if model.rpartition("/")[2].lower().startswith(beginning):
            return license
    raise InputError(f"the licence of {model!r} is not known here: name the prior's with --license")


def heldout_rows(run: Path, glp: GLP, heldout: str | None) -> Batch:
    """The held-out rows of a finished run, or as many of the store `heldout`."""
    result = run / "train.json"
    if not result.is_file():
        raise InputError(f"{run} holds no finished training run: {result.name} is missing")
    config = TrainConfig.of(**json.loads(result.read_text(encoding="utf-8"))["config"])
    if heldout is not None:
        config = config.changed(heldout=heldout)
    rows = stored_heldout(config, glp.hookpoints)
    if rows is None:
        raise InputError(f"{run} was trained without a store of held-out activations: name one with --heldout")
    return rows


def rounding(glp: GLP, rows: Batch) -> Json:
    """Held-out losses with the weights as trained, as stored, and if the stored precision computes as well."""
    layer = None if len(glp.normalizer.layers) == 1 else rows.layer
    losses = {}
    for name, dtypes in {"trained": (), "stored": (STORED, torch.float32), "computed": (STORED,)}.items():
        denoiser = copy.deepcopy(glp.denoiser)
        for dtype in dtypes:
            denoiser.to(dtype)
        losses[name] = heldout_loss(denoiser, glp.normalizer, rows.x, layer)[0]
    change = losses["stored"] / losses["trained"] - 1
    if not abs(change) < MOST_ROUNDING:
        raise InputError(f"rounding the weights changes the held-out loss by {change:.2%}: {losses}")
    return {"dtype": str(STORED).removeprefix("torch."), "rows": len(rows.x), "heldout_loss": losses}


def figures(path: Path, glp: GLP, places: Sequence[Path]) -> Json:
    """What an ``evaluate.json`` says of `glp`, which it must name by one of its `places`."""
    result = json.loads(path.read_text(encoding="utf-8"))
    if result.get("kind") != "evaluate":
        raise InputError(f"{path} is no result of latentprior evaluate")
    named = result["config"]["prior"]
    if Path(named).resolve() not in [place.resolve() for place in places]:
        raise InputError(f"{path} is the evaluation of another prior, {named!r}, not of {str(places[0])!r}")
    place = Hookpoint.from_dict(result["hookpoint"])
    if not place.same_place(at_layer(glp.hookpoints, place.layer, path)):
        raise InputError(f"{path} evaluates {place}, where this prior was not trained")
    bound, best = frechet(result) or (None, None)
    if bound is None or best is None:
        raise InputError(f"{path} lacks the distances of real activations and of samples")
    prior = delta_lm(result, "prior")
    methods = {name: delta_lm(result, name, prior["t_start"]) for name in REPLACEMENTS} if prior else {}
    return {
        "layer": place.layer,
        "heldout_loss": result["heldout_loss"]["mean"],
        "interval": result["heldout_loss"]["interval"],
        "samples": result["config"]["samples"],
        "frechet_over_bound": best["frechet"]["total"] / bound,
        "two_sample_auc": best["two_sample_auc"],
        "sampler": f"{solver_name(best)}, {best['nfe']} NFE",
        "t_start": prior["t_start"] if prior else None,
        "delta_lm": {REPLACEMENTS[name]: row["delta"] for name, row in methods.items() if row},
        "versions": result["versions"],
    }


def list_requirement(folder: Path) -> None:
    """Add a package of this checkout to what the README's install and ``make install`` read."""
    line, text = f"./{folder.relative_to(HERE.parent).as_posix()}", REQUIREMENTS.read_text(encoding="utf-8")
    if line not in text.splitlines():
        replace_text(REQUIREMENTS, f"{text}{line}\n")


def table_row(folder: Path) -> str:
    """The package as a row of the table in docs/priors.md."""
    glp = GLP.from_pretrained(folder)
    name, training = glp.provenance["package"]["prior"], glp.provenance["training"]
    cells = [f"[`{name}`](../priors/{name}/README.md)", f"`{glp.hookpoints[0].model}`"]
    cells += [", ".join(str(h.layer) for h in glp.hookpoints)]
    cells += [
        f"{sum(p.numel() for p in glp.denoiser.parameters()) / 1e6:.1f} M",
        f"{training['activations'] / 1e6:.1f} M",
    ]
    cells += [decimals(glp.provenance["storage"]["heldout_loss"]["stored"], 4)]
    ours = [row["delta_lm"].get(REPLACEMENTS["prior"]) for row in glp.provenance.get("evaluations", [])]
    return (
        f"| {' | '.join([*cells, ', '.join(map(number, ours)) or number(None), glp.provenance['license']['spdx']])} |"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0].rstrip(":") + ".")
    parser.add_argument("run", type=Path, help="folder of a finished training run")
    parser.add_argument("name", help="of the prior, as GLP.from_pretrained takes it")
    parser.add_argument("--version", default="0.1.0", help="of the package (%(default)s)")
    parser.add_argument("--heldout", help="store of held-out activations; by default the run's")
    parser.add_argument("--license", help="SPDX expression, if the language model's is not known here")
    parser.add_argument("--license-file", type=Path, help="the licence's text, if the package has to hold it")
    parser.add_argument("--evaluation", type=Path, nargs="+", default=[], help="evaluate.json, one for each layer")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the package's folder (priors)")
    given = parser.parse_args(arguments)
    try:
        folder = pack(
            given.run,
            given.name,
            output=given.output,
            version=given.version,
            heldout=given.heldout,
            evaluations=given.evaluation,
            license=given.license,
            license_file=given.license_file,
        )
    except (OSError, ValueError) as error:  # an `InputError`, or a file that cannot be read
        sys.exit(f"error: {error}")
    if given.output.resolve() == HERE:
        list_requirement(folder)
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))["provenance"]["storage"]
    losses = ", ".join(f"{name} {loss:.6f}" for name, loss in stored["heldout_loss"].items())
    print(f"{folder}: {(folder / 'model.safetensors').stat().st_size / 1e6:.1f} MB")
    print(f"held-out loss of {stored['rows']:,} rows, by weights: {losses}")
    print(f"row for docs/priors.md:\n{table_row(folder)}")


if __name__ == "__main__":
    main()
