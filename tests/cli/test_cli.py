"""The command line: what it says when all is well and when it is not, and that its options are the configuration's."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path

import jaxtyping
import pytest
import yaml
from safetensors.torch import load_file

from latentprior.cli import commands as cli
from latentprior.cli.commands import main
from latentprior.cli.help import EXAMPLES
from latentprior.cli.parser import parse
from latentprior.config import RecordConfig, SteerConfig, SweepConfig, TextSource, TrainConfig
from latentprior.config.options import build, options_of

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.compat


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("texts")
    for i in range(40):
        (folder / f"{i:02}.txt").write_text(
            f"Text number {i}. " + "The quick brown fox jumps over the dog. " * (1 + i % 5)
        )
    return str(folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, texts, llm_folder) -> Path:
    """A store, a held-out store and a prior, all made by the command line."""
    folder = tmp_path_factory.mktemp("runs")
    llm = ["--llm.model", llm_folder, "--text.dataset", texts, "--text.heldout", "0.3", "--max-length", "40"]
    record = ["record", "--layers", "1", *llm]
    assert main([*record, "--output", str(folder / "activations")]) == 0
    assert main([*record, "--output", str(folder / "heldout"), "--text.part", "heldout"]) == 0
    train = ["train", "--store", str(folder / "activations"), "--heldout", str(folder / "heldout")]
    recipe = ["--recipe", '{"batch_size": 128, "distinct_times": 16}']
    assert main([*train, "--output", str(folder / "prior"), "--activations", "1024", *recipe]) == 0
    return folder


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a failing command prints."""
    assert main(list(arguments)) in (cli.USAGE, cli.FAILED)
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = printed.err.splitlines()
    assert len(lines) == 1, printed.err
    assert "Traceback" not in printed.err
    return lines[0]


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command that succeeds prints."""
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_fits_two_screens_and_names_every_option(command, capsys):
    text = shown(capsys, command, "--help")
    lines = text.splitlines()
    assert len(lines) <= 100 and all(len(line) <= 100 for line in lines), lines
    assert f"  latentprior {command} --" in text and cli.COMMANDS[command].about[:30] in text
    for option in options_of(cli.COMMANDS[command].config).values():
        assert option.written in text or option.written.rpartition(".")[2].lstrip("-") in text
    for noise in ("Literal", "type:", "CONFIG", "typing", "+  "):
        assert noise not in text


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_the_whole_help_explains_every_option(command, capsys):
    text = " ".join(shown(capsys, command, "--help-all").split())
    for option in options_of(cli.COMMANDS[command].config).values():
        assert f" {option.written} " in text and option.doc in text


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_the_example_of_each_command_is_a_call_of_it(command):
    example = EXAMPLES[command].replace("examples/", f"{ROOT}/examples/")
    build(cli.COMMANDS[command].config, parse(example.split(), cli.COMMANDS[command].config).given)


def documented() -> list[str]:
    """Every call of a command in the README, the documentation and the examples, without comments."""
    files = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.yaml")]
    text = "\n".join(file.read_text(encoding="utf-8").replace("\\\n", " ") for file in files)
    names = "|".join(cli.COMMANDS)
    calls = re.findall(rf"^(?:#\s+)?(?:\S.* )?latentprior ((?:{names}) --[^#`|;&\n]*)", text, re.MULTILINE)
    return sorted({call for call in calls if "..." not in call})


@pytest.mark.parametrize("call", documented())
def test_documented_calls_are_calls(call, monkeypatch):
    monkeypatch.chdir(ROOT)
    name, *words = shlex.split(call)
    build(cli.COMMANDS[name].config, parse(words, cli.COMMANDS[name].config).given)


def test_the_help_of_the_program_names_its_commands(capsys):
    text = shown(capsys, "--help")
    assert all(f"  {name} " in text for name in cli.COMMANDS)
    assert shown(capsys, "--version").strip()


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_what_must_be_given_is_named(command, capsys):
    for option in options_of(cli.COMMANDS[command].config).values():
        if option.default is dataclasses.MISSING:
            assert f"{option.written} must be given: {option.doc}" in failure(capsys, command)
            break


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["recrod"], "did you mean 'record'"),
        (["record", "--max-lenght", "3"], "did you mean '--max-length'"),
        (["record", "--llm.dtype", "float61"], "(valid: auto, float32, bfloat16)"),
        (["record", "--output", "x", "--max-length", "0"], "RecordConfig.max_length must be positive"),
        (["train", "--recipe", '{"learning_rat": 1}'], "did you mean 'recipe.learning_rate'"),
        (["train", "--output", "x", "--store", "nowhere"], "nowhere"),
        (["record", "--output", "x", "--text.dataset", "nofile.jsonl"], "no such file or folder: 'nofile.jsonl'"),
        (["record", "--output", "x", "--llm.model", "../no model"], "no such model"),
        (["convert", "--output", "x"], "--source must be given"),
        (["sample", "--prior", "/", "--output", "x"], "holds no prior"),
    ],
)
@pytest.mark.assets
def test_mistakes_take_one_line(arguments, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert expected in failure(capsys, *arguments)


@pytest.mark.parametrize(
    ("given", "count"),
    [
        ("1M", 1_000_000),
        ("2.5k", 2500),
        ("2e6", 2_000_000),
        ("1_000_000", 1_000_000),
        ("3G", 3_000_000_000),
        ("12", 12),
        ("-1", -1),
    ],
)
def test_counts_can_be_abbreviated(given, count):
    assert parse(["--activations", given], TrainConfig).given == {"run.activations": count}
    assert parse([f"--micro-batch={given}"], TrainConfig).given == {"run.micro_batch": count}
    assert parse(["--budgets", f"64k,{given}"], SweepConfig).given == {"budgets": [64000, count]}
    assert parse(["--text.limit", given], RecordConfig).given == {"text.limit": count}
    assert parse(["--preset", given], SweepConfig).given == {"preset": given}  # no count


def test_a_count_that_is_none_is_one_line(capsys, tmp_path):
    (tmp_path / "c.yaml").write_text("activations: 1X\n")
    for wrong in (["--activations", "1X"], ["--config", str(tmp_path / "c.yaml")]):
        said = failure(capsys, "train", *wrong)
        assert "activations must be a whole number" in said and "'1X'" in said


def test_an_option_without_a_meaning_is_one_line(capsys):
    assert "--store means nothing with --from llm: leave it out" in failure(
        capsys, "train", "--from", "llm", "--store", "S", "--output", "O"
    )
    assert "--text.limit means nothing for a store (it belongs to --from llm): leave it out" in failure(
        capsys, "train", "--store", "S", "--text.limit", "3", "--output", "O"
    )


@pytest.mark.parametrize("command", ["sample", "plan"])
def test_an_output_file_that_is_a_folder_or_lies_below_a_file_is_said_first(capsys, tmp_path, command):
    (tmp_path / "file").write_text("")
    command, *prior = [command, "--prior", "p"] if command == "sample" else [command]
    assert "is a folder: name a file to write" in failure(capsys, command, *prior, "--output", str(tmp_path))
    assert "file is a file, not a folder" in failure(capsys, command, *prior, "--output", str(tmp_path / "file" / "x"))


def test_a_site_or_store_of_units_that_is_a_file_is_said_first(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    for option in ("--output", "--html"):
        call = ["neurons", "--prior", "p", "--output", str(tmp_path / "new"), option, str(tmp_path / "file")]
        assert "file is a file, not a folder" in failure(capsys, *call)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["record", "--layer", "7"], "unknown option '--layer'; did you mean '--layers'? (valid: --output, "),
        (["record", "--out", "x"], "unknown option '--out'; did you mean '--output'?"),
        (["sample", "--prio", "x"], "unknown option '--prio'; did you mean '--prior'"),
        (
            ["record", "--llm.mode", "x"],
            "did you mean '--llm.model' or '--llm.dtype' or '--llm.device-map'? (valid: --llm",
        ),
        (["record", "--llm.model.name", "x"], "unknown option '--llm.model.name'; did you mean '--llm.model'"),
        (["record", "--layers", "3", "5"], "unexpected argument '5': options begin with --, and lists have commas"),
        (["record", "-l", "3"], "unknown option '--l'"),
        (["--layers"], "--layers has no command before it: name one of doctor, record, train"),
        ([], "name a command: doctor, record, train"),
        (
            ["record", "--layers", "one"],
            "layers must be a whole number, such as",
        ),
        (
            ["record", "--text.limit", "some"],
            "text.limit must be a whole number, such as",
        ),
        (["record", "--chat", "maybe"], "chat must be true or false, got 'maybe'"),
        (["record", "--max-length"], "--max-length needs a value"),
        (["record", "--llm", "gpt2"], "llm is a group of options, not 'gpt2': --llm.model, --llm.gguf, --llm.revision"),
        (["record", "--text.mix", '[{"datset": "x"}]'], "text.mix: unknown key 'datset'; did you mean 'dataset'?"),
        (["train", "--recipe", '{"batch_size": "many"}'], "recipe.batch_size must be a whole number"),
        (["train", "--recipe.betas", "0.9"], "recipe.betas must be 2 numbers, got '0.9'"),
        (["steer", "--model", "x"], "model may be judge.model or llm.model: say which"),
    ],
)
def test_no_option_is_half_accepted(arguments, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside of tests
    said = failure(capsys, *arguments)
    assert expected in said and "+" not in said


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("llm:\n  modle: x\n", "unknown key 'llm.modle'; did you mean 'llm.model'"),
        ("max_length: many\n", "max_length must be a whole number, such as 7, 64k or 2e6, got 'many'"),
        ("llm: x\n", "llm is a group of options, not 'x'"),
        ("text:\n  mix:\n  - datset: x\n", "text.mix: unknown key 'datset'; did you mean 'dataset'?"),
        ("layers: [1\n", "is no valid YAML"),
        ("- 1\n", "a configuration file holds options by name"),
        (None, "unknown configuration file in"),
    ],
)
def test_wrong_configuration_files_are_refused_in_plain_words(content, expected, capsys, tmp_path):
    (tmp_path / "good.yaml").write_text("layers: [1]\n")
    if content is not None:
        (tmp_path / "god.yaml").write_text(content)
    said = failure(capsys, "record", "--config", str(tmp_path / "god.yaml"))
    assert expected in said and (content is not None or "did you mean 'good.yaml'?" in said)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["record", "--layers", "9", "LLM", "TEXT"], "layer 9 is out of range: LlamaForCausalLM has layers 0 to 3"),
        (["record", "--llm.model", "tiny-lama", "TEXT"], "'tiny-lama': there is no such folder (did you mean 'tiny-l"),
        (["record", "--llm.model", "tiny-lama", "--text.dataset", "text.txt"], "no such file or folder: 'text.txt' (d"),
        (["record", "LLM", "--text.dataset", "mine.csv", "--text.column", "boddy"], "'boddy'; did you mean 'body'?"),
        (["train", "--from", "llm", "--llm.model", "tiny-lama", "--text.dataset", "text.txt"], "'text.txt' (did you"),
        (
            ["evaluate", "EVALUATE", "--prior", "runs/proir"],
            "no prior at 'runs/proir': not a folder (did you mean 'runs/prior'?)",
        ),
        (["evaluate", "EVALUATE", "--llm.model", "tiny-lama", "TEXT"], "'tiny-lama': there is no such folder (did"),
        (["evaluate", "EVALUATE", "LLM", "--text.dataset", "text.txt"], "no such file or folder: 'text.txt' (did you"),
        (["sample", "--prior", "runs/prior", "--checkpoint", "fianl"], "unknown checkpoint 'fianl'; did you mean 'fin"),
        (["sample", "--prior", "runs/prior", "--layer", "3"], "unknown layer '3' (valid: 1)"),
        (
            ["probe", "PROBE", "--tasks", "min.csv", "LLM"],
            "'min.csv': there is no such file (did you mean 'mine.csv'?)",
        ),
        (
            ["probe", "PROBE", "--tasks", "mine.csv", "--label-column", "moood"],
            "'moood'; did you mean 'mood'? (valid: body, m",
        ),
        (["neurons", "--prior", "runs/prior", "LLM", "--text.dataset", "text.txt"], "no such file or folder: 'text.t"),
    ],
)
def test_unknown_names_show_before_anything_runs(runs, arguments, expected, capsys, tmp_path, monkeypatch, llm_folder):
    """Loading a model counts as running, save where a layer is asked for; evaluating and training do in any case."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to(runs)
    (tmp_path / "tiny-llama").symlink_to(llm_folder)
    (tmp_path / "texts.txt").write_text("The quick brown fox.")
    (tmp_path / "mine.csv").write_text("body,mood\nfine,1\n")
    for module in ("evaluation.evaluate.compare_distributions", "probe.experiment.priors_of"):
        monkeypatch.setattr(f"latentprior.{module}", None)
    stores = ["--prior", "runs/prior", "--heldout", "runs/heldout", "--train", "runs/activations", "--samples", "50"]
    words = {
        "LLM": ["--llm.model", "tiny-llama"],
        "TEXT": ["--text.dataset", "texts.txt", "--text.part", "all"],
        "EVALUATE": stores,
        "PROBE": ["--priors", "runs/prior"],
    }
    spelled = [part for word in arguments for part in words.get(word, [word])]
    spelled += ["--output", "new"]
    assert expected in failure(capsys, *spelled)


def test_mistake_in_a_yaml_file_is_named(capsys, tmp_path):
    (tmp_path / "c.yaml").write_text("layerz: [3]\n")
    assert "did you mean 'layers'" in failure(capsys, "record", "--config", str(tmp_path / "c.yaml"))


def test_the_old_place_of_the_device_names_the_new_one(capsys, tmp_path):
    (tmp_path / "c.yaml").write_text("llm: {model: x, device: cpu}\n")
    for old in (["--llm.device", "cpu"], ["--llm.device=cpu"], ["--config", str(tmp_path / "c.yaml")]):
        assert "llm.device has become device: --device says where" in failure(capsys, "record", *old)


def test_every_command_that_computes_takes_its_device_from_one_place():
    for name, command in cli.COMMANDS.items():
        written = [option.written for option in options_of(command.config).values()]
        devices = [option for option in written if option.endswith(("-device", ".device")) and "buffer" not in option]
        assert devices == ([] if name == "convert" else ["--device"])


def test_yaml_cannot_run_code(capsys, tmp_path):
    marker = tmp_path / "ran"
    (tmp_path / "c.yaml").write_text(f"output: !!python/object/apply:os.system ['touch {marker}']\n")
    failure(capsys, "record", "--config", str(tmp_path / "c.yaml"))
    assert not marker.exists()


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(ValueError, match="holds no prior"):
        main(["sample", "--debug", "--prior", str(tmp_path), "--output", str(tmp_path / "x")])


def test_markup_in_messages_is_text(capsys, tmp_path):
    assert "[bold]x[/bold]" in failure(capsys, "sample", "--prior", "[bold]x[/bold]", "--output", str(tmp_path / "x"))


@pytest.mark.parametrize(
    ("words", "given"),
    [
        ("--resume --layers 3,7 --max-length 5", {"resume": True, "layers": [3, 7], "max_length": 5}),
        ("--resume false --layers=[1] --chat=true", {"resume": False, "layers": [1], "chat": True}),
        ("--dtype float32 --llm.dtype float32 --disk_budget null",
         {"dtype": "float32", "llm.dtype": "float32", "disk_budget": None}),
        ("--limit 3 --text.limit 4", {"text.limit": 4}),  # a group is named where it must be
        ("--text {limit:\xa05,part:\xa0all}", {"text.limit": 5, "text.part": "all"}),
        ("--text.mix [{dataset:\xa0a,weight:\xa02}]", {"text.mix": [TextSource("a", weight=2.0)]}),
    ],
)  # fmt: skip
def test_words_become_values(words, given):
    assert parse([word.replace("\xa0", " ") for word in words.split(" ")], RecordConfig).given == given


def test_lists_and_numbers_are_read_as_they_are_written():
    steer = parse(["--strengths", "-0.5,1e-3", "--directions", "5,7", "--methods", "[]"], SteerConfig)
    assert steer.given == {"strengths": [-0.5, 1e-3], "directions": ["5", "7"], "methods": []}
    recipe = parse(["--recipe.learning_rate", "4e-3", "--recipe", '{"betas": [0.9, 0.95], "ema": null}'], TrainConfig)
    assert recipe.given == {"recipe.learning_rate": 4e-3, "recipe.betas": (0.9, 0.95), "recipe.ema": None}
    train = build(TrainConfig, {"run.output": "o", "store.path": "s"} | recipe.given)
    assert train.recipe == {"learning_rate": 4e-3, "betas": (0.9, 0.95), "ema": None}
    assert train.resolved_recipe().learning_rate == 4e-3


def test_a_group_keeps_the_defaults_of_its_command():
    text = build(SweepConfig, {"store": "a", "heldout": "b", "output": "c", "text.dataset": "d"}).text
    assert (text.dataset, text.part) == ("d", "heldout")


def test_a_later_value_counts(tmp_path):
    (tmp_path / "c.yaml").write_text("output: b\nlayers: [1]\ntext: {limit: 1k}\n")
    file = ["--config", str(tmp_path / "c.yaml")]
    given = {"output": "b", "layers": [1], "text.limit": 1000}
    assert parse(["--output", "a", *file], RecordConfig).given == given
    assert parse([*file, "--output", "a"], RecordConfig).given == given | {"output": "a"}


def test_printed_config_is_a_config(capsys, tmp_path, texts):
    arguments = ["record", "--output", "x", "--max-length", "77", "--text.dataset", texts]
    (tmp_path / "c.yaml").write_text(shown(capsys, *arguments, "--print_config"))
    assert yaml.safe_load((tmp_path / "c.yaml").read_text())["max_length"] == 77
    given = parse(["--config", str(tmp_path / "c.yaml")], RecordConfig).given
    assert build(RecordConfig, given) == build(RecordConfig, parse(arguments[1:], RecordConfig).given)


def test_record_and_train_print_what_they_made(runs, capsys):
    assert (runs / "activations" / "manifest.json").is_file()
    assert (runs / "prior" / "model.safetensors").is_file()
    assert main(["train", "--store", str(runs / "activations"), "--heldout", str(runs / "heldout"), "--output",
                 str(runs / "prior"), "--activations", "1024", "--recipe",
                 '{"batch_size": 128, "distinct_times": 16}']) == 0  # fmt: skip
    assert "held-out loss" in capsys.readouterr().out


def test_sample(runs, tmp_path, capsys):
    path = tmp_path / "samples.safetensors"
    assert (
        main(
            [
                "sample",
                "--prior",
                str(runs / "prior"),
                "--n",
                "7",
                "--steps",
                "3",
                "--solver",
                "heun",
                "--output",
                str(path),
            ]
        )
        == 0
    )
    assert load_file(path)["activations"].shape == (7, 32)
    assert "NFE" in capsys.readouterr().out


def test_evaluate_writes_json_and_page(runs, tmp_path, texts, llm_folder, capsys):
    assert main(["evaluate", "--prior", str(runs / "prior"), "--heldout", str(runs / "heldout"), "--train",
                 str(runs / "activations"), "--output", str(tmp_path), "--samples", "100", "--nfes", "2", "--solvers",
                 "euler,ab2", "--projections", "8", "--llm.model", llm_folder, "--text.dataset", texts,
                 "--text.heldout", "0.3", "--text.limit", "5", "--steps", "2"]) == 0  # fmt: skip
    result = json.loads((tmp_path / "evaluate.json").read_text())
    assert {"config", "versions", "git", "seed", "wall_seconds"} <= result.keys()
    assert [row["source"] for row in result["distribution"]] == [
        "real", "gaussian-full", "gaussian-diagonal", "prior", "prior",
    ]  # fmt: skip
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    assert "Delta LM loss" in capsys.readouterr().out


@pytest.mark.assets
def test_probe_and_neurons_make_their_pages(runs, tmp_path, texts, llm_folder, capsys):
    words = [("red green blue", "colour"), ("one two three", "number")]
    rows = [f"{words[i % 2][0]} {i},{words[i % 2][1]}" for i in range(140)]
    (tmp_path / "mine.csv").write_text("\n".join(["prompt,target", *rows]) + "\n")
    prior, llm = str(runs / "prior"), ["--llm.model", llm_folder]
    assert main(["probe", "--priors", prior, "--tasks", str(tmp_path / "mine.csv"), "--output", str(tmp_path / "probe"),
                 "--times", "0.1,0.5", "--sparse", "1", "--candidates", "8", "--folds", "2", *llm]) == 0  # fmt: skip
    assert "Meta-neurons" in capsys.readouterr().out
    assert "Meta-neurons" in (tmp_path / "probe" / "report.html").read_text()
    (tmp_path / "small.csv").write_text("prompt,target\na,1\nb,0\n")
    both = ",".join([str(tmp_path / "mine.csv"), str(tmp_path / "small.csv")])
    again = ["probe", "--priors", prior, "--tasks", both, "--output", str(tmp_path / "probe"), "--times", "0.1,0.5",
             "--sparse", "1", "--candidates", "8", "--folds", "2", *llm]  # fmt: skip
    assert main(again) == cli.FAILED
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1] == f"skipped 1 of 2 tasks: {tmp_path / 'small.csv'}"
    assert "fewer than 120" in " ".join(printed.out.split()) and (tmp_path / "probe" / "report.html").is_file()
    said = failure(capsys, *again, "--tasks", str(tmp_path / "mine.csv"), "--text-column", "prmpt")
    assert "unknown text column of mine.csv 'prmpt'; did you mean 'prompt'" in said
    site = tmp_path / "site"
    assert main(["neurons", "--prior", prior, "--probe", str(tmp_path / "probe"), "--output", str(tmp_path / "neurons"),
                 "--tokens", "200", "--top", "3", "--reservoir", "4", "--html", str(site), "--text.dataset", texts,
                 *llm]) == 0  # fmt: skip
    assert "described offline" in capsys.readouterr().out
    assert "mine" in (site / "units.js").read_text()
    info = json.loads((tmp_path / "neurons" / "neurons.json").read_text())
    assert len(list(site.glob("units/b*/n*.html"))) == info["blocks"] * info["d_mlp"]
    said = failure(capsys, "neurons", "--prior", prior, "--output", str(tmp_path / "n"), "--tokens", "9",
                   "--probe", str(tmp_path / "none"), *llm)  # fmt: skip
    assert "none" in said
    said = failure(capsys, "probe", "--priors", prior, "--tasks", "92_glue_sst", "--output", str(tmp_path / "p"), *llm)
    assert "92_glue_sst2" in said
