from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentprior.lm.hooks import Hookpoint
from latentprior.neurons.top_probing_units import ProbedTask, read_top_probing_units
from latentprior.utils.errors import InputError

HERE = Hookpoint("m", 2, 32)
ROWS = [
    # task, source, t, block, index, rank, sign, validation, test
    ("sst2", "meta-neurons", 0.1, 0, 3, 0, 1, 0.9, 0.8),
    ("yelp", "meta-neurons", 0.1, 0, 3, 4, -1, 0.7, 0.6),
    ("news", "meta-neurons", 0.1, 0, 3, 0, -1, 0.9, 0.95),
    ("sst2", "meta-neurons", 0.5, 1, 1, 0, 1, 0.9, 0.7),
    ("sst2", "meta-neurons: other", 0.1, 1, 2, 0, 1, 0.9, 0.7),
    ("sst2", "layer", None, 0, 3, 0, 1, 0.9, 0.7),
]


def write(folder, rows=tuple(ROWS), hookpoint=HERE):
    names = ("task", "source", "t", "block", "index", "rank", "sign", "validation_auc", "test_auc")
    pq.write_table(
        pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows]), folder / "winners.parquet"
    )
    (folder / "probe.json").write_text(json.dumps({"kind": "probe", "hookpoint": hookpoint.to_dict()}))
    return folder


def test_tasks_of_units_at_the_nearest_noise_level(tmp_path):
    write(tmp_path)
    best = [ProbedTask(0, "news", 0.95, -1), ProbedTask(0, "sst2", 0.8, 1), ProbedTask(4, "yelp", 0.6, -1)]
    assert read_top_probing_units(tmp_path, 0.2, HERE, blocks=2, d_mlp=5) == {3: best}
    assert read_top_probing_units(tmp_path, 0.4, HERE, blocks=2, d_mlp=5) == {6: [ProbedTask(0, "sst2", 0.7, 1)]}


def test_runs_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(InputError, match="probing run"):
        read_top_probing_units(tmp_path, 0.1, HERE, blocks=2, d_mlp=5)
    write(tmp_path)
    with pytest.raises(InputError, match="unit 3 of block 0"):
        read_top_probing_units(tmp_path, 0.1, HERE, blocks=2, d_mlp=3)
    with pytest.raises(InputError, match="m layer 2 .*m layer 1"):
        read_top_probing_units(tmp_path, 0.1, Hookpoint("m", 1, 32), blocks=2, d_mlp=5)
    with pytest.raises(InputError, match="m layer 2 .*other layer 2"):
        read_top_probing_units(tmp_path, 0.1, Hookpoint("other", 2, 32), blocks=2, d_mlp=5)
    assert read_top_probing_units(tmp_path, 0.1, Hookpoint("copies/m", 2, 32), blocks=2, d_mlp=5)
    write(tmp_path, ROWS[-1:])
    with pytest.raises(InputError, match="meta-neurons"):
        read_top_probing_units(tmp_path, 0.1, HERE, blocks=2, d_mlp=5)
    pq.write_table(pa.table({"task": ["x"]}), tmp_path / "winners.parquet")
    with pytest.raises(InputError, match="winners.parquet"):
        read_top_probing_units(tmp_path, 0.1, HERE, blocks=2, d_mlp=5)
    (tmp_path / "winners.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="is damaged"):
        read_top_probing_units(tmp_path, 0.1, HERE, blocks=2, d_mlp=5)
    (tmp_path / "probe.json").write_text("[1]")
    with pytest.raises(InputError, match="probe.json"):
        read_top_probing_units(tmp_path, 0.1, HERE, blocks=2, d_mlp=5)
