"""Directions of other tools: the right layer of each, and nothing in a file is executed."""

from __future__ import annotations

import os
import pickle
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from conftest import write_repeng
from latentprior.lm.hooks import Hookpoint
from latentprior.steer.direction import Direction, write_direction
from latentprior.steer.foreign import read_foreign
from latentprior.utils.errors import InputError

WIDTH, LAYERS = 8, 4


@pytest.fixture(autouse=True)
def safe_globals_stay_as_they_were():
    before = set(torch.serialization.get_safe_globals())
    yield
    assert set(torch.serialization.get_safe_globals()) == before


def at(layer: int, side="output") -> Hookpoint:
    return Hookpoint("tiny", layer, WIDTH, side=side)


def table(rows: int) -> torch.Tensor:
    """Row i has norm i + 2 and a direction of its own."""
    x = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(0))
    return x / x.norm(dim=1, keepdim=True) * (torch.arange(rows) + 2.0)[:, None]


def is_row(direction: Direction, rows: torch.Tensor, i: int) -> bool:
    raw = direction.vector * direction.norm
    return direction.kind == "file" and torch.allclose(raw, rows[i].float(), atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_repengs_layer_is_the_blocks_output(tmp_path, dtype):
    rows = table(LAYERS)
    path = write_repeng(tmp_path / "happy.gguf", {i: rows[i].numpy().astype(dtype) for i in range(1, LAYERS)})
    expected = torch.from_numpy(rows.numpy().astype(dtype))
    direction = read_foreign(path, at(2))
    assert is_row(direction, expected, 2)
    assert direction.name == "happy" and direction.provenance["model_hint"] == "llama"
    assert is_row(read_foreign(path, at(2, "input")), expected, 1)
    with pytest.raises(InputError, match=r"direction\.0.*valid: direction\.1, direction\.2"):
        read_foreign(path, at(0))
    with pytest.raises(InputError, match="no block's output"):
        read_foreign(path, at(0, "input"))


def test_damaged_or_other_gguf_is_refused(tmp_path):
    path = write_repeng(tmp_path / "model.gguf", {1: table(2)[1].numpy()}, architecture="llama")
    with pytest.raises(InputError, match="'llama'"):
        read_foreign(path, at(1))
    whole = write_repeng(tmp_path / "v.gguf", {1: table(2)[1].numpy()}).read_bytes()
    for content in (b"", b"GGUF", whole[: len(whole) // 2], whole[:-4], b"nonsense" * 20):
        (tmp_path / "cut.gguf").write_bytes(content)
        with pytest.raises(InputError, match="cut.gguf"):
            read_foreign(tmp_path / "cut.gguf", at(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_persona_vectors_rows_are_hidden_states(tmp_path, dtype):
    rows = table(LAYERS + 1).to(dtype)
    path = tmp_path / "evil_response_avg_diff.pt"
    torch.save(rows, path)
    for layer in range(LAYERS):
        direction = read_foreign(path, at(layer), blocks=LAYERS)
        assert is_row(direction, rows, layer + 1)
        assert direction.provenance["after_final_norm"] == (layer == LAYERS - 1)
    assert is_row(read_foreign(path, at(0, "input"), blocks=LAYERS), rows, 0)
    with pytest.raises(InputError, match="layer 4 .*blocks=4"):
        read_foreign(path, at(LAYERS), blocks=LAYERS)


def save(rows: torch.Tensor, path: Path) -> Path:
    if path.suffix == ".pt":
        torch.save(rows, path)
    else:
        save_file({"v": rows}, path)
    return path


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_the_number_of_rows_says_which_row_is_a_layers(tmp_path, suffix):
    outputs = save(table(LAYERS), tmp_path / f"outputs{suffix}")
    states = save(table(LAYERS + 1), tmp_path / f"states{suffix}")
    for layer in range(LAYERS):
        assert is_row(read_foreign(outputs, at(layer), blocks=LAYERS), table(LAYERS), layer)
        assert is_row(read_foreign(states, at(layer), blocks=LAYERS), table(LAYERS + 1), layer + 1)
        assert is_row(read_foreign(states, at(layer, "input"), blocks=LAYERS), table(LAYERS + 1), layer)
    assert is_row(read_foreign(outputs, at(2, "input"), blocks=LAYERS), table(LAYERS), 1)
    with pytest.raises(InputError, match="no block's output"):
        read_foreign(outputs, at(0, "input"), blocks=LAYERS)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_rows_of_an_unknown_number_of_blocks_are_asked_for(tmp_path, suffix):
    path = save(table(LAYERS), tmp_path / f"v{suffix}")
    with pytest.raises(InputError, match="4 rows.*blocks="):
        read_foreign(path, at(1))
    with pytest.raises(InputError, match="4 rows.* 7 blocks"):
        read_foreign(path, at(1), blocks=7)


@pytest.fixture
def steering_vector_class():
    """steering-vectors' class under its own module path, for saving only."""

    @dataclass
    class SteeringVector:
        layer_activations: dict[int, torch.Tensor]
        layer_type: str = "decoder_block"

        def __setstate__(self, state):
            raise AssertionError("code of the class was run")

    names = ("steering_vectors", "steering_vectors.steering_vector")
    SteeringVector.__module__, SteeringVector.__qualname__ = names[1], "SteeringVector"
    modules = {name: types.ModuleType(name) for name in names}
    modules[names[1]].SteeringVector = SteeringVector
    sys.modules.update(modules)
    yield SteeringVector
    for name in names:
        del sys.modules[name]


def test_steering_vectors_object_is_read_without_its_class(tmp_path, steering_vector_class):
    rows = table(LAYERS)
    torch.save(steering_vector_class({i: rows[i] for i in range(LAYERS)}), tmp_path / "v.pt")
    torch.save(steering_vector_class({1: rows[1]}, "mlp"), tmp_path / "mlp.pt")
    assert is_row(read_foreign(tmp_path / "v.pt", at(2)), rows, 2)
    assert is_row(read_foreign(tmp_path / "v.pt", at(2, "input")), rows, 1)
    with pytest.raises(InputError, match="'7'"):
        read_foreign(tmp_path / "v.pt", at(7))
    with pytest.raises(InputError, match="'mlp'"):
        read_foreign(tmp_path / "mlp.pt", at(1))


def test_dictionary_of_layers_and_single_vector(tmp_path):
    rows = table(LAYERS)
    torch.save({i: rows[i] for i in range(LAYERS)}, tmp_path / "layers.pt")
    torch.save(rows[3], tmp_path / "one.pt")
    assert is_row(read_foreign(tmp_path / "layers.pt", at(2)), rows, 2)
    assert is_row(read_foreign(tmp_path / "one.pt", at(0)), rows, 3)


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("wrap", [lambda bad: bad, lambda bad: {2: torch.ones(WIDTH), 3: bad}, lambda bad: [bad]])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
def test_malicious_pickles_are_not_run(tmp_path, wrap, suffix, monkeypatch):
    marker = tmp_path / "ran"
    torch.save(wrap(Hostile(marker)), tmp_path / f"zip{suffix}")
    torch.save(wrap(Hostile(marker)), tmp_path / f"legacy{suffix}", _use_new_zipfile_serialization=False)
    (tmp_path / f"plain{suffix}").write_bytes(pickle.dumps(wrap(Hostile(marker))))
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    for name in ("zip", "legacy", "plain"):
        with pytest.raises(InputError, match="not opened") as caught:
            read_foreign(tmp_path / f"{name}{suffix}", at(2))
        assert "\n" not in str(caught.value)
    assert not marker.exists()
    pickle.loads((tmp_path / f"plain{suffix}").read_bytes())
    assert marker.exists(), "the file of this test is harmless"


def test_hostile_state_of_a_steering_vector_is_not_run(tmp_path, steering_vector_class):
    marker = tmp_path / "ran"
    torch.save(steering_vector_class({1: Hostile(marker)}), tmp_path / "v.pt")
    with pytest.raises(InputError, match="not opened"):
        read_foreign(tmp_path / "v.pt", at(1))
    torch.save(steering_vector_class({1: "no tensor"}), tmp_path / "v.pt")
    with pytest.raises(InputError, match="unknown layer"):
        read_foreign(tmp_path / "v.pt", at(1))
    assert not marker.exists()


def test_safetensors_of_one_or_all_layers(tmp_path):
    rows = table(LAYERS)
    save_file({"v": rows}, tmp_path / "all.safetensors")
    save_file({"v": rows[1].clone()}, tmp_path / "one.safetensors")
    save_file({"a": rows[1].clone(), "b": rows[2].clone()}, tmp_path / "two.safetensors")
    assert is_row(read_foreign(tmp_path / "all.safetensors", at(2), blocks=LAYERS), rows, 2)
    assert is_row(read_foreign(tmp_path / "one.safetensors", at(0)), rows, 1)
    assert is_row(read_foreign(tmp_path / "two.safetensors", at(0), tensor="b"), rows, 2)
    with pytest.raises(InputError, match="2 tensors"):
        read_foreign(tmp_path / "two.safetensors", at(0))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.zeros(WIDTH), "is zero"),
        (torch.full((WIDTH,), torch.nan), "infinite or NaN"),
        (torch.ones(WIDTH + 1), r"has shape \[8\], got \[9\]"),
        (torch.ones(1, 1, WIDTH), r"neither \[d\] nor \[layers, d\]"),
        (torch.ones(WIDTH, dtype=torch.int64), "not real numbers"),
        ("a string", "holds str"),
    ],
)
def test_what_is_no_direction_is_refused(tmp_path, value, expected):
    torch.save(value, tmp_path / "v.pt")
    with pytest.raises(InputError, match=expected):
        read_foreign(tmp_path / "v.pt", at(1))


def test_missing_files_and_unknown_kinds(tmp_path):
    with pytest.raises(InputError, match="there is no file"):
        read_foreign(tmp_path / "v.pt", at(1))
    with pytest.raises(InputError, match=r"'.pkl'"):
        read_foreign(tmp_path / "v.pkl", at(1))


def test_our_own_file_is_left_to_its_reader(tmp_path):
    path = write_direction(Direction.of(torch.ones(WIDTH), at(1), "up", "pca"), tmp_path / "d.safetensors")
    with pytest.raises(InputError, match="read_direction"):
        read_foreign(path, at(1))
