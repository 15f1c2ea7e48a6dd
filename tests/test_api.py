"""What the top level offers: the six-line API, results, and an example in every public docstring."""

from __future__ import annotations

import copy
import doctest
import json
import pickle
import re
import shutil
import subprocess
import sys
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import latentprior as lp
from latentprior.config import LLMConfig, RepairConfig
from latentprior.data.activations import record_activations
from latentprior.prior.glp import GLP
from latentprior.steer import random_direction
from latentprior.utils.errors import InputError
from latentprior.utils.formatting import number
from latentprior.utils.results import Result

LAYER = 1
IDS = torch.tensor([[5, 8, 13, 21, 34, 55, 89]])


@pytest.fixture(scope="module")
def llm(llm_folder):
    return lp.load_llm(llm_folder, "cpu", dtype="float32")


@pytest.fixture(scope="module")
def texts(sentences) -> list[str]:
    return [f"{i} {sentence}" for i in range(8) for sentence in sentences]


@pytest.fixture(scope="module")
def store(llm, texts, tmp_path_factory) -> lp.ActivationStore:
    return lp.record(*llm, texts, layers=[LAYER], output=tmp_path_factory.mktemp("api") / "acts", dtype="float32")


@pytest.fixture
def direction(llm) -> lp.Direction:
    return lp.Direction.of(random_direction(32, 0), lp.Hookpoint.of(llm[0], LAYER), "a direction", "random")


@pytest.fixture
def glp(llm, store, tiny_glp) -> GLP:
    """A prior of the tiny model of `llm`, with a mean norm of its activations' size."""
    made = tiny_glp(32, (LAYER,))
    made.hookpoints = tuple(store.hookpoints)
    made.normalizer.mean_norm.fill_(float(store.moments().mean_norm()[0]))
    return made


def generated(model, **options) -> list[int]:
    return model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=6, do_sample=False, **options)[
        0
    ].tolist()


# the top level


def test_importing_the_package_does_not_import_torch():
    check = "import sys, latentprior; latentprior.__version__; dir(latentprior); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_every_public_name_is_there():
    for name in lp.__all__:
        assert getattr(lp, name) is not None, name
    assert lp.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="nothing"):
        lp.nothing  # noqa: B018


def test_public_functions_are_not_shadowed_by_packages():
    """Importing a package sets it as an attribute of its parent."""
    for name in ("record", "train", "evaluate", "steering"):
        assert callable(getattr(lp, name)), name


def test_six_lines(llm_folder, texts, tmp_path):
    model, tokenizer = lp.load_llm(llm_folder)
    store = lp.record(model, tokenizer, texts, layers=[LAYER], output=tmp_path / "acts")
    glp = lp.train(store, output=tmp_path / "prior", preset="fast", activations=1024, blocks=1)
    happy = lp.Direction.from_texts(model, tokenizer, ["I love it."], ["I hate it."], layer=LAYER)
    plain = generated(model)
    with glp.steer(model, happy, strength=3.0) as counts:
        steered = generated(model)
    assert counts.edited > 0 and steered != plain and generated(model) == plain
    loaded = GLP.from_pretrained(tmp_path / "prior")
    with loaded.steer(model, happy, strength=3.0):
        assert generated(model) == steered


# load_llm


def test_a_model_is_named_or_configured(llm_folder):
    model, tokenizer = lp.load_llm(llm_folder, dtype=torch.float32)
    assert model.dtype == torch.float32 and tokenizer.name_or_path == llm_folder
    assert lp.load_llm(LLMConfig(llm_folder), dtype="bfloat16")[0].dtype == torch.bfloat16
    with pytest.raises(InputError, match="revision"):
        lp.load_llm("smollm2-135m", revision="main")
    with pytest.raises(InputError, match="nowhere"):
        lp.load_llm("nowhere/at-all")


# record


def test_layers_have_to_be_named(llm, texts, tmp_path):
    with pytest.raises(InputError, match="layers is empty"):
        lp.record(*llm, texts, layers=[], output=tmp_path)


def test_texts_in_memory_are_recorded_as_they_are(llm, texts, store):
    expected = record_activations(*llm, texts, [LAYER])
    rows = store.batch(torch.arange(len(store)))
    order = (rows.doc * 10_000 + rows.position).argsort()
    assert torch.equal(rows.doc[order], expected.doc.long()) and torch.equal(rows.token[order], expected.token.long())
    torch.testing.assert_close(rows.x[order], expected.x.float(), atol=1e-5, rtol=1e-5)


def test_a_list_is_opened_again_and_another_is_refused(llm, texts, tmp_path):
    first = lp.record(*llm, texts, layers=[LAYER], output=tmp_path / "acts")
    again = lp.record(*llm, list(texts), layers=[LAYER], output=tmp_path / "acts")
    assert again.manifest == first.manifest
    with pytest.raises(InputError, match="digest|documents"):
        lp.record(*llm, texts[1:], layers=[LAYER], output=tmp_path / "acts")
    with pytest.raises(InputError, match="layers"):
        lp.record(*llm, texts, layers=[0], output=tmp_path / "acts")


def test_an_iterator_is_recorded_once(llm, texts, tmp_path):
    given = lp.record(*llm, iter([*texts, " "]), layers=[LAYER], output=tmp_path / "acts", max_activations=100)
    assert len(given) == 100
    with pytest.raises(InputError, match="acts"):
        lp.record(*llm, iter(texts), layers=[LAYER], output=tmp_path / "acts")


def test_record_names_what_is_wrong(llm, texts, tmp_path):
    with pytest.raises(InputError, match="list"):
        lp.record(*llm, "one text", layers=[LAYER], output=tmp_path / "acts")
    with pytest.raises(InputError, match="max_length"):
        lp.record(*llm, texts, layers=[LAYER], output=tmp_path / "acts", max_lenght=3)
    with pytest.raises(InputError, match="layer"):
        lp.record(*llm, texts, layers=[99], output=tmp_path / "acts")


# the store


def test_rows_of_a_store(store):
    rows = store.rows(torch.arange(len(store)))
    assert torch.equal(store[3], rows[3]) and torch.equal(store[-1], rows[-1])
    assert torch.equal(store[2:9:3], rows[2:9:3]) and torch.equal(store[::-1], rows.flip(0))
    assert torch.equal(store[[5, 0, -2]], rows[[5, 0, -2]]) and torch.equal(store[np.array([4])], rows[[4]])
    mask = torch.arange(len(store)) % 7 == 0
    assert torch.equal(store[mask], rows[mask]) and store[[]].shape == store[:0].shape == (0, store.width)
    for wrong in (len(store), -len(store) - 1, [0, len(store)], mask[1:], torch.zeros(2, 2, dtype=torch.long)):
        with pytest.raises(IndexError):
            store[wrong]
    assert sum(1 for _ in store) == len(store)


def test_a_store_is_a_torch_dataset(store, llm, texts, tmp_path):
    loader = torch.utils.data.DataLoader(store.dataset(), batch_size=50)
    assert torch.equal(torch.cat(list(loader)), store[:])
    data = store.dataset()
    assert len(data) == len(store) and torch.equal(data[-1], store[-1])
    with pytest.raises(IndexError):
        data[len(store)]
    both = lp.record(*llm, texts, layers=[0, 2], output=tmp_path / "both")
    x, layer = both.dataset()[5]
    assert torch.equal(x, both[5]) and layer in (0, 2)
    of_one = both.dataset(layers=[2])
    assert len(of_one) == len(both) // 2 and torch.equal(of_one[0], both[both.rows_at([2])][0])
    x, layers = next(iter(torch.utils.data.DataLoader(both.dataset(), batch_size=8, shuffle=True)))
    assert x.shape == (8, 32) and layers.shape == (8,)
    with pytest.raises(InputError, match="layer"):
        both.dataset(layers=[1])


# steer


def test_steering_by_the_prior_is_steering_with_its_paired_repair(llm, glp, direction):
    model, unit = llm[0], float(glp.normalizer.mean_norm[0])
    for samples in (1, 3):
        with glp.steer(model, direction, strength=1.5, samples=samples, generator=7):
            mine = model(IDS).logits
        repair = lp.PriorRepair(glp, RepairConfig(samples=samples), seed=7)
        with lp.steering(model, lp.Edit(direction, 1.5), mean_norm=unit, repair=repair):
            expected = model(IDS).logits
        torch.testing.assert_close(mine, expected)
        assert not torch.allclose(mine, model(IDS).logits, atol=1e-3)


def test_strength_zero_is_the_model_itself(llm, glp, direction):
    plain = llm[0](IDS).logits
    with glp.steer(llm[0], direction, strength=0.0):
        assert torch.equal(llm[0](IDS).logits, plain)


def test_the_unit_of_strength_is_the_mean_norm(llm, glp, direction):
    model = llm[0]
    with glp.steer(model, direction, 2.0):
        expected = model(IDS).logits
    with glp.steer(model, direction, 1.0, mean_norm=2 * float(glp.normalizer.mean_norm[0])):
        torch.testing.assert_close(model(IDS).logits, expected)


def test_an_unknown_mean_norm_is_taken_from_mean_and_variance(tiny_glp, store):
    """As in official checkpoints, which hold no norms."""
    normalizer = tiny_glp(32, (LAYER,)).normalizer
    assert normalizer.norm_unit() == pytest.approx(110.0)
    x, moments = store[:].double(), store.moments()
    known = lp.GLP(tiny_glp(32).denoiser, type(normalizer).from_moments(moments)).normalizer
    assert known.norm_unit(LAYER) == pytest.approx(float(x.norm(dim=1).mean()), rel=1e-5)
    known.mean_norm.fill_(float("nan"))
    assert known.norm_unit(LAYER) == pytest.approx(float(x.square().sum(dim=1).mean().sqrt()), rel=1e-5)
    assert known.norm_unit(LAYER) >= float(x.norm(dim=1).mean())
    assert known.norm_unit(LAYER, otherwise=5.0) == 5.0


def test_steer_refuses_what_does_not_fit(llm, glp, direction, tiny_llm, tiny_glp):
    model = llm[0]
    elsewhere = lp.Direction.of(direction.vector, lp.Hookpoint.of(model, 2), "layer 2", "random")
    with pytest.raises(InputError, match="layer 2"), glp.steer(model, elsewhere):
        pass
    inside = lp.Direction.of(direction.vector, lp.Hookpoint.of(model, LAYER, "input"), "input", "random")
    with pytest.raises(InputError, match="input"), glp.steer(model, inside):
        pass
    with pytest.raises(InputError, match="steps"):
        glp.steer(model, direction, steps=0)
    other = tiny_llm(seed=1)
    with pytest.raises(InputError, match="check_model"), glp.steer(other, direction):
        pass
    with glp.steer(other, direction, check_model=False):
        other(IDS)
    with pytest.raises(InputError, match="width|wide|hidden"), glp.steer(tiny_llm(width=64), direction):
        pass
    nowhere = tiny_glp(32, (LAYER,))
    nowhere.hookpoints = ()
    with pytest.raises(InputError, match="hookpoints"), nowhere.steer(model, direction):
        pass


# train and evaluate


def test_train_takes_a_store_or_its_folder_and_any_option(store, tmp_path):
    options: dict[str, Any] = {"preset": "fast", "activations": 512, "blocks": 1, "d_model": 32, "seed": 3}
    glp = lp.train(store, output=tmp_path / "a", **options)
    again = lp.train(store.folder, output=tmp_path / "b", **options)
    x = store[:5].float()
    assert torch.equal(glp.project(x, generator=0), again.project(x, generator=0))
    assert glp.denoiser.config.d_model == 32 and glp.provenance["training"]["activations"] >= 512
    with pytest.raises(InputError, match="blocks"):
        lp.train(store, output=tmp_path / "c", blokcs=1)
    with pytest.raises(InputError, match="nothing-here"):
        lp.train(tmp_path / "nothing-here", output=tmp_path / "c")


@pytest.fixture(scope="module")
def evaluated(store, tiny_glp, tmp_path_factory):
    glp = tiny_glp(32, (LAYER,))
    glp.hookpoints = tuple(store.hookpoints)
    folder = tmp_path_factory.mktemp("evaluated")
    before = {name: value.clone() for name, value in glp.state_dict().items()}
    result = lp.evaluate(glp, store, samples=200, solvers=["euler"], nfes=[2, 4], output=folder)
    assert all(torch.equal(value, before[name]) for name, value in glp.state_dict().items())
    return result, folder


def test_a_result_is_what_its_file_holds(evaluated):
    result, folder = evaluated
    written = json.loads((folder / "evaluate.json").read_text())
    assert json.loads(json.dumps(result)) == written == json.loads(json.dumps(result.to_dict()))
    assert result.heldout_loss.mean == written["heldout_loss"]["mean"] and result["kind"] == "evaluate"
    assert type(result.to_dict()["heldout_loss"]) is dict


def test_evaluate_measures_in_a_loaded_model(llm, store, glp, tmp_path, write_texts):
    glp.save_pretrained(tmp_path / "prior")
    result = lp.evaluate(
        tmp_path / "prior",
        heldout=store,
        train=store,
        model=llm[0],
        tokenizer=llm[1],
        samples=200,
        solvers=["euler"],
        nfes=[2],
        steps=2,
        text={"dataset": write_texts(tmp_path / "texts.jsonl", 12), "part": "all"},
    )
    rows = result.to_pandas("delta_lm.rows")
    assert {"prior", "gaussian", "noise", "mean"} == set(rows["method"]) and "per_token.delta" in rows.columns
    with pytest.raises(InputError, match="samples"):
        lp.evaluate(glp, store, samples=10**6)
    with pytest.raises(InputError, match="samples"):
        lp.evaluate(glp, store, sample=10)


# results


def test_a_result_has_attributes_tables_and_a_page(evaluated):
    result, _ = evaluated
    frame = result.to_pandas()
    assert list(frame["source"]) == ["real", "gaussian-full", "gaussian-diagonal", "prior", "prior"]
    assert frame["frechet.total"].tolist() == [row["frechet"]["total"] for row in result["distribution"]]
    assert "heldout_loss.by_t" in result.tables() and len(result.to_pandas("heldout_loss.by_t")) == 10
    page = result._repr_html_()
    assert "gaussian-full" in page and number(result.heldout_loss.mean) in page
    assert len(repr(result)) < 1000 and "heldout_loss" in dir(result)
    with pytest.raises(AttributeError, match="heldout_los"):
        result.heldout_los  # noqa: B018
    with pytest.raises(InputError, match="distribution"):
        result.to_pandas("distributions")


def test_a_result_without_rows_is_one_row():
    result = Result({"loss": 0.5, "name": "<b>"}, table="nothing")
    assert result.to_pandas().to_dict("records") == [{"loss": 0.5, "name": "<b>"}]
    assert "&lt;b&gt;" in result._repr_html_() and "<b>" not in result._repr_html_()


def test_rows_inside_rows_have_the_outer_values():
    values = {"summary": {"directions": [{"direction": d, "points": [{"strength": 1}, {"strength": 2}]} for d in "ab"]}}
    frame = Result(values, table="summary.directions.points").to_pandas()
    assert frame.to_dict("list") == {"direction": ["a", "a", "b", "b"], "strength": [1, 2, 1, 2]}
    assert Result(values).tables() == ["summary.directions", "summary.directions.points"]


def test_a_result_can_be_copied():
    result = Result({"rows": [{"a": {"b": 1}}]}, table="rows")
    for other in (copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        assert other == result and other.rows[0].a.b == 1 and list(other.to_pandas()) == ["a.b"]


def test_without_pandas_the_reason_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(InputError, match="pandas"):
        Result({"a": 1}).to_pandas()


# the examples of the reference

PAGES = sorted((Path(__file__).parent.parent / "docs" / "reference").glob("*.md"))
DOCUMENTED = [name for page in PAGES for name in re.findall(r"^::: latentprior\.(\S+)", page.read_text(), re.M)]
LINES = [line for page in PAGES for line in page.read_text().splitlines()]
EXAMPLES = "\n".join(line for line in LINES if line.startswith((">>>", "...")))
PUBLIC = [name for name in lp.__all__ if name not in ("InputError", "__version__", "hooks")]
WITH_EXAMPLE = [name for name in PUBLIC if ">>>" in (getattr(lp, name).__doc__ or "")]


def test_every_public_name_is_in_the_reference():
    assert {*PUBLIC} <= {*DOCUMENTED}
    assert [name for name in PUBLIC if name not in WITH_EXAMPLE and f"lp.{name}" not in EXAMPLES] == ["ActivationBatch"]


@pytest.fixture
def shared(llm, store, glp, texts, direction, tmp_path, monkeypatch) -> dict[str, Any]:
    """What the examples take for granted; they run in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    positive, negative = ["What a wonderful day.", "I love this."], ["What a terrible day.", "I hate this."]
    named = {"model": llm[0], "tokenizer": llm[1], "texts": texts, "positive": positive, "negative": negative}
    return named | {"lp": lp, "torch": torch, "store": store, "glp": glp, "direction": direction}


def run_examples(text: str, name: str, shared: dict[str, Any]) -> None:
    examples = doctest.DocTestParser().get_doctest(text, shared, name, None, None)
    assert examples.examples, f"no example in {name}"
    report: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(examples, out=report.append)
    assert not report, "".join(report)


@pytest.mark.parametrize("name", [*WITH_EXAMPLE, "GLP.attach", "GLP.steer"])
def test_the_example_of_a_docstring_runs(name, shared, has_assets):
    if name == "load_llm" and not has_assets:
        pytest.skip("needs the packages of requirements-assets.txt")
    if name == "GLP":
        shared["glp"].save_pretrained("runs/prior")
    if name == "ActivationStore":
        shutil.copytree(shared["store"].folder, "runs/acts")
    run_examples(attrgetter(name)(lp).__doc__, name, shared)


@pytest.mark.parametrize("page", [page for page in PAGES if ">>>" in page.read_text()], ids=lambda page: page.stem)
def test_the_examples_of_a_reference_page_run(page, shared):
    run_examples(page.read_text(), page.name, shared)
