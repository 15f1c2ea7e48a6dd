"""An unreachable Hub is found out at once and said in one line: no retries, nothing above the line that matters."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

MODEL = "cannot load the model 'some/model': there is no such folder, none in the cache, and"


@pytest.fixture(scope="module")
def closed() -> str:
    """An address where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def run(tmp_path, endpoint: str, *arguments: str) -> subprocess.CompletedProcess:
    place = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()} | place
    command = [sys.executable, "-m", "latentprior", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["record", "--output", "out", "--llm.model", "some/model"], MODEL),
        (["plan", "--llm.model", "some/model"], MODEL),
        (["sample", "--output", "out", "--prior", "some/prior"], "no prior at 'some/prior': not a folder, and"),
        (
            ["record", "--output", "out", "--layers", "1", "--text.dataset", "some/data", "--llm.model"],
            "cannot open the dataset 'some/data'",
        ),
    ],
)
def test_an_unreachable_hub_takes_one_line(tmp_path, closed, llm_folder, arguments, expected):
    arguments = [*arguments, llm_folder] if arguments[-1] == "--llm.model" else arguments
    ran = run(tmp_path, closed, *arguments)
    (line,) = ran.stderr.splitlines()
    assert ran.returncode == 2 and ran.stdout == ""
    assert line.startswith(f"error: {expected}") and f"{closed} does not answer" in line


def test_a_model_in_the_cache_needs_no_hub(tmp_path, closed, llm_folder, monkeypatch):
    """In this process, as the cache of another would have to be filled from a Hub."""
    import shutil

    from huggingface_hub import constants

    from latentprior.config import LLMConfig
    from latentprior.lm.loading import load_llm
    from latentprior.utils import hub
    from latentprior.utils.errors import InputError

    cache = tmp_path / "cache"
    snapshot = cache / "models--some--model" / "snapshots" / "abc"
    shutil.copytree(llm_folder, snapshot)
    (cache / "models--some--model" / "refs").mkdir()
    (cache / "models--some--model" / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", closed)
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(cache))
    assert "does not answer" in str(hub.unreachable())
    model, _ = load_llm(LLMConfig(model="some/model"))
    assert model.config.num_hidden_layers == 4
    with pytest.raises(InputError, match="'some/other'.*does not answer"):
        load_llm(LLMConfig(model="some/other"))
