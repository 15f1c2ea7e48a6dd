from __future__ import annotations

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy import stats

from latentprior.config import LLMConfig, NeuronsConfig, TextConfig
from latentprior.data import tokens
from latentprior.data.activations import activations
from latentprior.data.text import Document, documents
from latentprior.neurons.collect import QUANTILES, collect_units, neurons
from latentprior.neurons.describe import describe_store
from latentprior.neurons.reservoir import random_keys
from latentprior.neurons.store import EXAMPLES, INFO, UNITS, NeuronStore
from latentprior.neurons.unit_reader import UnitReader
from latentprior.utils.errors import InputError

FAMILIES = ("llama", "gpt2")
LENGTH = 12


@pytest.fixture(scope="module")
def texts(write_texts, tmp_path_factory) -> str:
    return write_texts(tmp_path_factory.mktemp("texts") / "texts.jsonl", 40)


def config_of(folder, **changes) -> NeuronsConfig:
    return NeuronsConfig(
        **{
            "output": str(folder),
            "prior": "tiny",
            "max_length": LENGTH,
            "batch_tokens": 64,
            "top": 3,
            "reservoir": 8,
            "promoted": 4,
            "neighbours": 5,
            "precision": "float32",
            "t": 0.2,
            **changes,
        }
    )


def docs_of(path: str) -> list[Document]:
    return list(documents(TextConfig(dataset=path, part="all")))


@pytest.fixture(scope="module", params=FAMILIES)
def collected(request, texts, tmp_path_factory, tiny_llm, tiny_glp, make_tokenizer):
    """A store of one family's tiny model, and what it was made from."""
    model, tokenizer = tiny_llm(request.param), make_tokenizer()
    glp = tiny_glp(32, (2,), f"tiny-{request.param}")
    config = config_of(tmp_path_factory.mktemp("neurons"), noises=2)
    info = collect_units(config, glp, model, tokenizer, docs_of(texts))
    return config, glp, model, tokenizer, docs_of(texts), info


def naive_units(glp, config, x) -> np.ndarray:
    """All units at activations [N, d], float64, by the public `features`."""
    reader = UnitReader(glp, t=config.t, noises=config.noises, seed=config.seed)
    double = type(glp)(glp.denoiser, glp.normalizer, glp.hookpoints)
    values = [double.features(x.float(), t=config.t, noise=noise.expand(x.shape)) for noise in reader.noises]
    return torch.stack(values).double().mean(dim=0).flatten(1).numpy()


def naive_values(glp, config, model, tokenizer, docs) -> dict[int, np.ndarray]:
    """Units [tokens after the first, units] of each document, one document at a time."""
    found = {}
    for doc in docs:
        [batch] = tokens.tokenize([doc], tokenizer, max_length=config.max_length)
        [recorded] = activations(model, [batch], [2])
        found[doc.index] = naive_units(glp, config, recorded.x)
    return found


def test_statistics_equal_those_of_a_naive_loop(collected):
    config, glp, model, tokenizer, docs, info = collected
    values = np.concatenate(list(naive_values(glp, config, model, tokenizer, docs).values()))
    units = NeuronStore(config.output).units.to_pydict()
    assert info["tokens"] == len(values) and info["documents"] == len(docs) and info["blocks"] == 2
    for name, wanted in (
        ("mean", values.mean(0)),
        ("variance", values.var(0)),
        ("kurtosis", stats.kurtosis(values)),
        ("minimum", values.min(0)),
        ("maximum", values.max(0)),
    ):
        np.testing.assert_allclose(units[name], wanted, rtol=2e-4, atol=2e-5, err_msg=name)
    deviation = np.abs(values - values.mean(0)) / values.std(0)
    shares = np.stack([(deviation > threshold).mean(0) for threshold in (1, 2, 4)], axis=1)
    np.testing.assert_allclose(np.array(units["share_above"]), shares, atol=1.5 / len(values))
    for unit in (0, 100, 255):
        edges = np.linspace(units["histogram_low"][unit], units["histogram_high"][unit], 41)
        edges[[0, -1]] = -np.inf, np.inf
        wanted = np.histogram(values[:, unit], edges)[0]
        assert np.abs(np.array(units["histogram"][unit]) - wanted).sum() <= 2  # a value on an edge
        assert sum(units["histogram"][unit]) == info["tokens"]


def test_examples_equal_those_of_a_naive_loop(collected):
    config, glp, model, tokenizer, docs, _ = collected
    values = naive_values(glp, config, model, tokenizer, docs)
    texts = {doc.index: doc.text for doc in docs}
    store = NeuronStore(config.output)
    extremes = {1: np.stack([v.max(0) for v in values.values()]), -1: np.stack([v.min(0) for v in values.values()])}
    for unit in store:
        number = unit.block * store.info["d_mlp"] + unit.index
        for sign, examples in ((1, unit.top()), (-1, unit.bottom())):
            wanted = sign * np.sort(sign * extremes[sign][:, number])[::-1][:3]
            np.testing.assert_allclose([example.value for example in examples], wanted, rtol=0.01, atol=1e-6)
            assert [example.rank for example in examples] == [0, 1, 2]
            assert len({example.doc for example in examples}) == 3
        assert [example.quantile for example in unit.quantiles()] == pytest.approx(list(QUANTILES))
        for example in unit.examples:
            wanted = np.concatenate([[0.0], values[example.doc][:, number]])
            np.testing.assert_allclose(example.values, wanted, rtol=0.01, atol=1e-6)
            assert example.values[example.peak] == pytest.approx(example.value)
            assert texts[example.doc].startswith("".join(example.token_strings))
            assert len(example.token_strings) == len(example.values) <= LENGTH
        magnitudes = [abs(example.value) for example in unit.quantiles()]
        assert magnitudes == sorted(magnitudes)
        assert all(abs(e.value) == np.abs(e.values).max() for e in unit.quantiles())


def test_neighbours_are_the_most_correlated_units_of_the_random_documents(collected):
    config, glp, model, tokenizer, docs, info = collected
    values = naive_values(glp, config, model, tokenizer, docs)
    keys = random_keys(np.array(list(values)), config.seed)
    chosen = np.array(list(values))[keys.argsort()[: config.reservoir]].tolist()
    assert info["reservoir"]["documents"] == len(chosen)
    matrix = np.corrcoef(np.concatenate([values[doc] for doc in chosen]).T)
    np.fill_diagonal(matrix, 0)
    rows = NeuronStore(config.output).units.to_pydict()
    for unit, (near, found) in enumerate(zip(rows["neighbours"], rows["neighbour_correlations"], strict=True)):
        assert len(set(near)) == 5 and unit not in near
        np.testing.assert_allclose(found, matrix[unit, near], atol=5e-3)
        np.testing.assert_allclose(np.abs(found), np.sort(np.abs(matrix[unit]))[::-1][:5], atol=5e-3)


def without_time(info: dict) -> dict:
    return {key: value for key, value in info.items() if key not in ("wall_seconds", "config")}


def test_batches_do_not_change_what_is_kept(collected, tmp_path):
    config, glp, model, tokenizer, docs, info = collected
    other = dataclasses.replace(config, output=str(tmp_path), batch_tokens=300)
    assert without_time(collect_units(other, glp, model, tokenizer, docs)) == without_time(info)
    for a, b in zip(NeuronStore(config.output), NeuronStore(tmp_path), strict=True):
        assert (
            a.row["histogram"] == b.row["histogram"]
            or abs(np.array(a.row["histogram"]) - b.row["histogram"]).sum() <= 4
        )
        assert a.row["mean"] == pytest.approx(b.row["mean"], abs=1e-5)
        assert a.row["promoted"] == b.row["promoted"]
        np.testing.assert_allclose([e.value for e in a.examples], [e.value for e in b.examples], rtol=0.01, atol=1e-6)
        same = [x.doc == y.doc for x, y in zip(a.examples, b.examples, strict=True)]
        assert np.mean(same) > 0.5  # float32 rounding may swap near ties


def test_the_same_call_gives_the_same_files_and_leaves_the_global_generator_alone(collected, tmp_path):
    config, glp, model, tokenizer, docs, _ = collected
    before = torch.get_rng_state()
    collect_units(dataclasses.replace(config, output=str(tmp_path)), glp, model, tokenizer, docs)
    assert torch.equal(torch.get_rng_state(), before)
    for name in ("units.parquet", "examples.parquet"):
        assert (tmp_path / name).read_bytes() == (type(tmp_path)(config.output) / name).read_bytes()


def test_attention_sinks_are_left_out(collected, tmp_path):
    config, glp, model, tokenizer, docs, info = collected
    [batch] = tokens.tokenize(docs[:1], tokenizer, max_length=LENGTH)
    [recorded] = activations(model, [batch], [2])
    norms = recorded.norms()
    normalizer = glp.normalizer
    before = normalizer.median_norm.clone()
    normalizer.median_norm.fill_(float(norms.max()) * 0.999 / 10)
    try:
        info = collect_units(dataclasses.replace(config, output=str(tmp_path)), glp, model, tokenizer, docs[:1])
    finally:
        normalizer.median_norm.copy_(before)
    assert info["tokens"] == len(norms) - 1
    for example in NeuronStore(tmp_path).unit(0, 0).examples:
        assert example.values[1 + int(norms.argmax())] == 0 and (example.values != 0).sum() == len(norms) - 1


def test_reading_stops_once_enough_tokens_counted(collected, tmp_path):
    config, glp, model, tokenizer, docs, _ = collected
    seen = []
    changed = dataclasses.replace(config, output=str(tmp_path), tokens=100)
    info = collect_units(
        changed,
        glp,
        model,
        tokenizer,
        docs,
        phase=lambda name: lambda done, total, figures: seen.append((name, done, total)),
    )
    assert 100 <= info["tokens"] <= 100 + config.batch_tokens
    reading = [(done, total) for name, done, total in seen if name == "read documents"]
    assert reading[-1] == (info["tokens"], 100) and reading == sorted(reading)


def test_an_interrupted_run_leaves_no_store(collected, tmp_path, monkeypatch):
    config, glp, model, tokenizer, docs, _ = collected

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("latentprior.neurons.store_tables.at_quantiles", interrupted)
    with pytest.raises(KeyboardInterrupt):
        collect_units(dataclasses.replace(config, output=str(tmp_path)), glp, model, tokenizer, docs)
    assert list(tmp_path.iterdir()) == []


def test_errors_of_one_line(collected, tmp_path, tiny_llm, tiny_glp):
    config, glp, model, tokenizer, docs, _ = collected
    config = dataclasses.replace(config, output=str(tmp_path / "out"))
    with pytest.raises(InputError, match="tiny-falcon"):
        collect_units(config, tiny_glp(32, (2,), "tiny-falcon"), model, tokenizer, docs)
    with pytest.raises(InputError, match="16"):
        collect_units(config, tiny_glp(16, (2,)), model, tokenizer, docs)
    with pytest.raises(InputError, match="layer .*3"):
        collect_units(dataclasses.replace(config, layer=3), glp, model, tokenizer, docs)
    with pytest.raises(InputError, match="9"):
        collect_units(config, tiny_glp(32, (9,)), model, tokenizer, docs)
    with pytest.raises(InputError, match=r"layers \[0, 2\].*--layer"):
        collect_units(config, tiny_glp(32, (0, 2)), model, tokenizer, docs)
    with pytest.raises(InputError, match="token"):
        collect_units(config, glp, model, tokenizer, [Document(0, "")])
    assert not (tmp_path / "out").exists()


def test_a_layer_of_a_multi_layer_prior(texts, tmp_path, tiny_llm, tiny_glp, make_tokenizer):
    glp = tiny_glp(32, (0, 2), "tiny-llama")
    config = config_of(tmp_path, layer=2)
    model, tokenizer, docs = tiny_llm("llama"), make_tokenizer(), docs_of(texts)[:8]
    collect_units(config, glp, model, tokenizer, docs)
    [batch] = tokens.tokenize(docs[3:4], tokenizer, max_length=LENGTH)
    [recorded] = activations(model, [batch], [2])
    noise = UnitReader(glp, t=0.2, layer=2).noises[0].expand(recorded.x.shape)
    wanted = glp.features(recorded.x, t=0.2, noise=noise, layer=2)[:, 1, 5]
    found = [
        e for unit in NeuronStore(tmp_path) for e in unit.examples if e.doc == 3 and (unit.block, unit.index) == (1, 5)
    ]
    for example in found or pytest.fail("raise `top`"):
        np.testing.assert_allclose(example.values[1:], wanted, rtol=0.01, atol=1e-6)


def test_the_whole_command(texts, tmp_path, llm_folder, tiny_glp):
    prior = tmp_path / "prior"
    tiny_glp(32, (1,), "tiny-llama").save_pretrained(prior)
    config = config_of(
        tmp_path / "out",
        prior=str(prior),
        device="cpu",
        llm=LLMConfig(model=llm_folder, dtype="float32"),
        text=TextConfig(dataset=texts, part="all"),
    )
    info = neurons(config)
    stored = json.loads((tmp_path / "out" / INFO).read_text())
    assert stored == json.loads(json.dumps(info)) and stored["hookpoint"]["layer"] == 1
    assert stored["corpus"]["dataset"] == texts and {"config", "versions", "seed", "git"} <= stored.keys()
    with pytest.raises(InputError, match="probe.json"):
        neurons(dataclasses.replace(config, probe=str(tmp_path)))
    with pytest.raises(InputError, match="nowhere"):
        neurons(dataclasses.replace(config, prior=str(tmp_path / "nowhere")))


def test_a_store_is_kept_and_can_get_the_tasks_of_a_probing_run(texts, tmp_path, llm_folder, tiny_glp, monkeypatch):
    prior, out = tmp_path / "prior", tmp_path / "out"
    tiny_glp(32, (1,), "tiny-llama").save_pretrained(prior)
    config = config_of(
        out,
        prior=str(prior),
        device="cpu",
        llm=LLMConfig(model=llm_folder, dtype="float32"),
        text=TextConfig(dataset=texts, part="all"),
    )
    first = neurons(config)
    describe_store(out, None, 0, seed=0)
    monkeypatch.setattr("latentprior.neurons.collect.load_llm", lambda _: pytest.fail("the language model was loaded"))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    changed = dataclasses.replace(config, batch_tokens=64, html="anywhere")
    assert neurons(changed) == first and {path.name: path.read_bytes() for path in out.iterdir()} == before
    write_wins(tmp_path, first["hookpoint"])
    info = neurons(dataclasses.replace(config, probe=str(tmp_path)))
    store = NeuronStore(out)
    assert store.info == info and info["config"]["probe"] == str(tmp_path) and info["tokens"] == first["tokens"]
    assert store.unit(1, 7).row["tasks"] == ["sst2"] and store.unit(1, 7).row["source"] == "offline"
    assert (out / EXAMPLES).read_bytes() == before[EXAMPLES]
    assert neurons(config) == info and NeuronStore(out).unit(1, 7).row["tasks"] == ["sst2"]
    with pytest.raises(InputError, match=r"\bt\b.*0\.2.*0\.3"):
        neurons(dataclasses.replace(config, t=0.3))
    (out / UNITS).write_bytes(b"PAR1")
    with pytest.raises(InputError, match="units.parquet"):
        neurons(config)


def write_wins(folder, hookpoint: dict) -> None:
    """A probing run in which unit 7 of block 1 wins a task."""
    (folder / "probe.json").write_text(json.dumps({"hookpoint": hookpoint}))
    row = {"task": "sst2", "source": "meta-neurons", "t": 0.1, "block": 1, "index": 7, "rank": 0, "sign": -1}
    table = pa.Table.from_pylist([{**row, "validation_auc": 0.9, "test_auc": 0.75}])
    pq.write_table(table, folder / "winners.parquet")


def test_units_name_the_tasks_of_a_probing_run(collected, tmp_path):
    config, glp, model, tokenizer, docs, info = collected
    write_wins(tmp_path, info["hookpoint"])
    changed = dataclasses.replace(config, output=str(tmp_path / "out"), probe=str(tmp_path))
    collect_units(changed, glp, model, tokenizer, docs[:5])
    neurons = NeuronStore(tmp_path / "out")
    found = neurons.unit(1, 7).row
    assert (found["tasks"], found["task_aucs"], found["task_signs"]) == (["sst2"], [0.75], [-1])
    assert neurons.unit(1, 6).row["tasks"] == []


def test_the_denoiser_in_bfloat16(collected, tmp_path):
    config, glp, model, tokenizer, docs, _ = collected
    half = type(glp)(glp.denoiser, glp.normalizer, glp.hookpoints)
    try:
        collect_units(
            dataclasses.replace(config, output=str(tmp_path)), half.cast(torch.bfloat16), model, tokenizer, docs
        )
    finally:
        half.cast(torch.float32)
    a, b = NeuronStore(config.output).units, NeuronStore(tmp_path).units
    assert np.corrcoef(a["maximum"].to_numpy(), b["maximum"].to_numpy())[0, 1] > 0.99


def test_copies_of_a_document_count_once(texts, tmp_path, tiny_llm, tiny_glp, make_tokenizer):
    model, tokenizer, glp = tiny_llm("llama"), make_tokenizer(), tiny_glp(32, (2,), "tiny-llama")
    once = docs_of(texts)
    copies = [Document(len(once) + i, doc.text + " further than it is read" * 9) for i, doc in enumerate(once[-5:])]
    long = [doc for doc in copies if len(tokenizer.encode(doc.text)) > 2 * LENGTH]
    assert len(long) == 5
    cut = [Document(doc.index, tokenizer.decode(tokenizer.encode(doc.text)[: LENGTH + 4])) for doc in copies]
    alone = collect_units(config_of(tmp_path / "a"), glp, model, tokenizer, once + cut)
    both = collect_units(config_of(tmp_path / "b"), glp, model, tokenizer, once + cut + copies + once[:7])
    assert (alone["documents"], alone["tokens"]) == (both["documents"], both["tokens"])
    for one, other in zip(NeuronStore(tmp_path / "a"), NeuronStore(tmp_path / "b"), strict=True):
        for kept, same in ((one.top(), other.top()), (one.bottom(), other.bottom())):
            assert len({"".join(e.token_strings) for e in same}) == len(same) == 3
            assert [e.value for e in same] == pytest.approx([e.value for e in kept], rel=0.02)
