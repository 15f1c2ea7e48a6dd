"""Annotations can be read back: what cannot be evaluated is checked by nobody."""

from __future__ import annotations

import inspect
import typing

import pytest

from latentprior.prior import denoiser, flow, normalizer
from latentprior.prior import glp as prior


def functions(module):
    for found in vars(module).values():
        if getattr(found, "__module__", None) == module.__name__:
            yield from filter(inspect.isfunction, vars(found).values() if inspect.isclass(found) else [found])


@pytest.mark.parametrize("module", [denoiser, flow, normalizer, prior])
def test_annotations_evaluate(module):
    seen = [typing.get_type_hints(function) for function in functions(module)]
    assert len(seen) > 3
