"""Recording end to end: the rows are the model's, what is left out is counted, and a kill changes nothing."""

from __future__ import annotations

import json
import multiprocessing
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from latentprior.config import LLMConfig, RecordConfig, TextConfig, TextSource
from latentprior.data.activations import ActivationBatch, record_activations
from latentprior.data.store.follow import Follower, wait_for_rows
from latentprior.data.store.reader import ActivationStore
from latentprior.data.store.record import record, record_from
from latentprior.data.text import documents
from latentprior.lm.hooks import edit
from latentprior.lm.loading import load_llm
from latentprior.utils.errors import InputError
from latentprior.utils.locks import LOCK

DOCUMENTS = 120
WORDS = "the fox keeps shells by the shore and knows what language it was best of times in".split()


def text_of(number: int) -> str:
    words = random.Random(number)
    return f"{number} " + " ".join(words.choices(WORDS, k=words.randint(2, 18)))


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [text_of(number) for number in range(DOCUMENTS)]


@pytest.fixture
def config(tmp_path, texts, llm_folder) -> RecordConfig:
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))
    return RecordConfig(
        output=str(tmp_path / "store"),
        layers=[1],
        max_length=40,
        long_documents="cut",
        batch_tokens=256,
        shard_rows=500,
        dtype="float32",
        llm=LLMConfig(model=llm_folder, dtype="float32"),
        text=TextConfig(dataset=str(file), part="all"),
    )


def contents(store: ActivationStore) -> ActivationBatch:
    """All rows, in the order of layer, document and position."""
    rows = store.batch(torch.arange(len(store)))
    key = (rows.layer * (rows.doc.max() + 1) + rows.doc) * (rows.position.max() + 1) + rows.position
    return rows.select(key.argsort())


def files(folder: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def direct(config: RecordConfig, texts: list[str], **options) -> ActivationBatch:
    model, tokenizer = load_llm(config.llm)
    return record_activations(model, tokenizer, texts, config.layers, max_length=config.max_length, **options)


def assert_same_rows(store: ActivationStore, expected: ActivationBatch) -> None:
    rows = contents(store)
    for name in ("layer", "doc", "position", "token"):
        assert torch.equal(getattr(rows, name), getattr(expected, name).long()), name
    torch.testing.assert_close(rows.x, expected.x, atol=1e-5, rtol=1e-5)


def scaled(position: int, factor: float) -> Callable[[Tensor], Tensor]:
    """An edit that multiplies the hidden state at one place of every document."""

    def scale(h: Tensor) -> Tensor:
        h[:, position] *= factor
        return h

    return scale


@pytest.mark.compat
def test_rows_are_the_models(config, texts):
    seen: list[int] = []
    store = record(config, report=lambda done, total, _: seen.append(done))
    assert_same_rows(store, direct(config, texts))
    assert seen == sorted(seen) and seen[-1] == len(store)
    assert len(store.manifest["shards"]) > 3 and store.manifest["complete"]
    assert store.manifest["left_out"].items() >= {"sinks": 0, "nonfinite": 0}.items()
    moments, rows = store.moments(), contents(store).x
    torch.testing.assert_close(moments.mean[0], rows.double().mean(0))
    torch.testing.assert_close(moments.variance()[0], rows.double().var(0, correction=0))
    torch.testing.assert_close(moments.median_norm[0].float(), rows.norm(dim=1).median())
    ActivationStore(config.output, verify="full")


@pytest.mark.compat
def test_manifest_says_what_was_recorded_from_what(config, llm_folder):
    store = record(config)
    source = store.manifest["source"]
    assert source["llm"]["model"] == llm_folder and source["text"]["dataset"] == config.text.dataset
    assert source["blocks"] == 4 and source["max_length"] == 40
    assert not {"output", "resume", "disk_budget", "wait"} & source.keys() and "device" not in source["llm"]
    assert "mix" not in source["text"]  # as in recordings from before there were mixtures, which can be resumed
    hookpoint = store.hookpoints[0]
    assert (hookpoint.layer, hookpoint.width, hookpoint.path) == (1, 32, "model.layers.1")
    hookpoint.check(load_llm(config.llm)[0])


@pytest.mark.compat
def test_several_layers_in_one_pass(config, texts):
    model, tokenizer = load_llm(config.llm)
    passes = 0

    def count(*_) -> None:
        nonlocal passes
        passes += 1

    model.model.layers[0].register_forward_pre_hook(count)
    one = record_from(model, tokenizer, config)
    passes_of_one, passes = passes, 0
    three = replace(config, output=config.output + "-3", layers=[3, 0, 1, 3], side="input")
    store = record_from(model, tokenizer, three)
    assert passes == passes_of_one and len(store) == 3 * len(one)
    assert store.layers == (0, 1, 3)
    assert_same_rows(store, direct(replace(three, layers=[0, 1, 3]), texts, side="input"))
    for i, layer in enumerate(store.layers):
        torch.testing.assert_close(store.moments().mean[i], contents(store).at_layer(layer).x.double().mean(0))


@pytest.mark.compat
@pytest.mark.parametrize(("positions", "most"), [("last", 1), ("random", 3)])
def test_chosen_positions(config, texts, positions, most):
    drawn = {"positions_per_document": 3} if positions == "random" else {}
    config = replace(config, positions=positions, seed=5, **drawn)
    store = record(config)
    assert_same_rows(store, direct(config, texts, positions=positions, positions_per_document=3, generator=5))
    assert len(store) == most * DOCUMENTS


@pytest.mark.compat
def test_sinks_are_left_out_and_counted(config):
    model, tokenizer = load_llm(config.llm)
    config = replace(config, layers=[1, 2])
    with edit(model, {1: scaled(1, 1000.0)}), edit(model, {2: lambda h: h / 100}):
        kept = record_from(model, tokenizer, replace(config, sinks="keep", output=config.output + "-kept"))
        dropped = record_from(model, tokenizer, config)
    everything = contents(kept)
    medians = {layer: everything.at_layer(layer).norms().median() for layer in (1, 2)}
    limits = torch.tensor([10 * medians[layer] for layer in everything.layer.tolist()])
    ordinary = everything.norms() <= limits
    assert (everything.position[~ordinary] == 1).all() and set(everything.layer[~ordinary].tolist()) == {1, 2}
    assert_same_rows(dropped, everything.select(ordinary))
    assert dropped.manifest["left_out"].items() >= {"sinks": int((~ordinary).sum()), "nonfinite": 0}.items()
    assert kept.manifest["left_out"]["sinks"] == 0
    assert kept.manifest["sink_thresholds"] == dropped.manifest["sink_thresholds"]
    for i, layer in enumerate((1, 2)):
        assert dropped.manifest["sink_thresholds"][str(layer)] == pytest.approx(10 * float(medians[layer]))
        assert dropped.moments().median_norm[i] == pytest.approx(float(medians[layer]))


@pytest.mark.compat
def test_rows_that_are_not_finite_are_left_out_and_counted(config, texts):
    model, tokenizer = load_llm(config.llm)
    with edit(model, {1: scaled(2, float("nan"))}):
        store = record_from(model, tokenizer, config)
    expected = direct(config, texts)
    assert_same_rows(store, expected.select(expected.position != 2))
    assert store.manifest["left_out"].items() >= {"sinks": 0, "nonfinite": int((expected.position == 2).sum())}.items()
    assert store.moments().mean.isfinite().all()


def test_nothing_finite_is_one_line(config):
    model, tokenizer = load_llm(config.llm)
    for layers in ([1], [0, 1]):
        with edit(model, {1: lambda h: h / 0}), pytest.raises(InputError, match="^nothing to record: .* of layer 1 "):
            record_from(model, tokenizer, replace(config, layers=layers))


def test_max_activations_is_exact(config):
    everything = record(replace(config, output=config.output + "-all"))
    store = record(replace(config, max_activations=700))
    assert len(store) == 700 and store.manifest["complete"]
    indices = torch.arange(len(store))
    assert torch.equal(store.rows(indices), everything.rows(indices))


@pytest.mark.parametrize("sinks", ["keep", "drop"])
def test_max_activations_counts_each_layer(config, sinks):
    """Sinks are other positions in each layer: all layers have as many rows nevertheless."""
    model, tokenizer = load_llm(config.llm)
    config = replace(config, layers=[0, 2], sinks=sinks)
    with edit(model, {0: scaled(3, 1000.0), 2: scaled(5, 1000.0)}):
        everything = record_from(model, tokenizer, replace(config, output=config.output + "-all"))
        store = record_from(model, tokenizer, replace(config, max_activations=700))
    assert len(store) == 2 * 700
    for layer in (0, 2):
        mine, all_of_it = (contents(s).at_layer(layer) for s in (store, everything))
        assert len(mine) == 700
        key = [sorted(zip(rows.doc.tolist(), rows.position.tolist(), strict=True)) for rows in (mine, all_of_it)]
        assert set(key[0]) <= set(key[1])


def test_a_recording_that_stops_at_a_number_is_resumed_exactly(config, run_killed):
    config = replace(config, max_activations=1200, layers=[0, 1])
    expected = files(record(replace(config, output=config.output + "-whole")).folder)
    resuming = replace(config, resume=True)
    draws, kills = random.Random(2), 0
    while not run_killed(record, resuming, changes=draws.randint(10, 50)):
        kills += 1
    assert kills >= 2 and files(config.output) == expected


def test_train_and_heldout_share_no_document(config, texts):
    def documents(part: str) -> set[int]:
        text = replace(config.text, part=part, heldout=0.3)
        store = record(replace(config, output=f"{config.output}-{part}", text=text))
        return set(contents(store).doc.tolist())

    train, heldout = documents("train"), documents("heldout")
    assert not train & heldout
    assert train | heldout == set(range(DOCUMENTS))
    assert 0.1 < len(heldout) / DOCUMENTS < 0.5


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_between_any_two_changes_of_the_disk(config, run_killed, seed):
    expected = files(record(replace(config, output=config.output + "-whole")).folder)
    resuming = replace(config, resume=True)
    draws, kills, rows = random.Random(seed), 0, [0]
    while not run_killed(record, resuming, changes=draws.randint(0, 44)):
        kills += 1
        if (Path(config.output) / "manifest.json").exists():
            rows.append(len(ActivationStore(config.output, verify="full")))
    assert kills >= 3 and rows == sorted(rows) and len(set(rows)) >= 2
    assert files(config.output) == expected


def test_killed_at_random_times(config, run_killed):
    expected = files(record(replace(config, output=config.output + "-whole")).folder)
    resuming = replace(config, resume=True)
    draws = random.Random(0)
    for _ in range(4):
        run_killed(record, resuming, seconds=draws.uniform(0.05, 0.6))
    assert files(record(resuming).folder) == expected


@pytest.mark.compat
def test_a_complete_store_has_nothing_to_resume(config):
    before = files(record(config).folder)
    model, tokenizer = load_llm(config.llm)
    model.model.layers[0].register_forward_pre_hook(lambda *_: pytest.fail("ran"))
    store = record_from(model, tokenizer, replace(config, resume=True))
    assert len(store) and files(config.output) == before
    with pytest.raises(InputError, match="--resume"):
        record_from(model, tokenizer, config)


def test_no_model_is_loaded_for_a_complete_store_or_one_of_other_settings(config, monkeypatch):
    before = files(record(config).folder)
    monkeypatch.setattr("latentprior.data.store.record.load_llm", lambda *_: pytest.fail("a model was loaded"))
    assert len(record(replace(config, resume=True)))
    with pytest.raises(InputError, match="--resume"):
        record(config)
    for change, message in [({"layers": [2]}, "layers.0 is 1"), ({"side": "input"}, "side is 'output'")]:
        with pytest.raises(InputError, match=message):
            record(replace(config, resume=True, **change))
    assert files(config.output) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, r"source\.seed is 0 there and 1 now"),
        ({"layers": [2]}, "layer"),
        ({"max_length": 20}, r"source\.max_length is 40"),
        ({"dtype": "bfloat16"}, "dtype is 'float32'"),
        ({"sinks": "keep"}, r"source\.sinks is 'drop'"),
        ({"text": TextConfig(limit=5)}, r"source\.text"),
    ],
)
def test_resume_with_other_settings_is_refused(config, run_killed, change, message):
    if "text" in change:
        change = {"text": replace(config.text, limit=5)}
    assert not run_killed(record, config, changes=34)
    (Path(config.output) / LOCK).unlink()  # the killed process's
    before = files(config.output)
    with pytest.raises(InputError, match=message) as caught:
        record(replace(config, resume=True, **change))
    assert "\n" not in str(caught.value)
    assert files(config.output) == before


def test_wrong_input_is_one_line_and_makes_no_folder(config, tmp_path):
    text, llm = config.text, config.llm
    (tmp_path / "empty.jsonl").write_text("")
    for change, message in [
        ({"text": replace(text, column="txet")}, "unknown column .*'txet'; did you mean 'text'"),
        ({"text": replace(text, dataset=str(tmp_path / "no.jsonl"))}, "no such file or folder"),
        ({"text": replace(text, dataset=str(tmp_path / "empty.jsonl"))}, "no documents"),
        ({"text": replace(text, part="heldout", heldout=0.0)}, "no documents in part 'heldout'"),
        ({"llm": replace(llm, model=str(tmp_path / "no-model"))}, "no such model"),
        ({"llm": replace(llm, model="nobody/no-model")}, "cannot load the model 'nobody/no-model'"),
        ({"layers": [1, 4]}, "layer 4 is out of range: LlamaForCausalLM has layers 0 to 3"),
        ({"layers": [-1]}, "layer -1 is out of range"),
        ({"max_length": 1}, "max_length must be at least 2"),
    ]:
        with pytest.raises(InputError, match=message) as caught:
            record(replace(config, **change))
        assert "\n" not in str(caught.value)
        assert not Path(config.output).exists()


# --- A disk budget


@pytest.fixture
def budgeted(config) -> RecordConfig:
    """A budget of three shards, of the five and more that there are."""
    return replace(config, shard_rows=300, batch_tokens=64, max_length=40, disk_budget="140 KiB")


def shard_bytes(folder: str | Path) -> int:
    return sum(path.stat().st_size for path in Path(folder).glob("shard-*"))


def test_the_newest_rows_are_kept_within_the_budget(budgeted):
    whole = record(replace(budgeted, output=budgeted.output + "-whole", disk_budget=None))
    store = record(budgeted)
    assert shard_bytes(whole.folder) > 143_360 >= shard_bytes(store.folder) > 80_000
    evicted = store.manifest["evicted"]
    assert evicted > 0 and evicted + len(store) == len(whole)
    indices = torch.arange(len(store))
    assert torch.equal(store.rows(indices), whole.rows(indices + evicted))
    assert torch.equal(store.moments().mean, whole.moments().mean)
    assert store.manifest["source"] == whole.manifest["source"]


def test_a_recording_with_a_budget_is_resumed_exactly(budgeted, run_killed):
    expected = files(record(replace(budgeted, output=budgeted.output + "-whole")).folder)
    resuming = replace(budgeted, resume=True)
    draws, kills = random.Random(0), 0
    while not run_killed(record, resuming, changes=draws.randint(30, 90)):
        kills += 1
    assert kills >= 2 and files(budgeted.output) == expected


def test_max_activations_counts_what_was_removed(budgeted):
    store = record(replace(budgeted, max_activations=1500))
    assert store.manifest["evicted"] + len(store) == 1500 and store.manifest["evicted"] > 0


def test_waits_for_a_trainer_or_gives_up(budgeted):
    with pytest.raises(InputError, match="0.1 seconds.*--resume"):
        record(replace(budgeted, wait=True, wait_seconds=0.1))
    whole = record(replace(budgeted, output=budgeted.output + "-whole", disk_budget=None))
    recorder = multiprocessing.get_context("forkserver").Process(
        target=record, args=(replace(budgeted, wait=True, wait_seconds=60.0, resume=True),)
    )
    recorder.start()
    store = wait_for_rows(budgeted.output, 10**6, 60.0, poll=0.01)
    assert len(store) < len(whole)  # no more would come before a release
    follower = Follower(store.folder, 100, seed=0, wait_seconds=60.0, poll=0.01)
    follower.on_wait = lambda: follower.release(follower.state())
    rows = torch.cat([x for x, _ in follower])
    recorder.join()
    assert recorder.exitcode == 0
    expected = whole.rows(torch.arange(len(whole)))
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, expected.tolist()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"disk_budget": "5000"}, "RecordConfig.disk_budget needs a unit, such as '20GB', got '5000'"),
        ({"disk_budget": "a lot"}, "RecordConfig.disk_budget must be"),
        ({"disk_budget": None, "wait": True}, "RecordConfig.wait needs a disk_budget"),
        ({"disk_budget": "1GB", "wait_seconds": 0.0}, "RecordConfig.wait_seconds must be positive"),
        ({"disk_budget": "60KB"}, "a disk budget of 60,000 bytes does not hold two shards, which take up to"),
    ],
)
def test_an_unusable_budget_is_one_line_and_makes_no_folder(budgeted, change, message):
    with pytest.raises(InputError, match=message):
        record(replace(budgeted, **change))
    assert not Path(budgeted.output).exists()


def test_several_sources(config, texts, tmp_path):
    paths = [tmp_path / f"{name}.jsonl" for name in "ab"]
    for path, part in zip(paths, (texts[:80], texts[80:]), strict=True):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    mix = [TextSource(str(paths[0]), weight=2.0), TextSource(str(paths[1]))]
    mixed = replace(config, text=TextConfig(mix=mix, part="all"))
    order = [document.text for document in documents(mixed.text)]
    assert sorted(order) == sorted(texts)
    store = record(mixed)
    assert_same_rows(store, direct(config, order))
    assert [source["weight"] for source in store.manifest["source"]["text"]["mix"]] == [2.0, 1.0]


# --- Long documents


@pytest.fixture
def book(config, texts) -> RecordConfig:
    """A text file of one paragraph of all texts, and another of one."""
    file = Path(config.output).with_name("book.txt")
    file.write_text(" ".join(texts) + "\n\n" + texts[0])
    return replace(config, long_documents="auto", text=TextConfig(dataset=str(file), part="all"))


def test_a_long_document_is_recorded_whole_in_chunks(book, texts):
    store = record(book)
    _, tokenizer = load_llm(book.llm)
    ids = [[tokenizer.bos_token_id, *tokenizer.encode(text)] for text in (" ".join(texts), texts[0])]
    assert len(ids[0]) > 20 * book.max_length
    rows = contents(store)
    assert rows.doc.tolist() == [doc for doc in (0, 1) for _ in ids[doc][1:]]
    assert rows.position.tolist() == [place for doc in (0, 1) for place in range(1, len(ids[doc]))]
    assert rows.token.tolist() == [token for doc in (0, 1) for token in ids[doc][1:]]
    assert set(store.manifest["left_out"].values()) == {0}
    second = tokenizer.decode(ids[0][40:79])  # the second chunk, on its own: BOS and the next 39 tokens
    assert tokenizer.encode(second) == ids[0][40:79]
    expected = direct(book, [second])
    torch.testing.assert_close(rows.x[39:78], expected.x, atol=1e-5, rtol=1e-5)


def test_what_is_cut_of_long_documents_is_counted(book, texts):
    store = record(replace(book, long_documents="cut"))
    _, tokenizer = load_llm(book.llm)
    length = 1 + len(tokenizer.encode(" ".join(texts)))
    assert store.manifest["left_out"] == {
        "sinks": 0,
        "nonfinite": 0,
        "cut_documents": 1,
        "cut_tokens": length - book.max_length,
    }
    assert int(contents(store).position.max()) == book.max_length - 1
    assert "long_documents" not in store.manifest["source"]  # as in recordings from before there were chunks
    with pytest.raises(InputError, match="long_documents is None .*'chunk'"):
        record(replace(book, resume=True))


@pytest.mark.parametrize("positions", ["last", "random"])
def test_positions_of_a_document_in_chunks_are_of_the_whole_document(book, texts, positions):
    count = {"positions_per_document": 7} if positions == "random" else {}
    rows = contents(record(replace(book, positions=positions, seed=3, **count)))
    _, tokenizer = load_llm(book.llm)
    for doc, text in enumerate((" ".join(texts), texts[0])):
        ids = [tokenizer.bos_token_id, *tokenizer.encode(text)]
        drawn = np.random.default_rng((3, doc)).permutation(len(ids) - 1)[:7] + 1
        expected = [len(ids) - 1] if positions == "last" else sorted(drawn.tolist())
        assert rows.position[rows.doc == doc].tolist() == expected
        assert rows.token[rows.doc == doc].tolist() == [ids[place] for place in expected]


def test_chunks_continue_after_a_kill(book, run_killed, tmp_path):
    book = replace(book, shard_rows=200)
    whole = record(replace(book, output=str(tmp_path / "whole")))
    killed = replace(book, output=str(tmp_path / "killed"), resume=True)
    assert not run_killed(record, killed, changes=40)
    record(killed)
    assert files(killed.output) == files(whole.folder)


def test_the_embedded_corpus_is_cut_unless_asked_otherwise():
    assert not RecordConfig("o").chunks and RecordConfig("o", long_documents="chunk").chunks
    for text in (TextConfig("some/data"), TextConfig(mix=[TextSource("sae-probes")])):
        assert RecordConfig("o", text=text).chunks
        assert not RecordConfig("o", text=text, long_documents="cut").chunks


def test_counts_of_older_stores_are_read(config):
    folder = Path(record(config).folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["left_out"] = {"sinks": 2, "nonfinite": 1}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    counts = {"sinks": 2, "nonfinite": 1, "cut_documents": 0, "cut_tokens": 0}
    assert ActivationStore(folder).manifest["left_out"] == counts
