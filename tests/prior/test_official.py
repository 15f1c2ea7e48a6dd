"""Official checkpoints and activation folders: read as they are, written back the same, refused when wrong."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from latentprior.config import DenoiserConfig
from latentprior.lm.hooks import Hookpoint
from latentprior.prior.denoiser import Denoiser
from latentprior.prior.official.activations import read_activations, read_statistics, write_activations
from latentprior.prior.official.checkpoint import OfficialCheckpoint, read_checkpoint, write_checkpoint
from latentprior.utils.errors import InputError

GOLDEN = Path(__file__).parents[1] / "golden" / "official-single-layer"
D = 4


def assert_one_line(caught: pytest.ExceptionInfo[InputError], *parts: object) -> None:
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the golden checkpoint that a test may damage."""
    return Path(shutil.copytree(GOLDEN, tmp_path / "prior"))


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    values = yaml.safe_load((folder / "config.yaml").read_text())
    edit(values)
    (folder / "config.yaml").write_text(yaml.safe_dump(values))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "final.safetensors")
    edit(weights)
    save_file(weights, folder / "final.safetensors")


def multi_layer(n_layers: int = 3) -> tuple[DenoiserConfig, dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Shape, random weights and statistics of a tiny multi-layer prior."""
    config = DenoiserConfig(d_input=D, d_model=8, d_mlp=16, n_layers=2, multi_layer_n_layers=n_layers)
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in Denoiser(config).state_dict().items()}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    mean, var = torch.randn(n_layers, D, generator=generator), torch.rand(n_layers, D, generator=generator)
    return config, weights, mean, var


def hookpoints(*layers: int, width: int = D) -> list[Hookpoint]:
    return [Hookpoint("a/model", layer, width, path=f"transformer.h.{layer}") for layer in layers]


def assert_same(a: OfficialCheckpoint, b: OfficialCheckpoint) -> None:
    assert a.config == b.config
    assert a.weights.keys() == b.weights.keys()
    for name, tensor in a.weights.items():
        assert torch.equal(tensor, b.weights[name]), name
    assert torch.equal(a.mean, b.mean) and torch.equal(a.var, b.var)
    assert a.statistics_layers == b.statistics_layers
    assert a.hookpoints == b.hookpoints


# -- checkpoints ---------------------------------------------------------------------------------------------------


def test_golden_folder_is_read_as_it_is():
    prior = read_checkpoint(GOLDEN)
    assert prior.config == DenoiserConfig(d_input=24, d_model=48, d_mlp=96, n_layers=3)
    assert prior.hookpoints == (Hookpoint("meta-llama/Llama-3.2-1B", 5, 24, "output", "model.layers.5"),)
    assert prior.statistics_layers == [5]
    assert prior.provenance == {"format": "official", "run_name": "golden", "checkpoint": "final"}
    statistics = torch.load(GOLDEN / "rep_statistics.pt", weights_only=True)
    assert torch.equal(prior.mean, statistics["mean"][None]) and torch.equal(prior.var, statistics["var"][None])
    raw = load_file(GOLDEN / "final.safetensors")
    assert {f"model.{name}" for name in prior.weights} == set(raw)
    assert all(torch.equal(tensor, raw[f"model.{name}"]) for name, tensor in prior.weights.items())


def test_golden_folder_written_again_has_the_same_files(tmp_path: Path):
    prior = read_checkpoint(GOLDEN)
    written = write_checkpoint(
        tmp_path / "new" / "prior",
        config=prior.config,
        weights=prior.weights,
        mean=prior.mean,
        var=prior.var,
        hookpoints=prior.hookpoints,
    )
    assert_same(read_checkpoint(written), prior)
    before, after = load_file(GOLDEN / "final.safetensors"), load_file(written / "final.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    before, after = (torch.load(f / "rep_statistics.pt", weights_only=True) for f in (GOLDEN, written))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    before, after = (yaml.safe_load((f / "config.yaml").read_text()) for f in (GOLDEN, written))
    assert before == after | {"run_name": "golden"}
    assert sorted(p.name for p in written.iterdir()) == ["config.yaml", "final.safetensors", "rep_statistics.pt"]


def test_multi_layer_round_trip_is_exact(tmp_path: Path):
    config, weights, mean, var = multi_layer()
    write_checkpoint(tmp_path, config=config, weights=weights, mean=mean, var=var, hookpoints=hookpoints(0, 1, 2))
    prior = read_checkpoint(tmp_path)
    expected = OfficialCheckpoint(config, weights, mean, var, [0, 1, 2], tuple(hookpoints(0, 1, 2)), {})
    assert_same(prior, expected)


def test_layers_without_statistics_are_rows_of_nan(tmp_path: Path):
    config, weights, mean, var = multi_layer(5)
    write_checkpoint(tmp_path, config=config, weights=weights, mean=mean[:2], var=var[:2], hookpoints=hookpoints(3, 1))
    table = torch.load(tmp_path / "rep_statistics.pt", weights_only=True)["mean"]  # the official code indexes by layer
    assert torch.equal(table[[3, 1]], mean[:2]) and table[[0, 2, 4]].isnan().all()
    prior = read_checkpoint(tmp_path)
    assert prior.statistics_layers == [1, 3]
    assert torch.equal(prior.mean, mean[[1, 0]]) and torch.equal(prior.var, var[[1, 0]])
    assert prior.hookpoints == tuple(hookpoints(1, 3))


@pytest.mark.parametrize(
    ("rows", "traced", "layers"),
    [
        ([0, 1, 2], [0, 1, 2], [0, 1, 2]),
        ([0, 1, 2], [1], [0, 1, 2]),  # a row for every layer, whichever were traced last
        ([0, 1, 2], [2, 1, 0], [0, 1, 2]),  # rows are looked up by layer
        ([0, 1], [2, 0], [2, 0]),  # a row for each traced layer
        ([1], [1], [0, 1, 2]),  # one row for all
        (1, [1], [0, 1, 2]),
        ([0, 1], [1], None),
        ([0, 1, 2, 2], [1], None),
    ],
)
def test_rows_of_multi_layer_statistics(tmp_path: Path, rows: Any, traced: list[int], layers: list[int] | None):
    config, weights, mean, var = multi_layer()
    write_checkpoint(tmp_path, config=config, weights=weights, mean=mean, var=var, hookpoints=hookpoints(0, 1, 2))
    torch.save({"mean": mean[rows], "var": var[rows]}, tmp_path / "rep_statistics.pt")
    edit_config(tmp_path, lambda values: values["glp_kwargs"]["tracedict_config"].update(layers=traced))
    if layers is None:
        with pytest.raises(InputError) as caught:
            read_checkpoint(tmp_path)
        assert_one_line(caught, "rep_statistics.pt", f"{len(rows)} layers", "3")
        return
    prior = read_checkpoint(tmp_path)
    assert prior.statistics_layers == layers
    assert torch.equal(prior.mean, mean[rows].expand(3, D) if len(layers) != len(np.atleast_1d(rows)) else mean[rows])
    assert [h.layer for h in prior.hookpoints] == layers


@pytest.mark.parametrize("shape", [(24,), (1, 24), (1, 1, 24)])
def test_single_layer_statistics_of_any_shape(folder: Path, shape: tuple[int, ...]):
    mean, var = torch.arange(24.0), torch.arange(1.0, 25.0)
    torch.save({"mean": mean.view(shape), "var": torch.nn.Buffer(var.view(shape))}, folder / "rep_statistics.pt")
    prior = read_checkpoint(folder)
    assert torch.equal(prior.mean, mean[None]) and torch.equal(prior.var, var[None])
    assert type(prior.var) is torch.Tensor


@pytest.mark.parametrize(
    "traced",
    [
        None,
        {},
        "model.layers.5",
        {"layer_prefix": "model.layers", "layers": [], "retain": "output"},
        {"layer_prefix": "model.layers", "layers": 5, "retain": "output"},
        {"layer_prefix": "model.layers", "layers": [-5], "retain": "output"},
        {"layer_prefix": "model.layers", "layers": ["embed"], "retain": "output"},
        {"layer_prefix": "model.layers", "layers": [5], "retain": "both"},
        {"layers": ["model.layers.5", "model.blocks.6"], "retain": "output"},
        {"layer_prefix": "model.layers", "layers": [5, 5], "retain": "output"},
    ],
)
def test_without_a_usable_trace_there_is_no_hookpoint(folder: Path, traced: object):
    edit_config(folder, lambda values: values["glp_kwargs"].update(tracedict_config=traced))
    prior = read_checkpoint(folder)
    assert prior.statistics_layers == [0] and prior.hookpoints == ()


def test_hookpoint_on_an_input_named_in_full_of_an_unknown_model(folder: Path):
    edit_config(folder, lambda values: values.pop("model_name"))
    traced = {"layers": ["transformer.h.7"], "retain": "input"}
    edit_config(folder, lambda values: values["glp_kwargs"].update(tracedict_config=traced))
    assert read_checkpoint(folder).hookpoints == (Hookpoint("", 7, 24, "input", "transformer.h.7"),)


def test_intermediate_checkpoints(folder: Path):
    (folder / "checkpoints").mkdir()
    shutil.copy(folder / "final.safetensors", folder / "checkpoints" / "epoch_16.safetensors")
    shutil.move(folder / "expected.safetensors", folder / "epoch_1.safetensors")
    edit_weights(folder, lambda weights: weights["model.in_proj.bias"].zero_())
    assert read_checkpoint(folder).weights["in_proj.bias"].count_nonzero() == 0
    prior = read_checkpoint(folder, "epoch_16")
    assert prior.weights["in_proj.bias"].count_nonzero() > 0 and prior.provenance["checkpoint"] == "epoch_16"
    with pytest.raises(InputError) as caught:
        read_checkpoint(folder, "epoch_61")
    assert_one_line(caught, "epoch_61", "did you mean", "final, epoch_1, epoch_16")


@pytest.mark.parametrize("name", ["../prior/final", "checkpoints/../final", "..", "", ".", "/etc/final", "*", "a\\b"])
def test_names_cannot_leave_the_folder(folder: Path, name: str):
    with pytest.raises(InputError) as caught:
        read_checkpoint(folder, name)
    assert_one_line(caught, "unknown checkpoint")


class Touch:
    """What a hostile pickle holds: loading it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], object], tuple[Path]]:
        return Path.touch, (self.path,)


def test_malicious_yaml_is_never_executed(folder: Path, tmp_path: Path):
    victim = tmp_path / "executed"
    config = folder / "config.yaml"
    good = config.read_text()
    for tag in (
        f"!!python/object/apply:os.system ['touch {victim}']",
        f"!!python/object/new:os.system ['touch {victim}']",
        f"!!python/object/apply:subprocess.check_output [['touch', '{victim}']]",
        "!!python/name:os.system",
        "!!python/module:os",
    ):
        config.write_text(f"{good}\nextra: {tag}\n")
        with pytest.raises(InputError) as caught:
            read_checkpoint(folder)
        assert_one_line(caught, config)
    assert not victim.exists()


def test_paths_that_omegaconf_wrote_are_text(folder: Path):
    config = folder / "config.yaml"
    tag = "!!python/object/apply:pathlib.PosixPath\n- /\n- runs\n- golden\n"
    config.write_text(config.read_text().replace("run_name: golden", f"run_name: {tag}"))
    assert read_checkpoint(folder).provenance["run_name"] == "/runs/golden"
    config.write_text(config.read_text().replace(tag, "!!python/object/apply:pathlib.Path {a: 1}\n"))
    with pytest.raises(InputError) as caught:
        read_checkpoint(folder)
    assert_one_line(caught, config)


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))])
def test_malicious_pickle_is_never_executed(folder: Path, tmp_path: Path, write: Callable[[object, Path], object]):
    victim = tmp_path / "executed"
    write({"mean": torch.zeros(24), "var": Touch(victim)}, folder / "rep_statistics.pt")
    with pytest.raises(InputError) as caught:
        read_checkpoint(folder)
    assert_one_line(caught, folder / "rep_statistics.pt")
    assert not victim.exists()


@pytest.mark.parametrize("name", ["config.yaml", "rep_statistics.pt", "final.safetensors"])
@pytest.mark.parametrize("fault", ["missing", "empty", "truncated", "garbage"])
def test_damaged_files_are_named(folder: Path, name: str, fault: str):
    path = folder / name
    data = path.read_bytes()
    path.unlink()
    if fault != "missing":
        path.write_bytes({"empty": b"", "truncated": data[: len(data) // 3], "garbage": b"\x80\x02]\x00\xff{"}[fault])
    with pytest.raises(InputError) as caught:
        read_checkpoint(folder)
    assert_one_line(caught, path if fault != "missing" or name != "final.safetensors" else "final")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("d_model", None, "denoiser_config.d_model must be an integer"),
        ("d_model", "48", "denoiser_config.d_model must be an integer"),
        ("d_model", True, "denoiser_config.d_model must be an integer"),
        ("d_model", -48, "must be positive"),
        ("d_modle", 48, "did you mean 'd_model'"),
        ("d_input", 25, "do not fit width 25"),
        ("d_mlp", 97, "(96, 48), not (97, 48)"),
        ("n_layers", 4, "model.layers.3.down_proj.bias is missing"),
        ("n_layers", 2, "model.layers.2.down_proj.bias is unexpected"),
        ("multi_layer_n_layers", 8, "model.layer_embed.0.bias is missing"),
    ],
)
def test_configuration_that_does_not_fit(folder: Path, key: str, value: object, words: str):
    edit_config(folder, lambda values: values["glp_kwargs"]["denoiser_config"].update({key: value}))
    with pytest.raises(InputError) as caught:
        read_checkpoint(folder)
    assert_one_line(caught, words, folder)


@pytest.mark.parametrize("text", ["", "[]", "glp_kwargs: 3", "glp_kwargs: {}", "glp_kwargs: {denoiser_config: []}"])
def test_configuration_of_something_else(folder: Path, text: str):
    (folder / "config.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        read_checkpoint(folder)
    assert_one_line(caught, folder / "config.yaml", "glp_kwargs")


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda weights: weights.pop("model.ln.bias"), "model.ln.bias is missing from"),
        (lambda weights: weights.update({"model.extra": torch.zeros(1)}), "model.extra is unexpected in"),
        (lambda weights: weights.update({"model.ln.bias": torch.zeros(1, 48)}), "model.ln.bias is (1, 48), not (48,)"),
        (lambda weights: weights.update({"ln.bias": weights.pop("model.ln.bias")}), "ln.bias"),
    ],
)
def test_weights_that_do_not_fit(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object], words: str):
    edit_weights(folder, edit)
    with pytest.raises(InputError) as caught:
        read_checkpoint(folder)
    assert_one_line(caught, words, folder / "final.safetensors")


@pytest.mark.parametrize(
    "statistics",
    [
        {"mean": torch.zeros(24)},
        {"mean": torch.zeros(24), "var": 1.0},
        [torch.zeros(24), torch.zeros(24)],
        {"mean": torch.zeros(24), "var": torch.zeros(1, 24)},
        {"mean": torch.zeros(23), "var": torch.zeros(23)},
        {"mean": torch.zeros(()), "var": torch.zeros(())},
        {"mean": torch.zeros(0, 24), "var": torch.zeros(0, 24)},
        {"mean": torch.zeros(2, 24), "var": torch.zeros(2, 24)},
        {"mean": torch.zeros(24, dtype=torch.int64), "var": torch.zeros(24)},
        {"mean": torch.full((24,), float("nan")), "var": torch.zeros(24)},
    ],
)
def test_statistics_that_do_not_fit(folder: Path, statistics: object):
    torch.save(statistics, folder / "rep_statistics.pt")
    with pytest.raises(InputError) as caught:
        read_checkpoint(folder)
    assert_one_line(caught, folder / "rep_statistics.pt")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mean": torch.zeros(2, D), "var": torch.zeros(2, D)}, "do not fit a prior for 3 layers"),
        ({"mean": torch.zeros(3, D + 1), "var": torch.zeros(3, D + 1)}, "do not fit a prior for 3 layers"),
        ({"weights": {}}, "missing from the given weights"),
        ({"hookpoints": hookpoints(0, 1, 3)}, "0..2"),
        ({"hookpoints": hookpoints(0, 1, 1)}, "must differ"),
        ({"hookpoints": [*hookpoints(0, 1), Hookpoint("a/model", 2, D)]}, "layer 2 has path ''"),
        ({"hookpoints": [*hookpoints(0, 1), Hookpoint("b", 2, D, path="transformer.h.2")]}, "one side of one model"),
        ({"statistics_layers": [0, 1]}, "of layers [0, 1] do not fit"),
    ],
)
def test_what_the_format_cannot_hold_is_not_written(tmp_path: Path, change: dict[str, Any], words: str):
    config, weights, mean, var = multi_layer()
    parts = {"weights": weights, "mean": mean, "var": var, "hookpoints": hookpoints(0, 1, 2)} | change
    with pytest.raises(InputError) as caught:
        write_checkpoint(tmp_path / "prior", config=config, **parts)
    assert_one_line(caught, words)
    assert not (tmp_path / "prior").exists()


# -- activation folders --------------------------------------------------------------------------------------------


def lay_out(folder: Path, files: list[np.ndarray], index: list[tuple[int, int, int]], dtype: str) -> Path:
    """An activation folder as the official writer makes it: preallocated maps, the index by np.save."""
    folder.mkdir(parents=True)
    for number, content in enumerate(files):
        whole = np.memmap(folder / f"data_{number:04d}.npy", content.dtype, "w+", shape=content.size + 7)
        whole[: content.size] = content
        whole.flush()
    np.save(folder / "data_indices.npy", np.array(index, dtype=np.uint64))
    (folder / "dtype.txt").write_text(dtype)
    return folder


@pytest.fixture
def activations(tmp_path: Path) -> Path:
    """Five rows of width 3 in two files, float32."""
    files = [np.arange(9, dtype=np.float32), np.arange(100, 106, dtype=np.float32)]
    places = [(0, 0, 3), (0, 3, 6), (0, 6, 9), (1, 0, 3), (1, 3, 6)]
    return lay_out(tmp_path / "layer_07", files, places, "float32")


def test_rows_come_in_the_order_asked(activations: Path):
    data = read_activations(activations)
    assert (len(data), data.width, data.layer, data.dtype) == (5, 3, 7, torch.float32)
    expected = torch.tensor([[103.0, 104, 105], [0, 1, 2], [100, 101, 102], [0, 1, 2]])
    for indices in ([4, 0, 3, 0], torch.tensor([4, 0, 3, 0]), np.array([4, 0, 3, 0], dtype=np.int32)):
        assert torch.equal(data.rows(indices), expected)
    assert data.rows([]).shape == (0, 3)
    assert torch.equal(data.rows(range(5))[:, 0], torch.tensor([0.0, 3, 6, 100, 103]))


def test_rows_may_begin_anywhere(tmp_path: Path):
    places = [(0, 5, 8), (0, 1, 4), (0, 2, 5)]  # between multiples of the width, and overlapping
    data = read_activations(lay_out(tmp_path / "x", [np.arange(9, dtype=np.float32)], places, "np.float32\n"))
    assert data.layer is None
    assert torch.equal(data.rows([0, 1, 2]), torch.tensor([[5.0, 6, 7], [1, 2, 3], [2, 3, 4]]))


def test_int16_is_bfloat16_bits(tmp_path: Path):
    x = torch.tensor([[1.5, -2.0], [torch.inf, 3e38]], dtype=torch.bfloat16)
    bits = x.view(torch.int16).numpy().ravel()
    rows = read_activations(lay_out(tmp_path / "x", [bits], [(0, 0, 2), (0, 2, 4)], "int16")).rows([0, 1])
    assert rows.dtype == torch.bfloat16 and torch.equal(rows, x)


def test_float16_is_read_as_float32(tmp_path: Path):
    x = np.array([0.1, 65504.0], dtype=np.float16)
    rows = read_activations(lay_out(tmp_path / "x", [x], [(0, 0, 2)], "float16")).rows([0])
    assert rows.dtype == torch.float32 and np.array_equal(rows[0].numpy(), x.astype(np.float32))


def test_index_without_a_header(activations: Path):
    expected = read_activations(activations).rows(range(5))
    np.load(activations / "data_indices.npy").tofile(activations / "data_indices.npy")
    assert torch.equal(read_activations(activations).rows(range(5)), expected)


@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(1, 12),
    d=st.integers(1, 5),
    file_rows=st.integers(1, 13),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    seed=st.integers(0, 2**31),
)
def test_round_trip(tmp_path_factory, n: int, d: int, file_rows: int, dtype: torch.dtype, seed: int):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator)
    folder = write_activations(tmp_path_factory.mktemp("x") / "layer_3", x, dtype=dtype, file_rows=file_rows)
    data = read_activations(folder)
    assert (len(data), data.width, data.layer, data.dtype) == (n, d, 3, dtype)
    assert len(list(folder.glob("data_0*.npy"))) == -(-n // file_rows)
    order = torch.randint(n, (2 * n,), generator=generator)
    assert torch.equal(data.rows(order), x.to(dtype)[order])
    (mean,), (var,) = read_statistics(folder / "rep_statistics.pt", d)
    stored = x.to(dtype).double()
    torch.testing.assert_close(mean.double(), stored.mean(0), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(var.double(), stored.var(0, correction=0), rtol=1e-6, atol=1e-7)


def test_written_folder_is_laid_out_as_the_official_writer_does(tmp_path: Path):
    x = torch.arange(10.0).view(5, 2)
    folder = write_activations(tmp_path / "x", x, file_rows=3)
    assert sorted(p.name for p in folder.iterdir()) == [
        "data_0000.npy",
        "data_0001.npy",
        "data_indices.npy",
        "dtype.txt",
        "rep_statistics.pt",
    ]
    assert (folder / "dtype.txt").read_text().strip() == "int16"
    index = np.load(folder / "data_indices.npy")
    assert index.dtype == np.uint64
    assert index.tolist() == [[0, 0, 2], [0, 2, 4], [0, 4, 6], [1, 0, 2], [1, 2, 4]]
    second = np.fromfile(folder / "data_0001.npy", np.int16)
    assert torch.equal(torch.from_numpy(second).view(torch.bfloat16).float(), torch.tensor([6.0, 7, 8, 9]))


def test_what_cannot_be_written(tmp_path: Path):
    x = torch.ones(2, 3)
    for dtype, rows, words in (
        (torch.float16, x, "unknown storage type 'float16'"),
        (torch.float64, x, "unknown storage type 'float64'"),
        (torch.bfloat16, x[:0], "nothing to write"),
    ):
        with pytest.raises(InputError) as caught:
            write_activations(tmp_path / "x", rows, dtype=dtype)
        assert_one_line(caught, words)
        assert not (tmp_path / "x").exists()
    write_activations(tmp_path / "x", x)
    with pytest.raises(InputError) as caught:
        write_activations(tmp_path / "x", 2 * x)
    assert_one_line(caught, tmp_path / "x", "already")
    assert torch.equal(read_activations(tmp_path / "x").rows([0, 1]).float(), x)


@pytest.mark.parametrize("indices", [[5], [-1], [0, 4, 5]])
def test_index_out_of_range(activations: Path, indices: list[int]):
    with pytest.raises(InputError) as caught:
        read_activations(activations).rows(indices)
    assert_one_line(caught, activations, "rows 0 to 4")


@pytest.mark.parametrize(
    ("places", "name", "words"),
    [
        ([(0, 0, 3), (0, 3, 5)], "data_indices.npy", "unequal width, from 2 to 3"),
        ([(0, 0, 3), (0, 15, 18)], "data_0000.npy", "end at element 18, it holds 16"),
        ([(0, 0, 3), (2, 0, 3)], "data_0002.npy", "missing"),
        ([(0, 3, 0)], "data_indices.npy", "damaged"),
        ([(0, 3, 3)], "data_indices.npy", "damaged"),
        ([(0, 2**64 - 3, 2**64 - 1)], "data_indices.npy", "damaged"),
        ([(2**40, 0, 3)], f"data_{2**40}.npy", "missing"),
    ],
)
def test_rows_that_cannot_be_there(activations: Path, places: list[tuple[int, int, int]], name: str, words: str):
    np.save(activations / "data_indices.npy", np.array(places, dtype=np.uint64))
    with pytest.raises(InputError) as caught:
        read_activations(activations)
    assert_one_line(caught, activations / name, words)


@pytest.mark.parametrize("name", ["data_0001.npy", "data_indices.npy", "dtype.txt"])
@pytest.mark.parametrize("fault", ["missing", "empty", "truncated"])
def test_damaged_activation_files_are_named(activations: Path, name: str, fault: str):
    path = activations / name
    data = path.read_bytes()
    path.unlink()
    if fault != "missing":
        path.write_bytes(data[: len(data) // 3] if fault == "truncated" else b"")
    with pytest.raises(InputError) as caught:
        read_activations(activations)
    assert_one_line(caught, path)


@pytest.mark.parametrize("array", [np.zeros((2, 3)), np.zeros((2, 2), np.uint64), np.zeros((0, 3), np.uint64)])
def test_index_of_another_kind(activations: Path, array: np.ndarray):
    np.save(activations / "data_indices.npy", array)
    with pytest.raises(InputError) as caught:
        read_activations(activations)
    assert_one_line(caught, activations / "data_indices.npy")


def test_pickled_index_is_never_loaded(activations: Path, tmp_path: Path):
    victim = tmp_path / "executed"
    np.save(activations / "data_indices.npy", np.array([Touch(victim)], dtype=object), allow_pickle=True)
    with pytest.raises(InputError) as caught:
        read_activations(activations)
    assert_one_line(caught, activations / "data_indices.npy")
    assert not victim.exists()


def test_unknown_storage_type(activations: Path):
    (activations / "dtype.txt").write_text("floot32")
    with pytest.raises(InputError) as caught:
        read_activations(activations)
    assert_one_line(caught, activations / "dtype.txt", "did you mean 'float32'")


def test_statistics_missing(tmp_path: Path):
    with pytest.raises(InputError) as caught:
        read_statistics(tmp_path / "rep_statistics.pt", 3)
    assert_one_line(caught, tmp_path / "rep_statistics.pt", "missing")
