"""A trainer that follows a recorder: every row once, in a fixed order, whoever is slow, ends first or is killed."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from latentprior.data.activations import ActivationBatch
from latentprior.data.store import backpressure
from latentprior.data.store import manifest as files
from latentprior.data.store.follow import Follower, wait_for_rows
from latentprior.data.store.reader import ActivationStore
from latentprior.data.store.writer import StoreWriter
from latentprior.lm.hooks import Hookpoint
from latentprior.utils.errors import InputError
from latentprior.utils.files import replace_text

WIDTH, ROWS, SHARD_ROWS, BATCHES = 512, 5, 32, 80
BUDGET = 2 * files.most_bytes({"width": WIDTH, "dtype": "float32"}, SHARD_ROWS + ROWS - 1)  # two shards, no more
WAIT = 20.0  # seconds; only a deadlock takes them


def batch(index: int, layers: tuple[int, ...]) -> ActivationBatch:
    """Rows that carry their number: 0 to 5 of them."""
    first, n = index * ROWS, index % (ROWS + 1)
    x = torch.zeros(n, WIDTH)
    x[:, 0] = torch.arange(first, first + n)
    number = torch.arange(n)
    return ActivationBatch(x, torch.tensor(layers)[number % len(layers)], number, number + 1, number)


def numbers(n: int = BATCHES) -> list[int]:
    """The numbers of all rows."""
    return [index * ROWS + row for index in range(n) for row in range(index % (ROWS + 1))]


def record(
    folder: Path, n: int = BATCHES, *, pause: float = 0.0, layers: tuple[int, ...] = (15,), stop: int = 10**9, **options
) -> None:
    """Record the token batches that are not yet recorded; those from `stop` on are left to another call."""
    options = {"resume": True, "shard_rows": SHARD_ROWS, "batch_rows": ROWS, "dtype": "float32", "source": {}} | options
    points = [Hookpoint(model="tiny", layer=layer, width=WIDTH) for layer in layers]
    writer = StoreWriter(folder, points, **options)
    for index in range(writer.next_batch, min(n, stop)):
        time.sleep(pause)
        writer.append(batch(index, layers), next_batch=index + 1, left_out={})
    if stop >= n:
        writer.close()


def train(folder: Path, output: Path, *, batch_size: int = 12, every: int = 4, pause: float = 0.0) -> None:
    """What a training run does with a follower: "weights" are all numbers seen so far, saved with the position."""
    wait_for_rows(folder, 1, WAIT, poll=0.01)
    state = json.loads(output.read_text()) if output.exists() else {"batches": [], "position": None}

    def save() -> None:
        state["position"] = follower.state()
        replace_text(output, json.dumps(state))
        follower.release(state["position"])

    follower = Follower(folder, batch_size, seed=3, state=state["position"], wait_seconds=WAIT, poll=0.01, on_wait=save)
    for x, _ in follower:
        state["batches"].append(x[:, 0].int().tolist())
        time.sleep(pause)
        if len(state["batches"]) % every == 0:
            save()
    save()


def batches(folder: Path, batch_size: int = 12, **options) -> list[list[int]]:
    options = {"seed": 3, "wait_seconds": 0.05, "poll": 0.01} | options
    return [x[:, 0].int().tolist() for x, _ in Follower(folder, batch_size, **options)]


@pytest.fixture
def folder(tmp_path) -> Path:
    record(tmp_path / "store")
    return tmp_path / "store"


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> list[list[int]]:
    """The batches of a store that was complete from the beginning."""
    folder = tmp_path_factory.mktemp("expected")
    record(folder)
    return batches(folder)


@pytest.fixture(scope="module")
def start() -> Callable[..., multiprocessing.process.BaseProcess]:
    """A function that calls another in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["pytest", "latentprior.data.store.record", "latentprior.training.fit"]
    )  # as in conftest

    def begin(function: Callable, *args, **options) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=function, args=args, kwargs=options)
        process.start()
        return process

    return begin


# --- The order


def test_every_row_once_and_only_the_last_batch_is_short(folder, expected):
    assert sorted(itertools.chain(*expected)) == numbers()
    assert {len(rows) for rows in expected[:-1]} == {12} and 0 < len(expected[-1]) <= 12
    assert batches(folder) == expected


def test_shards_come_in_order_each_in_its_own(folder, expected):
    store = ActivationStore(folder)
    flat, start, orders = list(itertools.chain(*expected)), 0, []
    for shard in store.manifest["shards"]:
        rows = store.rows(torch.arange(start, start + shard["rows"]))[:, 0].int().tolist()
        given = flat[start : start + shard["rows"]]
        assert sorted(given) == rows and given != rows
        orders.append([rows.index(number) for number in given])
        start += shard["rows"]
    assert orders[0] != orders[1]
    assert batches(folder, seed=4)[0] != expected[0]


def test_layers_belong_to_their_rows(tmp_path):
    record(tmp_path, layers=(3, 7))
    store = ActivationStore(tmp_path)
    stored = store.rows(torch.arange(len(store)))[:, 0].int().tolist()
    layers = dict(zip(stored, store.metadata(torch.arange(len(store)))[0].tolist(), strict=True))
    for x, layer in Follower(tmp_path, 12, seed=0):
        assert layer is not None and layer.dtype == torch.int64
        assert layer.tolist() == [layers[number] for number in x[:, 0].int().tolist()]


@pytest.mark.parametrize("batch_size", [1, 7, 12, SHARD_ROWS])
def test_continues_exactly_from_any_position(folder, batch_size):
    whole = batches(folder, batch_size)
    follower = Follower(folder, batch_size, seed=3)
    for done in range(len(whole) + 1):
        state = json.loads(json.dumps(follower.state()))
        if done % 5 == 0 or done == len(whole):
            assert batches(folder, batch_size, state=state) == whole[done:]
        next(follower, None)


def test_a_state_needs_no_shard_before_its_own(folder, expected):
    """What is released may go, and a saved state can still be continued."""
    edited = json.loads((folder / files.MANIFEST).read_text())
    (folder / files.MANIFEST).write_text(json.dumps(edited | {"complete": False}))
    follower = Follower(folder, 12, seed=3)
    list(itertools.islice(follower, 6))
    state = follower.state()
    assert state["shard"] == 2 and state["row"] > 0
    follower.release(state)
    first = backpressure.read_consumed(folder)
    assert first == 2
    for shard in edited["shards"][:first]:
        (folder / shard["activations"]["file"]).unlink()
    rows = sum(shard["rows"] for shard in edited["shards"][:first])
    edited |= {"first_shard": first, "evicted": rows, "rows": edited["rows"] - rows, "shards": edited["shards"][first:]}
    (folder / files.MANIFEST).write_text(json.dumps(edited))
    assert batches(folder, state=state) == expected[6:]
    with pytest.raises(InputError, match="shard 0 of .* was removed before all of it was used: record with --wait"):
        Follower(folder, 12, seed=3, state={"shard": 0, "row": 30})


# --- Waiting


def test_what_is_there_is_given_before_it_waits(tmp_path, expected):
    record(tmp_path, stop=40)
    store = ActivationStore(tmp_path)
    follower = Follower(tmp_path, 12, seed=3, wait_seconds=0.05, poll=0.01)
    given = [x[:, 0].int().tolist() for x, _ in itertools.islice(follower, len(store) // 12)]
    assert given == expected[: len(given)]
    with pytest.raises(InputError, match="nothing new was recorded in .* for 0.05 seconds: is its recorder running"):
        next(follower)
    record(tmp_path)
    assert given + [x[:, 0].int().tolist() for x, _ in follower] == expected


def test_pauses_double_up_to_a_second(monkeypatch):
    now, pauses = 0.0, []

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds
        pauses.append(seconds)

    monkeypatch.setattr(backpressure.time, "sleep", sleep)
    monkeypatch.setattr(backpressure.time, "monotonic", lambda: now)
    assert sum(1 for _ in backpressure.polling(4.0, 0.2)) == len(pauses) + 1
    assert pauses == pytest.approx([0.2, 0.4, 0.8, 1.0, 1.0, 0.6])


def test_on_wait_is_called_once_and_only_if_the_recorder_waits(tmp_path):
    record(tmp_path, stop=30)
    called = []
    follower = Follower(tmp_path, 12, seed=3, wait_seconds=0.1, poll=0.01, on_wait=lambda: called.append(1))
    with pytest.raises(InputError, match="nothing new"):
        list(follower)
    assert not called
    with backpressure.waiting(tmp_path), pytest.raises(InputError, match="nothing new"):
        next(follower)
    assert called == [1]


def test_a_slow_save_is_no_time_that_nothing_came(tmp_path):
    record(tmp_path, stop=30)

    def save() -> None:
        time.sleep(0.1)
        record(tmp_path)

    follower = Follower(tmp_path, 12, seed=3, wait_seconds=0.05, poll=0.01, on_wait=save)
    (tmp_path / backpressure.WAITING).touch()
    assert sorted(x for batch, _ in follower for x in batch[:, 0].int().tolist()) == numbers()


def test_statistics_wait_for_rows_but_not_for_more_than_come(tmp_path, folder):
    with pytest.raises(InputError, match="nothing new was recorded in .*none for 0.05 seconds"):
        wait_for_rows(tmp_path / "none", 1, 0.05, poll=0.01)
    record(tmp_path / "part", stop=40)
    stored = len(ActivationStore(tmp_path / "part"))
    store = wait_for_rows(tmp_path / "part", stored, 0.0)
    assert store.moments().count.tolist() == [stored]
    record(tmp_path / "part")  # replaces the statistics' file
    assert store.moments().count.tolist() == [stored]
    assert len(wait_for_rows(folder, 10**6, 0.0)) == len(numbers())  # complete
    record(tmp_path / "full", stop=40)
    with pytest.raises(InputError, match="nothing new"):
        wait_for_rows(tmp_path / "full", 10**6, 0.05, poll=0.01)
    with backpressure.waiting(tmp_path / "full"):
        assert len(wait_for_rows(tmp_path / "full", 10**6, 0.0)) == stored


def test_a_new_follower_takes_back_what_an_older_one_released(tmp_path):
    record(tmp_path, stop=50)
    backpressure.write_consumed(tmp_path, 3)
    Follower(tmp_path, 12, seed=3)
    assert backpressure.read_consumed(tmp_path) == 0


def test_a_complete_store_is_only_read(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    follower = Follower(folder, 12, seed=3)
    follower.release(follower.state())
    assert len(list(follower)) > 5
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": SHARD_ROWS + 1}, f"batches of 1 to {SHARD_ROWS} rows, the least of its shards, got 33"),
        ({"batch_size": 0}, "batches of 1 to"),
        ({"state": {"shard": 99, "row": 0}}, "has no row 0 of shard 99: is it the same store"),
        ({"state": {"shard": 0, "row": 50}}, "has no row 50 of shard 0"),
    ],
)
def test_what_cannot_be_followed_is_one_line(folder, options, message):
    with pytest.raises(InputError, match=message):
        Follower(folder, **({"batch_size": 12, "seed": 0} | options))


def test_a_damaged_marker_is_named(tmp_path):
    (tmp_path / backpressure.CONSUMED).write_text("[]")
    with pytest.raises(InputError, match=r"consumed\.json is damaged"):
        backpressure.read_consumed(tmp_path)


def test_a_recorder_that_does_not_wait_can_run_away(tmp_path):
    record(tmp_path, stop=30, budget=BUDGET)
    follower = Follower(tmp_path, 12, seed=3, wait_seconds=0.05, poll=0.01)
    next(follower)
    record(tmp_path, budget=BUDGET)
    with pytest.raises(InputError, match="was removed before all of it was used: record with --wait"):
        list(follower)


# --- Two processes


@pytest.mark.parametrize(
    ("recorder", "trainer"),
    [
        ({}, {"pause": 0.01}),  # the recorder waits for room again and again
        ({"pause": 0.004}, {}),  # the trainer waits for rows
        ({"budget": None}, {"pause": 0.005}),  # the recorder ends long before the trainer
        ({}, {"every": 10**9}),  # the trainer saves only when the recorder waits
    ],
)
def test_each_waits_for_the_other(tmp_path, start, expected, recorder, trainer):
    options = {"budget": BUDGET, "wait_seconds": WAIT} | recorder
    folder, output = tmp_path / "store", tmp_path / "weights"
    processes = [start(record, folder, **options), start(train, folder, output, **trainer)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert json.loads(output.read_text())["batches"] == expected
    store = ActivationStore(folder, verify="full")
    assert store.manifest["complete"] and len(store) + store.manifest["evicted"] == len(numbers())
    assert not backpressure.is_waiting(folder)
    assert options["budget"] is None or len(store.manifest["shards"]) <= 2


@pytest.mark.parametrize("killed", ["recorder", "trainer", "both"])
def test_killed_and_continued(tmp_path, start, expected, killed):
    """The one is killed at random moments and started again, while the other goes on."""
    folder, output, draws = tmp_path / "store", tmp_path / "weights", random.Random(killed)
    begin = {
        "recorder": lambda: start(record, folder, budget=BUDGET, wait_seconds=WAIT, pause=0.002),
        "trainer": lambda: start(train, folder, output, pause=0.002),
    }
    running, kills = {name: call() for name, call in begin.items()}, 0
    for turn in range(6):
        time.sleep(draws.uniform(0.02, 0.2))
        name = ("recorder", "trainer")[turn % 2] if killed == "both" else killed
        if running[name].is_alive():
            running[name].kill()
            running[name].join()
            kills += 1
            running[name] = begin[name]()
    for process in running.values():
        process.join()
        assert process.exitcode == 0
    assert kills >= 2
    assert json.loads(output.read_text())["batches"] == expected
