"""Priors that are installed as packages: found by name through entry points, and never imported.

A package offers a prior by an entry point of the group `GROUP`, whose name is the prior's and whose value is the module
that lies in the prior's folder (``priors/pack.py`` makes such packages; anybody may).
"""

from __future__ import annotations

from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from latentprior.utils.errors import InputError, nearest, nearest_path

GROUP = "latentprior.priors"
PUBLISHED = ("smollm2-135m-layer15",)  # by this project


def installed_names() -> list[str]:
    """The names of all installed priors."""
    return sorted({entry.name for entry in entry_points(group=GROUP)})


def installed_folder(name: str, *, revision: str | None = None) -> Path:
    """The folder of the installed prior `name`; `InputError` if there is none, or two, or at any `revision`."""
    offers = {getattr(entry.dist, "name", "?"): entry.module for entry in entry_points(group=GROUP, name=name)}
    if not offers:
        raise _not_installed(name)
    if len(offers) > 1:
        raise InputError(
            f"the prior {name!r} is in several packages, {', '.join(sorted(offers))}: uninstall the others"
        )
    if revision is not None:
        raise InputError(f"the prior {name!r} is an installed package and has no revision {revision!r}")
    ((package, module),) = offers.items()
    top, *within = module.split(".")
    spec = find_spec(top)  # of a module inside another one it would import that
    folders = [Path(place, *within) for place in (spec and spec.submodule_search_locations) or ()]
    folder = next((folder for folder in folders if folder.is_dir()), None)
    if folder is None:
        raise InputError(f"the package {package} lacks the folder {module} of its prior {name!r}: install it again")
    return folder


def published_name(model: str, layer: int) -> str | None:
    """The name of this project's prior of one layer of a language model, installed or not; None if there is none."""
    name = f"{model.rpartition('/')[2]}-layer{layer}".lower()
    return name if name in PUBLISHED else None


def how_to_install(name: str) -> str:
    """The line that installs a prior of this project."""
    return f"pip install ./priors/{name} in latentprior's checkout"


def _not_installed(name: str) -> InputError:
    if name in PUBLISHED:
        return InputError(f"the prior {name!r} is not installed: {how_to_install(name)}")
    installed = installed_names()
    hint = nearest(name, dict.fromkeys((*installed, *PUBLISHED)))
    hint = f" ({hint})" if hint else nearest_path(name)
    there = f"installed: {', '.join(installed) or 'none'}"
    return InputError(
        f"no prior at {name!r}: not a folder and not an installed prior{hint}; {there}; a repository is OWNER/NAME"
    )
