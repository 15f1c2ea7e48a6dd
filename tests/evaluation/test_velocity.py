"""The velocity's error at single noise levels, on data whose velocity is known."""

from __future__ import annotations

import pytest
import torch

from latentprior.evaluation.velocity import TIMES, velocity_errors
from latentprior.report.evaluation import velocity
from latentprior.stats.gaussian import GaussianPrior


def test_a_prior_of_the_normal_velocity_equals_the_gaussian_on_normal_data(tiny_glp):
    glp = tiny_glp(16, skip="normal")
    torch.nn.init.zeros_(glp.denoiser.out_proj.weight)
    torch.nn.init.zeros_(glp.denoiser.out_proj.bias)
    z = torch.randn(60_000, 16, generator=torch.Generator().manual_seed(1))
    rows = velocity_errors(glp, GaussianPrior.fit(z[2000:]), glp.normalizer.denormalize(z[:2000]), None)
    assert [row["t"] for row in rows] == list(TIMES)
    for row in rows:
        t = row["t"]
        assert row["prior"] == pytest.approx(1 / ((1 - t) ** 2 + t**2), rel=0.05)
        assert row["gaussian"] == pytest.approx(row["prior"], abs=2e-3)
        low, high = row["interval"]
        assert row["difference"] == pytest.approx(row["prior"] - row["gaussian"], abs=1e-9)
        assert low <= row["difference"] <= high
    assert "0.999" in velocity({"velocity": rows}) and not velocity({})


def test_what_a_prior_lacks_shows(tiny_glp):
    """Without the skip an untrained network predicts next to nothing: near data its error is that of both parts, 2."""
    glp = tiny_glp(16)
    torch.nn.init.zeros_(glp.denoiser.out_proj.weight)
    torch.nn.init.zeros_(glp.denoiser.out_proj.bias)
    z = torch.randn(20_000, 16, generator=torch.Generator().manual_seed(1))
    rows = velocity_errors(glp, GaussianPrior.fit(z[1000:]), glp.normalizer.denormalize(z[:1000]), None)
    assert rows[0]["prior"] == pytest.approx(2, rel=0.05) and rows[0]["interval"][0] > 0.9


def test_with_the_skip_any_network_is_exact_at_both_ends(tiny_glp):
    glp = tiny_glp(16, skip="normal", modulation="norm")
    z = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(glp.denoiser(z, torch.tensor(0.0)), -z)
    assert torch.equal(glp.denoiser(z, torch.tensor(1.0)), z)
    assert not torch.allclose(glp.denoiser(z, torch.tensor(0.5)), torch.zeros(5, 16))
