"""Random numbers from explicit sources: the global generator is never touched."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

Seed = torch.Generator | int | None


def generator_of(seed: Seed) -> torch.Generator:
    """`seed` itself if it is a generator, else a fresh CPU generator with that seed (None is 0).

    Drawing on the CPU makes a seed mean the same on every device.
    """
    return seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed or 0)


def keyed_generator(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for a seed and further numbers, such as a step: neighbouring keys give unrelated streams."""
    state = np.random.SeedSequence([number % 2**64 for number in key]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0]))


def normal(*shape: int, seed: Seed, device: torch.device | str = "cpu") -> Tensor:
    """Standard normal float32 numbers on `device`."""
    generator = generator_of(seed)
    return torch.randn(*shape, generator=generator, device=generator.device).to(device)
