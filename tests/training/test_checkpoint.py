"""Training states come back exactly, incomplete ones are invisible, and nothing in them is ever executed."""

from __future__ import annotations

import itertools
import json
import pickle
import resource
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from latentprior.config import DenoiserConfig, Recipe
from latentprior.prior.denoiser import Denoiser
from latentprior.prior.normalizer import Normalizer
from latentprior.training.checkpoint import KEPT, MARKER, complete_states, latest, load_state, save_state
from latentprior.training.loop import State, TrainingLoop
from latentprior.utils.errors import InputError

PLAIN = Recipe(batch_size=16, learning_rate=1e-2)
AVERAGED = Recipe(batch_size=16, learning_rate=1e-2, ema=0.9)
SETTINGS = {"seed": 0, "recipe": {"batch_size": 16}}


def new_state(recipe: Recipe = AVERAGED, seed: int = 0) -> State:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return State.start(Denoiser(DenoiserConfig(4, 8, 16, 2)), recipe)


def load_latest(folder: Path, state: State, settings: dict) -> bool:
    """Bring `state` to the newest complete one, if there is one."""
    saved = latest(folder, settings)
    if saved is not None:
        load_state(saved, state)
    return saved is not None


def trained(state: State, recipe: Recipe, steps: int) -> State:
    """Train to step `steps` of a run of 20."""
    normalizer = Normalizer(torch.zeros(1, 4), torch.ones(1, 4), [0])
    while state.step < steps:
        generator = torch.Generator().manual_seed(state.step)
        one = itertools.repeat((torch.randn(16, 4, generator=generator), None), 1)
        with pytest.raises(InputError, match="ended after"):  # a step at a time, in the schedule of the whole run
            list(TrainingLoop(state, normalizer, recipe, 20).over(one))
    return state


def tensors(state: State) -> dict[str, Tensor]:
    """Everything in a state that is a tensor, by name."""
    named = {f"denoiser.{name}": p for name, p in state.denoiser.named_parameters()}
    for name, p in state.denoiser.named_parameters():
        named |= {f"optimizer.{name}.{key}": value for key, value in state.optimizers[0].state[p].items()}
    if state.average is not None:
        named |= {f"average.{name}": value for name, value in state.average.state_dict().items()}
    return {name: value.detach().clone() for name, value in named.items()}


def assert_equal(a: State, b: State) -> None:
    ours, theirs = tensors(a), tensors(b)
    assert ours.keys() == theirs.keys() and a.step == b.step
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]) and value.dtype == theirs[name].dtype, name


@pytest.mark.parametrize("recipe", [PLAIN, AVERAGED])
def test_round_trip_is_exact(tmp_path, recipe):
    state = trained(new_state(recipe), recipe, 5)
    before = tensors(state)
    folder = save_state(tmp_path, state, SETTINGS)
    assert folder == tmp_path / "5" and complete_states(tmp_path) == [folder]
    assert all(torch.equal(value, before[name]) for name, value in tensors(state).items())
    other = new_state(recipe, seed=1)
    assert load_latest(tmp_path, other, SETTINGS)
    assert_equal(other, state)
    assert len(before) == 4 * sum(1 for _ in state.denoiser.parameters()) + (len(before) // 5 if recipe.ema else 0)


@pytest.mark.parametrize("recipe", [PLAIN, AVERAGED])
def test_a_loaded_state_trains_on_as_if_nothing_had_happened(tmp_path, recipe):
    state = trained(new_state(recipe), recipe, 5)
    save_state(tmp_path, state, SETTINGS)
    other = new_state(recipe, seed=1)
    load_latest(tmp_path, other, SETTINGS)
    assert other.optimizers[0].param_groups[0]["betas"] == recipe.betas
    assert all(p.grad is None or not p.grad.any() for p in other.denoiser.parameters())
    assert_equal(trained(other, recipe, 12), trained(state, recipe, 12))
    assert_equal(trained(new_state(recipe), recipe, 12), state)


def test_nothing_there(tmp_path):
    state = new_state()
    before = [p.clone() for p in state.denoiser.parameters()]
    assert not load_latest(tmp_path / "steps", state, SETTINGS)
    assert complete_states(tmp_path / "steps") == [] and not (tmp_path / "steps").exists()
    assert all(torch.equal(a, b) for a, b in zip(before, state.denoiser.parameters(), strict=True))


def test_the_newest_are_kept(tmp_path):
    state = new_state()
    for state.step in (8, 9, 10, 11):  # numbers, not names, are in order
        save_state(tmp_path, state, SETTINGS)
    assert [path.name for path in complete_states(tmp_path)] == ["10", "11"] and KEPT == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "11"]


def test_incomplete_states_are_ignored_and_cleared_away(tmp_path):
    state = trained(new_state(), AVERAGED, 3)
    save_state(tmp_path, state, SETTINGS)
    later = trained(new_state(), AVERAGED, 6)
    (save_state(tmp_path, later, SETTINGS) / MARKER).unlink()
    (tmp_path / "7.partial").mkdir()
    (tmp_path / "7.partial" / MARKER).write_text("{}")
    (tmp_path / "8").mkdir()
    (tmp_path / "notes").mkdir()
    found = new_state(seed=1)
    assert load_latest(tmp_path, found, SETTINGS)
    assert_equal(found, state)
    save_state(tmp_path, trained(found, AVERAGED, 4), SETTINGS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4", "notes"]


def test_other_settings_are_refused(tmp_path):
    save_state(tmp_path / "steps", new_state(), SETTINGS)
    for settings, message in [
        (SETTINGS | {"seed": 1}, "seed is 0 there and 1 now"),
        (SETTINGS | {"blocks": 3}, "blocks is None there and 3 now"),
        ({"seed": 0}, "recipe.* now"),
    ]:
        state = new_state(seed=1)
        before = [p.clone() for p in state.denoiser.parameters()]
        with pytest.raises(InputError, match=f"holds a run with other settings: {message}"):
            load_latest(tmp_path / "steps", state, settings)
        assert all(torch.equal(a, b) for a, b in zip(before, state.denoiser.parameters(), strict=True))


def tensor_file(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "other", "marker"])
def test_a_damaged_state_is_named(tmp_path, damage):
    folder = save_state(tmp_path, new_state(), SETTINGS)
    file = tensor_file(folder)
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "missing":
        file.unlink()
    elif damage == "other":
        file.write_bytes(tensor_file(save_state(tmp_path / "b", new_state(PLAIN), SETTINGS)).read_bytes())
    else:
        (folder / MARKER).write_text("{}")
    with pytest.raises(InputError, match=f"^the training state {folder} is damaged: ") as caught:
        load_latest(tmp_path, new_state(), SETTINGS)
    assert "\n" not in str(caught.value)


class Malicious:
    """Leaves a trace if it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def test_a_state_holds_no_pickle_and_none_is_executed(tmp_path):
    trace = tmp_path / "executed"
    payload = pickle.dumps(Malicious(trace))
    pickle.loads(payload)
    assert trace.exists()
    trace.unlink()

    state = trained(new_state(), AVERAGED, 3)
    folder = save_state(tmp_path / "steps", state, SETTINGS)
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
    # What torch's own format would read is not even looked at.
    for name in (".metadata", "__0.metadata", "__0_0.distcp", "data.pt"):
        (folder / name).write_bytes(payload)
    found = new_state(seed=1)
    assert load_latest(tmp_path / "steps", found, SETTINGS)
    assert_equal(found, state)
    (folder / "model.safetensors.index.json").write_bytes(payload)
    tensor_file(folder).write_bytes(payload)
    with pytest.raises(InputError, match="is damaged"):
        load_latest(tmp_path / "steps", new_state(), SETTINGS)
    tensor_file(folder).unlink()
    with pytest.raises(InputError, match="is damaged"):
        load_latest(tmp_path / "steps", new_state(), SETTINGS)
    assert not trace.exists()


def test_a_full_disk_is_one_line_and_the_state_before_is_good(tmp_path):
    state = trained(new_state(), AVERAGED, 3)
    save_state(tmp_path, state, SETTINGS)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(InputError, match=f"^cannot write the training state {tmp_path / '4'}: ") as caught:
            save_state(tmp_path, trained(new_state(), AVERAGED, 4), SETTINGS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    found = new_state(seed=1)
    assert load_latest(tmp_path, found, SETTINGS)
    assert_equal(found, state)


def test_saving_and_loading_are_silent(tmp_path, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_state(tmp_path, new_state(), SETTINGS)
        load_latest(tmp_path, new_state(), SETTINGS)
    assert capfd.readouterr() == ("", "")
    assert json.loads((tmp_path / "0" / MARKER).read_text()) == {"step": 0, "settings": SETTINGS, "position": None}
