"""Choosing a device, without what is slow to import."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from latentprior.utils.devices import resolve_device
from latentprior.utils.errors import InputError
from simulated_device import GPU, simulated_gpu


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "cuda:99"):
        with pytest.raises(InputError, match=f"'{name}'"):
            resolve_device(name)


def test_a_gpu_without_a_number_is_this_process_s():
    with simulated_gpu():
        for name in ("auto", "cuda", "cuda:0", torch.device("cuda")):
            assert resolve_device(name) == GPU
        with pytest.raises(InputError, match="'cuda:1'.*invalid device ordinal"):
            resolve_device("cuda:1")


def test_sampling_does_not_import_transformers(tmp_path, tiny_glp):
    tiny_glp().save_pretrained(tmp_path / "prior")
    arguments = ["sample", "--prior", str(tmp_path / "prior"), "--n", "4", "--output", str(tmp_path / "x.safetensors")]
    code = f"import sys; from latentprior.cli import main; assert main({arguments}) == 0"
    code += "; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
