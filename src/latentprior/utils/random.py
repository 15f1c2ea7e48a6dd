"""Random numbers from explicit sources; torch's default generator is asked for a seed where none was given."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

Seed = torch.Generator | int | None
"""A generator, which advances; a number, which repeats exactly; or None, fresh numbers at every call."""


def seed_of(generator: Seed) -> int:
    """A number to seed with: itself, or drawn from a generator, which advances; for None from torch's default one."""
    if generator is not None and not isinstance(generator, torch.Generator):
        return int(generator)
    source = torch.default_generator if generator is None else generator
    return int(torch.randint(2**63 - 1, (), generator=source, device=source.device))


def generator_of(seed: Seed) -> torch.Generator:
    """`seed` itself if it is a generator, else a fresh CPU one, so that a seed means the same on every device."""
    return seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed_of(seed))


def keyed_generator(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for a seed and further numbers, such as a step: neighbouring keys give unrelated streams."""
    state = np.random.SeedSequence([number % 2**64 for number in key]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0]))


def normal(*shape: int, seed: Seed, device: torch.device | str = "cpu") -> Tensor:
    """Standard normal float32 numbers on `device`."""
    generator = generator_of(seed)
    return torch.randn(*shape, generator=generator, device=generator.device).to(device)
