"""Conversion between this project's files and the official ones loses nothing that both can hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from latentprior.config import ConvertConfig
from latentprior.data.activations import ActivationBatch
from latentprior.data.store.reader import ActivationStore
from latentprior.data.store.writer import StoreWriter
from latentprior.lm.hooks import Hookpoint
from latentprior.prior.glp import GLP
from latentprior.prior.normalizer import Normalizer
from latentprior.prior.official import convert as convert_module
from latentprior.prior.official.activations import (
    OfficialActivations,
    read_activations,
    read_statistics,
    write_activations,
)
from latentprior.prior.official.checkpoint import read_checkpoint
from latentprior.prior.official.convert import convert
from latentprior.utils.errors import InputError

GOLDEN = Path(__file__).parents[1] / "golden" / "official-single-layer"


def test_prior_to_ours_and_back(tmp_path):
    convert(ConvertConfig(source=str(GOLDEN), output=str(tmp_path / "ours")))
    convert(ConvertConfig(source=str(tmp_path / "ours"), output=str(tmp_path / "official"), to="official"))
    before, after = read_checkpoint(GOLDEN), read_checkpoint(tmp_path / "official")
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
    with pytest.raises(InputError, match="whitened"):
        convert(ConvertConfig(source=str(tmp_path / "ours"), output=str(tmp_path / "x"), to="official"))
    assert not (tmp_path / "x").exists()
    convert(ConvertConfig(source=str(tmp_path / "ours"), output=str(tmp_path / "copy")))
    copy = GLP.from_pretrained(tmp_path / "copy")
    assert torch.equal(copy.sample(2, generator=0), glp.sample(2, generator=0))


def official_folder(folder: Path, rows: int = 500, width: int = 6) -> torch.Tensor:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).bfloat16()
    write_activations(folder, x)
    return x


def test_activations_to_a_store_and_back(tmp_path):
    x = official_folder(tmp_path / "layer_03")
    convert(ConvertConfig(source=str(tmp_path / "layer_03"), output=str(tmp_path / "store"), model="a/b"))
    store = ActivationStore(tmp_path / "store", verify="full")
    assert (store.hookpoints[0].model, store.layers) == ("a/b", (3,))
    assert torch.equal(store.rows(torch.arange(len(x))), x)
    convert(ConvertConfig(source=str(tmp_path / "store"), output=str(tmp_path / "back"), to="official"))
    assert torch.equal(read_activations(tmp_path / "back").rows(torch.arange(len(x))).bfloat16(), x)


def test_rows_that_a_store_refuses_are_counted(tmp_path):
    x = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    x[7] *= 1000
    x[9, 2] = float("nan")
    write_activations(tmp_path / "layer_03", x, dtype=torch.float32)
    convert(ConvertConfig(source=str(tmp_path / "layer_03"), output=str(tmp_path / "store")))
    store = ActivationStore(tmp_path / "store")
    left_out = {"sinks": 1, "nonfinite": 1, "cut_documents": 0, "cut_tokens": 0}
    assert (len(store), store.manifest["left_out"]) == (498, left_out)


def test_sinks_are_told_by_the_median_of_all_rows_and_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(convert_module, "CHUNK", 100)
    x = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    x[:100] /= 100  # other documents: the first part alone would make sinks of all others
    x[[7, 450]] *= 1e4
    x[[9, 300], 2] = float("nan")
    write_activations(tmp_path / "layer_03", x, dtype=torch.float32)
    result = convert(ConvertConfig(source=str(tmp_path / "layer_03"), output=str(tmp_path / "store")))
    store = ActivationStore(tmp_path / "store")
    left_out = {"sinks": 2, "nonfinite": 2, "cut_documents": 0, "cut_tokens": 0}
    assert (len(store), store.manifest["left_out"]) == (496, left_out)
    assert (result["rows"], result["attention sinks left out"], result["not finite, left out"]) == (496, 2, 2)
    norms = x.norm(dim=1)
    assert float(store.moments().median_norm) == pytest.approx(float(norms.nanmedian()), rel=0.1)
    assert result["median norm"].endswith("of 99 rows")  # one in five, without one that is not finite


def test_both_directions_hold_a_part_of_the_rows_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(convert_module, "CHUNK", 64)
    x, asked = official_folder(tmp_path / "layer_03"), []
    for kind in (OfficialActivations, ActivationStore):
        rows = kind.rows
        monkeypatch.setattr(kind, "rows", lambda self, i, rows=rows: asked.append(len(i)) or rows(self, i))
    convert(ConvertConfig(source=str(tmp_path / "layer_03"), output=str(tmp_path / "store")))
    assert max(asked) == 64 and sum(asked) == 64 + len(x)
    asked.clear()
    convert(ConvertConfig(source=str(tmp_path / "store"), output=str(tmp_path / "back"), to="official"))
    assert max(asked) == 64 and sum(asked) == len(x)
    back = read_activations(tmp_path / "back")
    assert torch.equal(back.rows(torch.arange(len(x))), x)
    (mean,), (var,) = read_statistics(tmp_path / "back" / "rep_statistics.pt", x.shape[1])
    torch.testing.assert_close(mean, x.double().mean(0).float())
    torch.testing.assert_close(var, x.double().var(0, correction=0).float())


def test_one_layer_of_several(tmp_path):
    points = [Hookpoint("a/b", layer, 4) for layer in (1, 2)]
    layer, x = torch.tensor([1, 2]).repeat(30), torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    with StoreWriter(tmp_path / "store", points, source={}, dtype="float32") as writer:
        writer.append(ActivationBatch(x, layer, *[torch.arange(60)] * 3), next_batch=1, left_out={})
    config = ConvertConfig(source=str(tmp_path / "store"), output=str(tmp_path / "x"), to="official", layer=2)
    assert convert(config)["rows"] == 30
    assert torch.equal(read_activations(tmp_path / "x").rows(torch.arange(30)), x[layer == 2])
    for wrong, message in ((None, "--layer"), (3, "unknown layer '3'.*valid: 1, 2")):
        with pytest.raises(InputError, match=message):
            convert(replace(config, layer=wrong, output=str(tmp_path / "y")))


@pytest.mark.parametrize("kind", ["prior", "official prior", "store", "official activations"])
def test_nothing_is_overwritten_unasked(tmp_path, kind):
    official_folder(tmp_path / "layer_03")
    convert(ConvertConfig(source=str(tmp_path / "layer_03"), output=str(tmp_path / "recorded")))
    source = {"store": tmp_path / "layer_03", "official activations": tmp_path / "recorded"}.get(kind, GOLDEN)
    to = "official" if kind.startswith("official") else "latentprior"
    if kind == "official prior":
        source = convert(ConvertConfig(source=str(GOLDEN), output=str(tmp_path / "ours")))["written"]
    config = ConvertConfig(source=str(source), output=str(tmp_path / "out"), to=to)
    convert(config)
    before = contents(tmp_path / "out")
    with pytest.raises(InputError, match="--overwrite"):
        convert(config)
    (tmp_path / "out" / "config.json").write_text("of another format")
    convert(replace(config, overwrite=True))
    assert contents(tmp_path / "out") == before
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="notes.txt"):
        convert(replace(config, overwrite=True))
    assert contents(tmp_path / "out") == before | {"notes.txt": b"mine"}
    for output, message in ((source, "in place"), (tmp_path / "out" / "notes.txt", "is a file")):
        with pytest.raises(InputError, match=message):
            convert(replace(config, output=str(output), overwrite=True))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_messages(tmp_path):
    official_folder(tmp_path / "unnamed")
    with pytest.raises(InputError, match="--layer"):
        convert(ConvertConfig(source=str(tmp_path / "unnamed"), output=str(tmp_path / "store")))
    with pytest.raises(InputError, match="official activations"):
        convert(ConvertConfig(source=str(tmp_path / "unnamed"), output=str(tmp_path / "x"), to="official"))
    with pytest.raises(InputError, match="holds no prior"):
        convert(ConvertConfig(source=str(tmp_path), output=str(tmp_path / "x")))


def test_networks_that_the_official_format_cannot_hold_are_refused(tmp_path, tiny_glp):
    tiny_glp(8, skip="normal", modulation="norm").save_pretrained(tmp_path / "prior")
    with pytest.raises(InputError, match="the paper's network only, not skip 'normal' and modulation 'norm'"):
        convert(ConvertConfig(source=str(tmp_path / "prior"), output=str(tmp_path / "official"), to="official"))
    assert not (tmp_path / "official" / "config.yaml").exists()
