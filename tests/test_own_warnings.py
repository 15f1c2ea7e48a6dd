"""Whose warnings are errors."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from torch import nn


class Old(nn.Module):
    """Warns as transformers' renamed arguments do: from a wrapper, at the caller of what it wraps."""

    def __init__(self, category: type[Warning]):
        super().__init__()
        self.category = category

    def forward(self, x, **options):
        @functools.wraps(torch.add)
        def wrapped(*args, **kwargs):
            warnings.warn("`x` is deprecated", self.category, stacklevel=3)
            return args[0]

        return wrapped(x, **options)


def called_from(module: str, function):
    scope = {"__name__": module, "function": function, "torch": torch}
    exec("@torch.no_grad()\ndef caller(*, x):\n    return function(x)", scope)
    return scope["caller"](x=torch.ones(1))


@pytest.mark.parametrize("category", [FutureWarning, DeprecationWarning])
def test_a_deprecation_that_the_package_causes_is_an_error(category):
    with pytest.raises(category, match="deprecated"):
        called_from("latentprior.data.prompts", Old(category))


@pytest.mark.parametrize(("module", "category"), [("transformers.x", FutureWarning), ("latentprior.x", UserWarning)])
def test_others_are_shown(module, category):
    with pytest.warns(category, match="deprecated"):
        called_from(module, Old(category))


def test_what_a_library_does_inside_is_its_own_affair():
    def library(x):
        warnings.warn("old inside", FutureWarning, stacklevel=1)
        return x

    with pytest.warns(FutureWarning, match="old inside"):
        called_from("latentprior.x", library)


def test_a_warning_keeps_its_place():
    with pytest.warns(UserWarning) as seen:
        warnings.warn("here", stacklevel=1)
    assert seen[0].filename == __file__
