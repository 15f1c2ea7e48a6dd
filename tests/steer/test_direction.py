"""Directions are unit vectors that know where they belong, and survive a file exactly."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from latentprior.lm.hooks import Hookpoint
from latentprior.steer.direction import KINDS, Direction, read_direction, write_direction
from latentprior.utils.errors import InputError

POINT = Hookpoint("org/tiny", 1, 8, path="model.layers.1", revision="abc")
KEY = "latentprior.direction"


def a_vector(width: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def a_direction(**provenance) -> Direction:
    return Direction.of(7 * a_vector(), POINT, "sentiment (SST-2)", "difference_of_means", **provenance)


def header(path: Path) -> dict:
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size])


def rewritten(path: Path, **changes) -> Path:
    """The file with some of its JSON values changed; None removes one."""
    values = json.loads(header(path)["__metadata__"][KEY]) | changes
    values = {key: value for key, value in values.items() if value is not None}
    save_file({"direction": read_direction(path).vector}, path, metadata={KEY: json.dumps(values)})
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_of_scales_to_unit_norm_and_keeps_the_norm(dtype):
    vector = torch.tensor([3.0, 4.0, *[0.0] * 6], dtype=dtype)
    direction = Direction.of(vector, POINT, "a", "pca", pairs=5)
    assert direction.vector.dtype == torch.float32
    assert direction.vector[:2].tolist() == pytest.approx([0.6, 0.8])
    assert direction.norm == 5.0 and direction.provenance == {"pairs": 5}


def test_of_is_exact_for_tiny_and_huge_vectors():
    for scale in (1e-30, 1e30):
        direction = Direction.of(a_vector().double() * scale, POINT, "a", "random")
        torch.testing.assert_close(direction.vector, a_vector() / a_vector().norm())
        assert direction.norm == pytest.approx(scale * float(a_vector().double().norm()))


@pytest.mark.parametrize("kind", KINDS)
def test_file_round_trip(kind, tmp_path):
    made = {"positive": 3, "options": {"l2": 0.1}, "texts": ["a", "é ‒ \n"], "seed": None}
    direction = Direction.of(a_vector() / 3, POINT, 'a "name" é', kind, **made)
    path = write_direction(direction, tmp_path / "new" / "folder" / "d.safetensors")
    back = read_direction(str(path))
    assert torch.equal(back.vector, direction.vector) and back.vector.dtype == torch.float32
    assert back.hookpoint == POINT and back.norm == direction.norm
    assert (back.name, back.kind, back.provenance) == (direction.name, kind, made)


def test_the_mean_norm_is_kept_and_may_be_missing(tmp_path):
    known = Direction.of(a_vector(), POINT, "a", "pca", mean_norm=12.5, seed=1)
    path = write_direction(known, tmp_path / "a.safetensors")
    assert read_direction(path).mean_norm == 12.5 and read_direction(path).provenance == {"seed": 1}
    path = write_direction(a_direction(), path)  # as files of older versions: no such key
    assert read_direction(path).mean_norm is None and "mean_norm" not in header(path)["__metadata__"][KEY]
    for wrong in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(InputError, match="mean norm"):
            Direction.of(a_vector(), POINT, "a", "pca", mean_norm=wrong)


def test_same_direction_same_bytes_and_no_leftovers(tmp_path):
    first = write_direction(a_direction(seed=1), tmp_path / "a.safetensors").read_bytes()
    second = write_direction(a_direction(seed=1), tmp_path / "a.safetensors").read_bytes()
    assert first == second and [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_direction(a_direction(), tmp_path / "a.safetensors")
    before = path.read_bytes()

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("latentprior.utils.files.os.fsync", full)
    with pytest.raises(InputError, match="cannot write .*No space left"):
        write_direction(Direction.of(a_vector(seed=1), POINT, "b", "pca"), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        write_direction(a_direction(), tmp_path / "file" / "d.safetensors")


@pytest.mark.parametrize(
    "damage",
    [lambda c: b"", lambda c: c[:20], lambda c: c[:-4], lambda c: c + b"\0", lambda c: b"\xff" * len(c)],
    ids=["empty", "header cut", "tensor cut", "longer", "noise"],
)
def test_damaged_files_are_one_line(damage, tmp_path):
    path = write_direction(a_direction(), tmp_path / "d.safetensors")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match="no readable direction") as caught:
        read_direction(path)
    assert "\n" not in str(caught.value) and "d.safetensors" in str(caught.value)


def test_missing_files_and_folders_are_one_line(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(InputError, match="no readable direction"):
            read_direction(path)


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(InputError, match="direction"):
        read_direction(path)
    save_file({"weight": torch.zeros(3)}, path, metadata={KEY: "{}"})
    with pytest.raises(InputError, match="no readable direction"):
        read_direction(path)
    torch.save({"direction": a_vector()}, path)
    with pytest.raises(InputError, match="no readable direction"):
        read_direction(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "direction format 2, this version reads 1"),
        ({"format": None}, "lacks the key 'format'"),
        ({"hookpoint": None}, "lacks the key 'hookpoint'"),
        ({"hookpoint": {"model": "m"}}, "no valid direction"),
        ({"hookpoint": POINT.to_dict() | {"depth": 1}}, "unknown Hookpoint key 'depth'"),
        ({"hookpoint": POINT.to_dict() | {"width": 9}}, r"shape \[9\], got \[8\]"),
        ({"hookpoint": 3}, "no valid direction"),
        ({"kind": "vibes"}, "unknown kind of direction 'vibes'"),
        ({"norm": 0}, "must be positive and finite"),
        ({"norm": "big"}, "no valid direction"),
        ({"provenance": 3}, "no valid direction"),
    ],
)
def test_files_with_wrong_values_are_refused(changes, message, tmp_path):
    path = rewritten(write_direction(a_direction(), tmp_path / "d.safetensors"), **changes)
    with pytest.raises(InputError, match=message) as caught:
        read_direction(path)
    assert str(path) in str(caught.value)


def test_metadata_that_is_not_json_or_no_object(tmp_path):
    for text in ("{", "[1]", "null"):
        save_file({"direction": a_vector()}, tmp_path / "d.safetensors", metadata={KEY: text})
        with pytest.raises(InputError, match="no valid direction"):
            read_direction(tmp_path / "d.safetensors")


def test_a_file_with_another_vector_is_refused(tmp_path):
    path = write_direction(a_direction(), tmp_path / "d.safetensors")
    metadata = header(path)["__metadata__"]
    for vector, message in [
        (torch.zeros(8), "norm 1, got 0"),
        (torch.full((8,), math.nan), "norm 1, got nan"),
        (torch.eye(8), "shape"),
        (torch.eye(8)[0].half(), "float32"),
    ]:
        save_file({"direction": vector}, path, metadata=metadata)
        with pytest.raises(InputError, match=message):
            read_direction(path)


def test_bad_directions_are_one_line():
    for vector, message in [
        (torch.zeros(8), "is zero"),
        (torch.full((8,), math.inf), "infinite or NaN"),
        (torch.ones(9), r"shape \[8\], got \[9\]"),
        (torch.ones(1, 8), r"got \[1, 8\]"),
    ]:
        with pytest.raises(InputError, match=message):
            Direction.of(vector, POINT, "a", "pca")
    with pytest.raises(InputError, match="'probe'"):
        Direction.of(a_vector(), POINT, "a", "probes")
    with pytest.raises(InputError, match="JSON-ready"):
        Direction.of(a_vector(), POINT, "a", "pca", path=Path("x"))
    with pytest.raises(InputError, match="JSON-ready"):
        Direction.of(a_vector(), POINT, "a", "pca", loss=math.nan)
    with pytest.raises(InputError, match="use Direction.of"):
        Direction(2 * a_vector(), POINT, "a", "pca")


def test_check_refuses_another_model_layer_or_width(tiny_llm):
    model = tiny_llm("llama")
    point = Hookpoint.of(model, 1)
    direction = Direction.of(a_vector(point.width), point, "a", "random")
    direction.check(model)
    with pytest.raises(InputError, match="tiny-llama.*tiny-gpt2"):
        direction.check(tiny_llm("gpt2"))
    direction.check(tiny_llm("gpt2"), check_model=False)
    with pytest.raises(InputError, match="layer 1"):
        direction.check(tiny_llm("llama", layers=1))
    with pytest.raises(InputError, match="32.* 16"):
        direction.check(tiny_llm("llama", width=16), check_model=False)
