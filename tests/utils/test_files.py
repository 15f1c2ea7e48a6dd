"""Files are there whole or not at all, and readable as the process's new files are."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentprior.cli.commands import main
from latentprior.lm.hooks import Hookpoint
from latentprior.prior.official.activations import write_activations
from latentprior.sae.sae import SAE
from latentprior.steer.direction import Direction, write_direction
from latentprior.utils.files import replace_text, replaced


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def mode(request):
    """What a new file's permissions are to be."""
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


def modes(folder: Path) -> set[int]:
    return {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}


def test_outputs_have_the_permissions_of_new_files(tiny_glp, tmp_path, mode, capsys):
    glp = tiny_glp(8)
    prior, out = str(glp.save_pretrained(tmp_path / "prior")), tmp_path / "out"
    assert main(["sample", "--prior", prior, "--output", str(out / "samples.safetensors"), "--n", "4"]) == 0
    assert main(["convert", "--source", prior, "--to", "official", "--output", str(out / "official")]) == 0
    write_activations(out / "layer_1", torch.randn(4, 8))
    point, weights = Hookpoint("a/b", 1, 8), torch.ones(4, 8)
    SAE.of(weights, torch.zeros(4), weights, torch.zeros(8), point, k=2).save(out / "sae")
    direction = Direction.of(torch.ones(8), point, "d", "random")
    write_direction(direction, out / "d.safetensors")
    assert len(list(out.rglob("*.*"))) >= 11
    assert modes(tmp_path) == {mode}


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(ZeroDivisionError), replaced(path) as partial:
        save_file({"x": torch.ones(2)}, partial)
        raise ZeroDivisionError
    assert torch.equal(load_file(path)["x"], torch.zeros(2)) and list(tmp_path.iterdir()) == [path]


def test_what_a_kill_left_behind_is_not_taken_over(tmp_path, mode):
    left = tmp_path / "a.txt.partial"
    left.write_text("half")
    left.chmod(0o400)
    replace_text(tmp_path / "a.txt", "whole")
    assert (tmp_path / "a.txt").read_text() == "whole" and not left.exists()
    assert modes(tmp_path) == {mode}
