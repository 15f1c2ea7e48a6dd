"""Repairs of an edited activation: what each holds on to follows from its definition."""

from __future__ import annotations

import pytest
import torch

from latentprior.config import REPAIRS, RepairConfig, SteerConfig
from latentprior.lm.edits import EditedPositions
from latentprior.prior.repair import PositionNoise
from latentprior.steer.repairs import PriorRepair
from latentprior.utils.errors import InputError

N, D = 6, 32
PAPER = {"paired": False, "samples": 1}


@pytest.fixture
def glp(tiny_glp):
    return tiny_glp(D)


@pytest.fixture
def edit():
    """Clean and edited activations, pushed along one direction with other strengths, and where they are."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(N, D, generator=generator)
    w = torch.nn.functional.normalize(torch.randn(D, generator=generator), dim=0)
    push = torch.arange(N)[:, None] * w
    return clean, clean + push, EditedPositions(1, torch.arange(N), torch.full((N,), 3), N), push


def along(change, push):
    return (change * push).sum(dim=1) / push.square().sum(dim=1)


def test_the_papers_repair_is_project_with_the_noise_of_the_position(glp, edit):
    repaired = PriorRepair(glp, RepairConfig(**PAPER), seed=4)(*edit)
    expected = glp.project(edit[1], t_start=0.5, steps=4, noise=PositionNoise(4)(edit[2], D))
    torch.testing.assert_close(repaired, expected)


def test_paired_repair_changes_nothing_where_nothing_was_pushed(glp, edit):
    clean, edited, at, push = edit
    repaired = PriorRepair(glp, RepairConfig(samples=1))(*edit)
    assert torch.equal(repaired[0], clean[0])
    noise = PositionNoise(0)(at, D)
    expected = glp.project(edited, reference=clean, noise=noise)
    torch.testing.assert_close(repaired, expected)


@pytest.mark.parametrize("solver", ["euler", "ab2", "midpoint", "heun"])
@pytest.mark.parametrize("paired", [False, True])
def test_a_held_component_is_what_the_edit_made_it(glp, edit, paired, solver):
    clean, edited, _, push = edit
    repaired = PriorRepair(glp, RepairConfig(hold=True, paired=paired, samples=1, solver=solver))(*edit)
    torch.testing.assert_close(along(repaired[1:], push[1:]), along(edited[1:], push[1:]), atol=1e-4, rtol=1e-4)
    assert (repaired - edited).norm(dim=1).min() > 1e-2 if not paired else True  # the rest was repaired
    free = PriorRepair(glp, RepairConfig(paired=paired, samples=1, solver=solver))(*edit)
    assert (along(free[1:], push[1:]) - along(edited[1:], push[1:])).abs().max() > 1e-2


def test_what_was_lost_is_added_again(glp, edit):
    _, edited, _, push = edit
    lost = PriorRepair(glp, RepairConfig(**PAPER))(*edit)
    repaired = PriorRepair(glp, RepairConfig(**PAPER, readd=True))(*edit)
    torch.testing.assert_close(along(repaired[1:], push[1:]), along(edited[1:], push[1:]), atol=1e-4, rtol=1e-4)
    across = (repaired - lost)[1:] - along((repaired - lost)[1:], push[1:])[:, None] * push[1:]
    assert across.abs().max() < 1e-4  # and nothing else


def test_the_mean_of_several_noises(glp, edit):
    repair = PriorRepair(glp, RepairConfig(paired=True, samples=3))
    clean, edited, at, _ = edit
    noises = PositionNoise(0, samples=3)(at, D).view(3, N, D)
    alone = [glp.project(edited, reference=clean, noise=noise) for noise in noises]
    assert not torch.allclose(alone[0], alone[1])
    torch.testing.assert_close(repair(*edit), torch.stack(alone).mean(dim=0), atol=1e-5, rtol=1e-5)
    assert repair.nfe == 4 * 3 * 2


def test_the_noise_level_follows_the_size_of_the_edit(glp, edit):
    clean, edited, at, push = edit
    repair = PriorRepair(glp, RepairConfig(rate=1.0, t_start=0.6, samples=1))
    levels = repair._levels(push, at)
    assert levels[0] == 0 and (levels.diff() >= 0).all() and levels[-1] > levels[1]
    repaired = repair(*edit)
    assert torch.equal(repaired[0], edited[0])
    for row in range(1, N):
        t_start = min(0.05 * int(levels[row]), 0.6)
        noise = PositionNoise(0)(at, D)[row : row + 1]
        expected = glp.project(edited[row : row + 1], reference=clean[row : row + 1], t_start=t_start, noise=noise)
        torch.testing.assert_close(repaired[row : row + 1], expected, atol=1e-5, rtol=1e-5)


def test_one_noise_for_a_sequence(glp, edit):
    clean, edited, at, push = edit
    later = EditedPositions(1, at.row, at.position + 5, N)
    sequence = PriorRepair(glp, RepairConfig(**PAPER, noise="sequence"))
    torch.testing.assert_close(sequence(*edit), sequence(clean, edited, later, push))
    position = PriorRepair(glp, RepairConfig(**PAPER))
    assert not torch.allclose(position(*edit), position(clean, edited, later, push))


def test_a_prior_of_several_layers_is_told_which(tiny_glp, edit):
    clean, edited, at, push = edit
    glp = tiny_glp(D, (0, 1))
    expected = glp.project(edited, noise=PositionNoise(0)(at, D), layer=1)
    torch.testing.assert_close(PriorRepair(glp, RepairConfig(**PAPER))(*edit), expected)
    with pytest.raises(InputError, match="no layer 2"):
        PriorRepair(glp, RepairConfig(**PAPER))(clean, edited, EditedPositions(2, at.row, at.position, N), push)


def test_every_method_is_a_change_of_the_configured_repair():
    config = SteerConfig(["p"], "o", repair=RepairConfig(t_start=0.3, steps=2))
    for method, changes in REPAIRS.items():
        repair = config.repair_of(method)
        assert repair is not None
        assert all(getattr(repair, name) == value for name, value in ({"t_start": 0.3, "steps": 2} | changes).items())
    assert config.repair_of("plain") is None
