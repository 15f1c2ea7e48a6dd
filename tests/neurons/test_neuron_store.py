from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentprior.neurons import store
from latentprior.neurons.store import (
    DESCRIPTIONS,
    DESCRIPTIONS_SCHEMA,
    EXAMPLES,
    EXAMPLES_SCHEMA,
    INFO,
    UNITS,
    UNITS_SCHEMA,
    NeuronStore,
    write_descriptions,
    write_store,
)
from latentprior.utils.errors import InputError

BLOCKS, D_MLP = 2, 7
SETTINGS = {"kind": "neurons", "blocks": BLOCKS, "d_mlp": D_MLP, "thresholds": [1.0], "quantiles": [0.5, 1.0]}


def units(total: int = BLOCKS * D_MLP) -> pa.Table:
    rows = [
        {
            **{name: float(i) for name in ("mean", "variance", "kurtosis", "minimum", "maximum")},
            **{"unit": i, "block": i // D_MLP, "index": i % D_MLP, "histogram": [i, 2], "promoted": [f" w{i}"]},
            **{"tasks": ["sst2"] if i == 3 else [], "task_signs": [-1] if i == 3 else []},
        }
        for i in range(total)
    ]
    return pa.Table.from_pylist(rows, schema=UNITS_SCHEMA)


def examples(skip: tuple[int, ...] = (0, 4, 13)) -> list[pa.Table]:
    """All units' examples but those of `skip`; a unit's may be in two tables."""
    rows = []
    for unit in range(BLOCKS * D_MLP):
        for kind, rank in [] if unit in skip else [("top", 0), ("top", 1), ("bottom", 0), ("quantile", 1)]:
            quantile = 1.0 if kind == "quantile" else None
            pieces, values = ["", f"a{unit}", " b"], [0.0, unit + rank / 2, -1.5]
            rows.append(
                {
                    **{"unit": unit, "kind": kind, "rank": rank, "quantile": quantile, "value": values[1], "doc": 9},
                    **{"peak": 1, "pieces": pieces, "values": values},
                }
            )
    return [pa.Table.from_pylist(rows[i : i + 6], schema=EXAMPLES_SCHEMA) for i in range(0, len(rows), 6)]


@pytest.fixture
def folder(tmp_path):
    write_store(tmp_path, SETTINGS, units(), examples())
    return tmp_path


@pytest.fixture(params=[1, 5, 1000])
def row_group(request, monkeypatch) -> int:
    monkeypatch.setattr(store, "ROW_GROUP", request.param)
    return request.param


def test_units_come_back_as_written(row_group, tmp_path):
    write_store(tmp_path, SETTINGS, units(), examples())
    neurons = NeuronStore(tmp_path)
    assert len(neurons) == 14 and neurons.info == SETTINGS
    unit = neurons.unit(1, 2)
    assert (unit.block, unit.index, unit.row["unit"], unit.row["promoted"]) == (1, 2, 9, [" w9"])
    assert [(e.kind, e.rank, e.value) for e in unit.examples] == [
        ("top", 0, 9.0),
        ("top", 1, 9.5),
        ("bottom", 0, 9.0),
        ("quantile", 1, 9.5),
    ]
    assert unit.top() == unit.examples[:2] and unit.bottom() == [unit.examples[2]]
    [quantile] = unit.quantiles()
    assert quantile.quantile == 1.0 and quantile.token_strings == ["", "a9", " b"] and unit.top()[0].quantile is None
    assert quantile.values.dtype == np.float32 and quantile.values.tolist() == [0.0, 9.5, -1.5]
    assert neurons.unit(0, 3).row["tasks"] == ["sst2"] and neurons.unit(0, 3).row["task_signs"] == [-1]
    assert neurons.unit(0, 4).examples == [] == neurons.unit(1, 6).examples


def test_iterating_gives_every_unit_once_in_order(row_group, tmp_path):
    write_store(tmp_path, SETTINGS, units(), examples())
    neurons = NeuronStore(tmp_path)
    found = list(neurons)
    assert [(u.block, u.index) for u in found] == [(b, i) for b in range(BLOCKS) for i in range(D_MLP)]
    for unit in found:
        alone = neurons.unit(unit.block, unit.index)
        assert unit.row == alone.row and len(unit.examples) == len(alone.examples)
        assert [e.values.tolist() for e in unit.examples] == [e.values.tolist() for e in alone.examples]


def test_one_unit_reads_few_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "ROW_GROUP", 4)
    write_store(tmp_path, SETTINGS, units(), examples())
    neurons, read = NeuronStore(tmp_path), []
    whole = neurons._examples.read_row_groups
    monkeypatch.setattr(
        neurons, "_examples", type("Spy", (), {"read_row_groups": lambda self, g: read.append(g) or whole(g)})()
    )
    neurons.unit(0, 5)
    [groups] = read
    assert 1 <= len(groups) <= 2


def test_descriptions_are_joined(folder):
    assert NeuronStore(folder).units["description"].null_count == 14
    row = {"description": "dates", "source": "endpoint", "consistency": 4, "complexity": None, "detection": 0.75}
    table = pa.Table.from_pylist([{"unit": 8, "reason": "", **row}], schema=DESCRIPTIONS_SCHEMA)
    write_descriptions(folder, table)
    neurons = NeuronStore(folder)
    assert {name: neurons.unit(1, 1).row[name] for name in row} == row
    assert neurons.unit(1, 2).row["description"] is None and len(neurons.units) == 14
    write_store(folder, SETTINGS, units(), examples())
    assert not (folder / DESCRIPTIONS).exists()


@pytest.mark.parametrize("block, index", [(-1, 0), (2, 0), (0, -1), (0, 7)])
def test_units_that_are_not_there_are_refused(folder, block, index):
    with pytest.raises(InputError, match="0 to 1 .*0 to 6"):
        NeuronStore(folder).unit(block, index)


def test_no_store_and_damaged_ones_are_named(folder):
    with pytest.raises(InputError, match=INFO):
        NeuronStore(folder / "elsewhere")
    for name in (UNITS, EXAMPLES):
        whole = (folder / name).read_bytes()
        for content in (b"", b"not parquet", whole[:-100], whole[: len(whole) // 2]):
            (folder / name).write_bytes(content)
            with pytest.raises(InputError, match=rf"{name} is damaged: [^\n]*$"):
                NeuronStore(folder)
        (folder / name).unlink()
        with pytest.raises(InputError, match=name):
            NeuronStore(folder)
        (folder / name).write_bytes(whole)
    for text in ("", "[]", "{}", json.dumps({**SETTINGS, "kind": "probe"}), json.dumps({**SETTINGS, "blocks": "2"})):
        (folder / INFO).write_text(text)
        with pytest.raises(InputError, match=INFO):
            NeuronStore(folder)


def test_files_of_different_stores_are_refused(folder, tmp_path_factory):
    (folder / INFO).write_text(json.dumps({**SETTINGS, "d_mlp": 8}))
    with pytest.raises(InputError, match="units.parquet.*16"):
        NeuronStore(folder)
    other = tmp_path_factory.mktemp("other")
    write_store(other, {**SETTINGS, "blocks": 1}, units(7), [])
    (other / EXAMPLES).write_bytes((folder / EXAMPLES).read_bytes())
    with pytest.raises(InputError, match="examples.parquet.*units.parquet"):
        NeuronStore(other)
    pq.write_table(pa.table({"unit": [0]}), other / EXAMPLES)
    with pytest.raises(InputError, match="columns"):
        NeuronStore(other)


def test_damage_inside_the_examples_is_named_when_it_is_met(folder):
    whole = bytearray((folder / EXAMPLES).read_bytes())
    start = pq.read_metadata(folder / EXAMPLES).row_group(0).column(7).dictionary_page_offset
    whole[start : start + 40] = bytes(40)
    (folder / EXAMPLES).write_bytes(whole)
    neurons = NeuronStore(folder)
    with pytest.raises(InputError, match=EXAMPLES):
        neurons.unit(0, 1)
    with pytest.raises(InputError, match=EXAMPLES):
        list(neurons)


def test_a_store_is_there_whole_or_not_at_all(folder, tmp_path_factory, run_killed):
    def interrupted():
        yield examples()[0]
        raise KeyboardInterrupt

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(KeyboardInterrupt):
        write_store(folder, SETTINGS, units(), interrupted())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(ValueError, match="order"):
        write_store(folder, SETTINGS, units(), examples()[::-1])
    assert len(NeuronStore(folder)) == 14


@pytest.mark.slow
def test_killed_at_any_point_leaves_the_old_store_or_none_or_the_new_one(tmp_path, run_killed):
    write_store(tmp_path, SETTINGS, units(), examples())
    for changes in range(60):
        ended = run_killed(_replace, tmp_path, changes=changes)
        try:
            neurons = NeuronStore(tmp_path)
        except InputError as error:
            assert INFO in str(error) and not ended
            continue
        assert len(list(neurons)) == 14
        if ended:
            assert neurons.info["seed"] == 1
            return
    pytest.fail("never ended by itself")


def _replace(folder) -> None:
    write_store(folder, {**SETTINGS, "seed": 1}, units(), examples())


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=str(tmp_path)):
        write_store(tmp_path / "file" / "x", SETTINGS, units(), [])
