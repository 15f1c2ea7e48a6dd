"""Was this made with the same settings? The one comparison, for every folder that a second run continues."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latentprior.utils.errors import InputError


def differences(stored: Any, given: Any, name: str = "") -> Iterator[str]:
    """Where two JSON values differ, in words."""
    if isinstance(stored, list) and isinstance(given, list):
        stored, given = dict(enumerate(stored)), dict(enumerate(given))
    if isinstance(stored, dict) and isinstance(given, dict):
        for key in stored | given:
            yield from differences(stored.get(key), given.get(key), f"{name}.{key}".lstrip("."))
    elif stored != given and not (stored is None and name.endswith(".weights")):  # older stores hold no digest
        yield f"{name} is {stored!r} there and {given!r} now"


def check_settings(folder: str | Path, what: str, stored: Any, given: Any) -> None:
    """Raise `InputError` with the first difference unless the settings `stored` with `what` are those `given` now."""
    if difference := next(differences(stored, json.loads(json.dumps(given))), None):
        raise InputError(f"{folder} holds {what} with other settings: {difference}; choose another --output")
