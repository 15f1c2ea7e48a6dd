from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch

from latentprior import hooks
from latentprior.data.moments import Covariance, Moments
from latentprior.lm.hooks import Hookpoint
from latentprior.lm.hooks.blocks import find_blocks_at
from latentprior.neurons import top_logits as module
from latentprior.neurons.top_logits import final_norm, output_embedding, top_logits, written
from latentprior.prior.glp import GLP
from latentprior.prior.normalizer import Normalizer
from latentprior.utils.errors import InputError

FAMILIES = ("llama", "gpt2", "gpt_neox", "opt", "gemma3", "falcon", "phi")
VOCAB = 320


def llm_with_gains(tiny_llm, family: str):
    """A tiny model whose norms have random weights and biases, in double precision."""
    model = copy.deepcopy(tiny_llm(family)).double()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            noise = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data = noise + (0.5 if "norm" in name or "ln" in name else 0)
    return model


def norm_of(model):
    """The final norm, by each family's own name."""
    decoder = model.get_submodule(find_blocks_at(model)[0].rpartition(".")[0])
    names = ("norm", "ln_f", "final_layer_norm", "final_layernorm")
    return next(getattr(decoder, name) for name in names if hasattr(decoder, name))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_final_norm_is_found_with_its_gain(family, tiny_llm):
    model = llm_with_gains(tiny_llm, family)
    norm = norm_of(model)
    gain, centred = final_norm(model, 32)
    assert centred == isinstance(norm, torch.nn.LayerNorm)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if centred:
        x = x - x.mean(dim=1, keepdim=True)
    wanted = x / x.square().mean(dim=1, keepdim=True).sqrt() * gain
    bias = getattr(norm, "bias", None)
    torch.testing.assert_close(norm(x), wanted + (0 if bias is None else bias), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("whitened", [False, True])
def test_effects_equal_finite_differences_through_denoiser_and_model(family, whitened, tiny_llm, tiny_glp):
    """A step of one unit, taken through W_down, final LayerNorm, W_out, statistics, final norm and head.

    From a point orthogonal to the step both norms are odd functions along it, and linear but for a common factor: the
    difference of a step up and one down is exact at any size.
    """
    model, glp = llm_with_gains(tiny_llm, family), tiny_glp(32, (2,)).double()
    glp.denoiser.ln.weight.data = torch.rand(64, generator=torch.Generator().manual_seed(3)).double() + 0.5
    if whitened:
        rows = torch.randn(200, 32, generator=torch.Generator().manual_seed(2)) @ torch.randn(
            32, 32, generator=torch.Generator().manual_seed(4)
        )
        moments, covariance = Moments((2,), 32), Covariance((2,), 32)
        for part in (moments, covariance):
            part.update(rows, torch.full((200,), 2))
        glp = GLP(glp.denoiser, Normalizer.whitened(moments, covariance.covariance()).double(), glp.hookpoints)
    found = top_logits(glp, model, glp.hookpoints[0], VOCAB)
    head, norm, denoiser = model.get_output_embeddings(), norm_of(model), glp.denoiser
    generator = torch.Generator().manual_seed(0)
    for unit in (0, 100, 200):
        column = denoiser.layers[unit // 128].down_proj.weight[:, unit % 128]
        state = torch.randn(64, generator=generator, dtype=torch.float64)
        state = orthogonal(state - state.mean(), column - column.mean())

        def velocity(step: float, state=state, column=column):
            return denoiser.out_proj(denoiser.ln(state + step * column))

        # The denoised activation is z_t - t u: what the velocity gains, it loses.
        raw = glp.normalizer.denormalize(-velocity(0.5)) - glp.normalizer.denormalize(-velocity(-0.5))
        raw = raw / raw.norm()
        base = torch.randn(32, generator=generator, dtype=torch.float64)
        if isinstance(norm, torch.nn.LayerNorm):
            base = orthogonal(base - base.mean(), raw - raw.mean())
        else:
            base = orthogonal(base, raw)
        logits = head(norm(base + raw)) - head(norm(base - raw))
        logits = logits - logits.mean()
        wanted = (logits / logits.square().mean().sqrt()).numpy()
        effect = np.zeros(VOCAB)
        effect[found.promoted[unit]] = found.promoted_values[unit]
        np.testing.assert_allclose(effect, wanted, atol=2e-3)
        assert found.promoted_values[unit, 0] == effect.max() and found.suppressed_values[unit, 0] == effect.min()
        assert found.suppressed[unit, 0] == effect.argmin()


def orthogonal(x: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    return x - (x @ direction) / (direction @ direction) * direction


def test_chunks_do_not_matter_and_the_vocabulary_is_cut(monkeypatch, tiny_llm, tiny_glp):
    model, glp = tiny_llm("llama"), tiny_glp(32, (2,))
    whole = top_logits(glp, model, glp.hookpoints[0], 5)
    monkeypatch.setattr(module, "_CELLS", 3 * VOCAB)
    for a, b in zip(
        dataclasses.astuple(whole), dataclasses.astuple(top_logits(glp, model, glp.hookpoints[0], 5)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert whole.promoted.shape == (256, 5)
    cut = top_logits(glp, model, glp.hookpoints[0], 400, vocabulary=50)
    assert cut.promoted.shape == (256, 50) and int(cut.promoted.max()) == 49
    assert cut.promoted_values.square().mean(dim=1).sqrt() == pytest.approx(1, abs=1e-4)


def test_a_unit_that_writes_nothing_promotes_nothing(tiny_llm, tiny_glp):
    model, glp = tiny_llm("llama"), tiny_glp(32, (2,))
    glp.denoiser.layers[1].down_proj.weight.data[:, 3] = 0
    found = top_logits(glp, model, glp.hookpoints[0], 5)
    assert not found.promoted_values[131].any() and found.promoted_values.isfinite().all()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_hidden_units_of_an_mlp_go_through_its_down_projection(family, tiny_llm, tiny_glp):
    model = tiny_llm(family)
    point = Hookpoint.of(model, 2, "mlp")
    glp = tiny_glp(point.width, (2,))
    found = written(glp, model, point, None)
    plain = written(glp, model, dataclasses.replace(point, side="output"), None)
    block = hooks.find_blocks(model)[2]
    matrix = block.mlp.down_proj.weight.T if family == "llama" else block.mlp.c_proj.weight
    torch.testing.assert_close(found, plain @ matrix, rtol=1e-4, atol=1e-6)
    assert top_logits(glp, model, point, 3).promoted.shape == (2 * 4 * point.width, 3)


def test_models_without_a_head_are_refused(tiny_llm, tiny_glp):
    with pytest.raises(InputError, match="output embedding"):
        output_embedding(tiny_llm("llama").model)
    glp = tiny_glp(16, (2,))
    with pytest.raises(InputError, match="16"):
        top_logits(glp, tiny_llm("llama"), Hookpoint("", 2, 16), 3)
