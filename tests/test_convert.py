"""Conversion between this project's files and the official ones loses nothing that both can hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from latentprior import official
from latentprior.config import ConvertConfig
from latentprior.convert import convert
from latentprior.errors import InputError
from latentprior.normalizer import Normalizer
from latentprior.prior import GLP
from latentprior.store import ActivationStore

GOLDEN = Path(__file__).parent / "data" / "official-single-layer"


def test_prior_to_ours_and_back(tmp_path):
    convert(ConvertConfig(source=str(GOLDEN), output=str(tmp_path / "ours")))
    convert(ConvertConfig(source=str(tmp_path / "ours"), output=str(tmp_path / "official"), to="official"))
    before, after = official.read_checkpoint(GOLDEN), official.read_checkpoint(tmp_path / "official")
    assert before.config == after.config
    assert all(torch.equal(tensor, after.weights[name]) for name, tensor in before.weights.items())
    assert torch.equal(before.mean, after.mean) and torch.equal(before.var, after.var)
    assert [h.layer for h in before.hookpoints] == [h.layer for h in after.hookpoints]
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
    a, b = GLP.from_pretrained(GOLDEN), GLP.from_pretrained(tmp_path / "ours")
    assert torch.equal(a.project(x, generator=0), b.project(x, generator=0))


def test_a_whitened_prior_is_not_written_officially(tiny_glp, tmp_path):
    glp = tiny_glp(4)
    old = glp.normalizer
    glp.normalizer = Normalizer(old.mean, old.var, old.layers.tolist(), basis=2 * torch.eye(4)[None])
    glp.save_pretrained(tmp_path / "ours")
    with pytest.raises(InputError, match="is whitened, and the official format"):
        convert(ConvertConfig(source=str(tmp_path / "ours"), output=str(tmp_path / "x"), to="official"))
    assert not (tmp_path / "x").exists()
    convert(ConvertConfig(source=str(tmp_path / "ours"), output=str(tmp_path / "copy")))
    copy = GLP.from_pretrained(tmp_path / "copy")
    assert torch.equal(copy.sample(2, generator=0), glp.sample(2, generator=0))


def official_folder(folder: Path, rows: int = 500, width: int = 6) -> torch.Tensor:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).bfloat16()
    official.write_activations(folder, x)
    return x


def test_activations_to_a_store_and_back(tmp_path):
    x = official_folder(tmp_path / "layer_03")
    convert(ConvertConfig(source=str(tmp_path / "layer_03"), output=str(tmp_path / "store"), model="a/b"))
    store = ActivationStore(tmp_path / "store", verify="full")
    assert (store.hookpoints[0].model, store.layers) == ("a/b", (3,))
    assert torch.equal(store.rows(torch.arange(len(x))), x)
    convert(ConvertConfig(source=str(tmp_path / "store"), output=str(tmp_path / "back"), to="official"))
    assert torch.equal(official.read_activations(tmp_path / "back").rows(torch.arange(len(x))).bfloat16(), x)


def test_rows_that_a_store_refuses_are_counted(tmp_path):
    x = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    x[7] *= 1000
    x[9, 2] = float("nan")
    official.write_activations(tmp_path / "layer_03", x, dtype=torch.float32)
    convert(ConvertConfig(source=str(tmp_path / "layer_03"), output=str(tmp_path / "store")))
    store = ActivationStore(tmp_path / "store")
    assert (len(store), store.manifest["left_out"]) == (498, {"sinks": 1, "nonfinite": 1})


def test_messages(tmp_path):
    official_folder(tmp_path / "unnamed")
    with pytest.raises(InputError, match="name it with --layer"):
        convert(ConvertConfig(source=str(tmp_path / "unnamed"), output=str(tmp_path / "store")))
    with pytest.raises(InputError, match="official activations already"):
        convert(ConvertConfig(source=str(tmp_path / "unnamed"), output=str(tmp_path / "x"), to="official"))
    with pytest.raises(InputError, match="holds no prior"):
        convert(ConvertConfig(source=str(tmp_path), output=str(tmp_path / "x")))
