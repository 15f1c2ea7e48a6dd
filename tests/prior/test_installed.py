"""Priors as packages: ``priors/pack.py`` makes them, pip installs them, and a name is all one needs."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tomllib
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import latentprior as lp
from latentprior.cli.commands import USAGE, main
from latentprior.config import DoctorConfig, LLMConfig, ProbeConfig
from latentprior.doctor import doctor
from latentprior.prior import installed, loading
from latentprior.prior.glp import GLP
from latentprior.prior.loading import installed_at, packages_of, priors_of
from latentprior.utils.errors import InputError
from prior_packages import offer

ROOT = Path(__file__).parents[2]
PACKAGES = sorted(file.parent for file in (ROOT / "priors").glob("*/pyproject.toml"))
NAME, PACKAGE, MODULE = "tiny-llama-layer1", "latentprior-tiny-llama-layer1", "latentprior_tiny_llama_layer1"
VERSION = "0.1.2"


@pytest.fixture(scope="module")
def pack():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("pack", ROOT / "priors" / "pack.py")
    assert spec and spec.loader
    sys.modules["pack"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["pack"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, llm_folder, sentences) -> Path:
    """Stores of a tiny language model, and priors trained on them: with held-out rows, and without."""
    folder = tmp_path_factory.mktemp("runs")
    llm = lp.load_llm(llm_folder, "cpu", dtype="float32")
    texts = [f"{i} {sentence}" for i in range(60) for sentence in sentences]
    store = lp.record(*llm, texts[40:], layers=[1], output=folder / "acts")
    heldout = lp.record(*llm, texts[:40], layers=[1], output=folder / "heldout")
    options = {"activations": 2048, "blocks": 1, "d_model": 16, "recipe": {"batch_size": 128, "distinct_times": 16}}
    lp.train(store, output=folder / "prior", heldout=heldout, **options)
    lp.train(store, output=folder / "blind", **{**options, "activations": 256})
    return folder


def evaluated(prior: str, runs: Path, output: Path, *options: str) -> dict:
    """What `latentprior evaluate` finds of a prior."""
    samples = ["--samples", "90", "--nfes", "2", "--solvers", "ab2", "--projections", "8"]
    command = ["evaluate", "--prior", prior, "--heldout", str(runs / "heldout"), "--delta-lm", "false", *samples]
    assert main([*command, "--output", str(output), *options]) == 0
    return json.loads((output / "evaluate.json").read_text())


@pytest.fixture(scope="module")
def package(pack, runs) -> Path:
    """The package, made as from a shell."""
    evaluated(str(runs / "prior"), runs, runs / "evaluation")
    command = [str(runs / "prior"), NAME, "--version", VERSION, "--license", "Apache-2.0"]
    command += ["--output", str(runs / "packages"), "--evaluation", str(runs / "evaluation" / "evaluate.json")]
    with redirect_stdout(StringIO()) as said:
        pack.main(command)
    assert "held-out loss of" in said.getvalue() and f"| [`{NAME}`](../priors/{NAME}/README.md) |" in said.getvalue()
    return runs / "packages" / NAME


@pytest.fixture(scope="module")
def site(package, tmp_path_factory):
    """A folder on the path into which pip installed a copy of the package."""
    folder, copied = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("source") / NAME
    shutil.copytree(package, copied)
    alone = ["--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *alone, "--target", folder, copied], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder


def refusal(function, *arguments, **options) -> str:
    """The one line of the error that a call ends in."""
    with pytest.raises(InputError) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# use


def test_a_prior_is_loaded_by_its_name(site, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    glp, trained = GLP.from_pretrained(NAME), GLP.from_pretrained(runs / "prior")
    assert glp.denoiser.dtype == torch.float32 and glp.normalizer.mean.equal(trained.normalizer.mean)
    for name, weight in trained.denoiser.state_dict().items():
        assert glp.denoiser.state_dict()[name].equal(weight.bfloat16().float()), name
    assert load_file(site / MODULE / "model.safetensors")["denoiser.in_proj.weight"].dtype == torch.bfloat16
    assert MODULE not in sys.modules
    assert NAME in installed.installed_names() and installed.installed_folder(NAME) == site / MODULE


def test_a_folder_comes_before_a_name(site, tmp_path, monkeypatch, tiny_glp):
    monkeypatch.chdir(tmp_path)
    tiny_glp(8).save_pretrained(NAME)
    assert GLP.from_pretrained(NAME).width == 8


def test_names_that_are_nowhere(site, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runz").mkdir()
    monkeypatch.setattr(installed, "PUBLISHED", ("published-layer7",))
    line = "the prior 'published-layer7' is not installed: pip install ./priors/published-layer7"
    assert line in refusal(GLP.from_pretrained, "published-layer7")
    assert f"did you mean {NAME!r}?" in (said := refusal(GLP.from_pretrained, "tiny-lama-layer1"))
    assert "no prior at 'tiny-lama-layer1'" in said and NAME in said.partition("installed: ")[2]
    assert "did you mean 'published-layer7'?" in refusal(GLP.from_pretrained, "published-layer8")
    assert "did you mean 'runz'?" in refusal(GLP.from_pretrained, "runs")
    assert "has no revision 'v1'" in refusal(GLP.from_pretrained, NAME, revision="v1")
    assert "unknown checkpoint '64'" in refusal(GLP.from_pretrained, NAME, "64")


def test_packages_of_others(site, tmp_path, monkeypatch, tiny_glp):
    """A module inside another is found without running that one; a damaged package and a doubtful name are said."""
    tiny_glp(8).save_pretrained(tmp_path / "others" / "inner")
    (tmp_path / "others" / "__init__.py").write_text("raise RuntimeError('imported')")
    offer(tmp_path, "others", "others-prior", "others.inner")
    offer(tmp_path, "damaged", "gone-prior", "gone.inner")
    offer(tmp_path, "double", NAME, "others")
    monkeypatch.syspath_prepend(tmp_path)
    assert GLP.from_pretrained("others-prior").width == 8
    assert "the package damaged lacks the folder gone.inner" in refusal(GLP.from_pretrained, "gone-prior")
    assert f"in several packages, double, {PACKAGE}" in refusal(GLP.from_pretrained, NAME)


def test_commands_take_a_name(site, runs, tmp_path, monkeypatch, capsys, llm_folder):
    monkeypatch.chdir(tmp_path)
    assert main(["sample", "--prior", NAME, "--n", "3", "--steps", "2", "--output", "x.safetensors"]) == 0
    with safe_open("x.safetensors", "pt") as file:
        assert file.metadata()["prior"] == NAME and file.metadata()[PACKAGE] == VERSION
    result = evaluated(NAME, runs, tmp_path / "evaluation")
    assert result["config"]["prior"] == NAME and result["versions"][PACKAGE] == VERSION
    assert main(["convert", "--source", NAME, "--output", "copy"]) == 0
    assert GLP.from_pretrained("copy").denoiser.dtype == torch.float32
    checks = {check.name: check for check in doctor(DoctorConfig(NAME, device="cpu", llm=LLMConfig(llm_folder)))}
    assert checks["prior loads"].detail.startswith(f"{PACKAGE} {VERSION}; ")
    capsys.readouterr()
    assert main(["sample", "--prior", "tiny-llama-layer2", "--output", "x.safetensors"]) == USAGE
    assert f"did you mean {NAME!r}?" in capsys.readouterr().err


def test_several_priors_by_name_and_folder(site, runs):
    names = [NAME, str(runs / "prior")]
    priors, hookpoint = priors_of(ProbeConfig(priors=names, output="x").priors, device="cpu")
    assert list(priors) == names and hookpoint.layer == 1
    assert packages_of(priors.values()) == {PACKAGE: VERSION}


def test_the_prior_of_a_hookpoint_is_found_by_where_it_was_trained(site, tmp_path, monkeypatch, tiny_glp):
    (place,) = GLP.from_pretrained(NAME).hookpoints
    found = installed_at(replace(place, model="a copy of other name"))
    assert found and found[0] == NAME and found[1].hookpoints == (place,)
    assert installed_at(replace(place, layer=2)) is None
    assert installed_at(replace(place, model="another model", weights="other ones")) is None
    for name, layers in (("a-prior", (1,)), ("of-two-layers", (1, 2))):
        tiny_glp(place.width, layers, place.model).save_pretrained(tmp_path / name.replace("-", "_"))
        offer(tmp_path, name, name, name.replace("-", "_"))
    monkeypatch.syspath_prepend(tmp_path)
    assert (found := installed_at(place)) and found[0] == "a-prior"
    monkeypatch.setattr(loading, "PUBLISHED", (NAME,))
    assert (found := installed_at(place)) and found[0] == NAME


def test_names_of_published_priors(monkeypatch):
    monkeypatch.setattr(installed, "PUBLISHED", ("gemma-3-270m-layer9",))
    assert installed.published_name("google/gemma-3-270m", 9) == "gemma-3-270m-layer9"
    assert installed.published_name("gemma-3-270m", 8) is None


def test_a_prior_is_evaluated_beside_another(site, runs, tmp_path, capsys, llm_folder, write_texts):
    texts = ["--text.dataset", write_texts(tmp_path / "texts.jsonl", 30), "--text.heldout", "0.3"]
    options = ["--delta-lm", "true", "--llm.model", llm_folder, "--steps", "2", *texts, "--solvers", "euler,ab2"]
    result = evaluated(str(runs / "prior"), runs, tmp_path / "evaluation", *options, "--compare", NAME)
    assert result["versions"][PACKAGE] == VERSION and NAME in capsys.readouterr().out
    (row,) = result["compared"]
    assert row["prior"] == NAME and row["heldout_loss"]["mean"] == pytest.approx(
        result["heldout_loss"]["mean"], rel=1e-2
    )
    *_, ours, other = result["distribution"]
    assert (other["source"], other["prior"], other["solver"], other["nfe"]) == ("compared", NAME, "ab2", ours["nfe"])
    assert other["frechet"]["total"] == pytest.approx(ours["frechet"]["total"], rel=1e-2)
    delta = {row.get("prior", row["method"]): row["delta"] for row in result["delta_lm"]["rows"]}
    assert delta[NAME] == pytest.approx(delta["prior"], abs=1e-3) and len(delta) == 5
    page = (tmp_path / "evaluation" / "report.html").read_text()
    assert f"{NAME} is measured beside this prior, on the same rows" in page and f"Prior {NAME}, AB2" in page
    alone = evaluated(str(runs / "prior"), runs, tmp_path / "alone", *options)
    assert alone["distribution"] == result["distribution"][:-1] and "compared" not in alone


def test_what_cannot_be_compared_is_refused(site, runs, tmp_path, tiny_glp):
    tiny_glp(32, (2,), "tiny-llama").save_pretrained(tmp_path / "of-2")
    options: dict = {"samples": 90, "nfes": [2], "delta_lm": False}
    assert f"{tmp_path / 'of-2'} is a prior of tiny-llama layer 2" in refusal(
        lp.evaluate, runs / "prior", runs / "heldout", compare=[str(tmp_path / "of-2")], **options
    )
    assert "name at least one" in refusal(
        lp.evaluate, runs / "prior", runs / "heldout", compare=[NAME], **options | {"solvers": []}
    )


# the package


def test_the_package_is_a_priors_folder_and_a_project(package, site):
    project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    assert project["name"] == PACKAGE and project["version"] == VERSION and "dependencies" not in project
    assert importlib.metadata.version(PACKAGE) == VERSION
    copied = {file.name for file in (site / MODULE).iterdir()} - {"__pycache__"}
    assert copied == {"__init__.py", "config.json", "model.safetensors", "README.md"}
    assert GLP.from_pretrained(package).provenance == GLP.from_pretrained(NAME).provenance


def test_what_is_published_names_no_path_of_this_machine(package, runs, llm_folder):
    text = "".join(file.read_text() for file in package.iterdir() if file.suffix in (".md", ".json", ".toml"))
    assert llm_folder not in text and str(runs) not in text and str(Path.home()) + "/" not in text
    glp = GLP.from_pretrained(package)
    assert {h.model for h in glp.hookpoints} == {"tiny-llama"}
    model, tokenizer = lp.load_llm(llm_folder, "cpu", dtype="float32")  # known by its weights, wherever they lie
    with glp.attach(model):
        model(**tokenizer("The quick brown fox", return_tensors="pt"))


def test_paths_become_names(pack):
    paths = ["/x/y z/model.gguf", "C:\\x\\texts", "~/texts", "../texts", "a/b", "text"]
    names = ["model.gguf", "texts", "texts", "texts", "a/b", "text"]
    rest = {"seed": 1, "ended": None}
    assert pack.portable({"paths": paths, **rest}) == {"paths": names, **rest}


def test_the_card_tells_what_was_measured(package, runs):
    card, provenance = (package / "README.md").read_text(), GLP.from_pretrained(package).provenance
    stored = provenance["storage"]
    exact = GLP.from_pretrained(runs / "prior").provenance["training"]["heldout_loss"]
    assert stored["heldout_loss"]["trained"] == pytest.approx(exact, rel=1e-2)  # training evaluates in bfloat16
    assert 0 < abs(stored["heldout_loss"]["stored"] / stored["heldout_loss"]["trained"] - 1) < 1e-3
    for part in (f'GLP.from_pretrained("{NAME}")', "## Training", "## Evaluation", "## Licence", "license: apache-2.0"):
        assert part in card
    assert "stored in bfloat16" in card and f"{stored['heldout_loss']['stored']:.5f}" in card
    (row,) = provenance["evaluations"]
    measured = json.loads((runs / "evaluation" / "evaluate.json").read_text())
    assert row["heldout_loss"] == measured["heldout_loss"]["mean"] and f"| {row['two_sample_auc']:.3f} | AB2" in card


def test_what_cannot_be_packed_is_said(pack, runs, tmp_path, monkeypatch):
    def refused(run: str = "prior", name: str = NAME, **options) -> str:
        return refusal(pack.pack, runs / run, name, output=tmp_path, **{"license": "Apache-2.0", **options})

    evaluations, heldout = [runs / "evaluation" / "evaluate.json"], str(runs / "heldout")
    assert "'Tiny_Llama'" in refused(name="Tiny_Llama")
    assert "'next'" in refused(version="next")
    assert "without a store of held-out activations" in refused("blind")
    assert "the evaluation of another prior" in refused("blind", heldout=heldout, evaluations=evaluations)
    assert "no result of latentprior evaluate" in refused(evaluations=[runs / "prior" / "train.json"])
    assert "licence of 'tiny-llama' is not known" in refused(license=None)
    assert "holds no prior" in refused(".")
    monkeypatch.setattr(pack, "MOST_ROUNDING", 1e-12)
    assert "rounding the weights changes the held-out loss by" in refused()
    monkeypatch.setattr(pack, "MOST_BYTES", 1000)
    assert "a package takes at most" in refused()
    assert not list(tmp_path.iterdir())


def test_several_layers(pack, tmp_path, llm_folder, sentences):
    llm, texts = lp.load_llm(llm_folder, "cpu", dtype="float32"), [f"{i} {s}" for i in range(40) for s in sentences]
    store = lp.record(*llm, texts, layers=[0, 2], output=tmp_path / "acts")
    options = {"activations": 256, "blocks": 1, "d_model": 16, "recipe": {"batch_size": 128, "distinct_times": 16}}
    lp.train(store, output=tmp_path / "prior", heldout=store, **options)
    lp.evaluate(tmp_path / "prior", store, layer=2, samples=90, nfes=[2], delta_lm=False, output=tmp_path / "of-2")
    evaluations = [tmp_path / "of-2" / "evaluate.json"]
    folder = pack.pack(tmp_path / "prior", "tiny-layers0-2", output=tmp_path, license="MIT", evaluations=evaluations)
    card = (folder / "README.md").read_text()
    assert "glp.sample(16, layer=0)" in card and "glp.attach(model, layer=0)" in card and "\n| 2 | " in card
    assert "| tiny-llama | 0 | output | 32 |\n| tiny-llama | 2 |" in card and not (folder / "LICENSE").exists()
    assert "| 0, 2 |" in pack.table_row(folder)


def test_gemmas_terms_are_handed_on(pack, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "LICENSES", {"tiny": pack.LICENSES["gemma"]})
    terms = tmp_path / "TERMS.md"
    terms.write_text("The terms.")
    options = {"heldout": str(runs / "heldout"), "license_file": terms}
    folder = pack.pack(runs / "blind", "gemma", output=tmp_path / "packages", **options)
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert project["license"] == "LicenseRef-Gemma" and project["license-files"] == ["NOTICE", "TERMS.md"]
    assert "Gemma Terms of Use" in (folder / "NOTICE").read_text() and not (folder / "LICENSE").exists()
    assert (folder / "TERMS.md").read_text() == "The terms."
    assert "license: gemma" in (folder / "README.md").read_text()


def test_the_install_lists_a_new_package(pack, tmp_path, monkeypatch):
    (tmp_path / "requirements-assets.txt").write_text("x==1\n")
    monkeypatch.setattr(pack, "HERE", tmp_path / "priors")
    monkeypatch.setattr(pack, "REQUIREMENTS", tmp_path / "requirements-assets.txt")
    for name in ("a-layer1", "b-layer2", "a-layer1"):
        pack.list_requirement(tmp_path / "priors" / name)
    assert pack.REQUIREMENTS.read_text() == "x==1\n./priors/a-layer1\n./priors/b-layer2\n"


# the packages of this project


def test_every_package_is_installed_by_the_readmes_lines_and_documented():
    lines = (ROOT / "requirements-assets.txt").read_text().splitlines()
    assert sorted(line for line in lines if line.startswith("./")) == [f"./priors/{p.name}" for p in PACKAGES]
    page = (ROOT / "docs" / "priors.md").read_text()
    for package in PACKAGES:
        assert package.name in installed.PUBLISHED and f"[`{package.name}`](../priors/{package.name}/README.md)" in page


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_a_published_package_is_sound(package):
    glp = GLP.from_pretrained(package)
    project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    assert packages_of([glp]) == {project["name"]: project["version"]} and project["name"].endswith(package.name)
    assert (package / "model.safetensors").stat().st_size <= 40_100_000 and glp.denoiser.dtype == torch.float32
    assert glp.sample(2, steps=2, layer=glp.hookpoints[0].layer, generator=0).isfinite().all()
    assert not re.search('"(/|~|[A-Z]:)', (package / "config.json").read_text())
