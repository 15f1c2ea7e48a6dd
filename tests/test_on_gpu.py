"""Everything on a simulated GPU: priors and activations on different devices, contexts, models that are spread over two
devices, the README's lines, and every command."""

from __future__ import annotations

import json
import re
import runpy
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import latentprior.demo
import latentprior.lm.loading
from latentprior import GLP, InputError, record_activations
from latentprior.cli import commands as cli
from latentprior.config import RepairConfig
from latentprior.data.prompts import tokenized
from latentprior.data.text import Document
from latentprior.data.tokens import tokenize
from latentprior.evaluation.lm_loss import lm_losses
from latentprior.judge.fluency import conditional_nll
from latentprior.lm.hooks import Hookpoint
from latentprior.steer import Direction, Edit, PriorRepair, steering
from latentprior.steer.generate import generate_continuations
from simulated_device import CPU, GPU, MixUp, simulated_gpu

ROOT = Path(__file__).parent.parent
OTHER = {CPU: GPU, GPU: CPU}


@pytest.fixture
def gpu() -> Iterator[Counter[tuple[str, str]]]:
    with simulated_gpu() as calls:
        yield calls


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1)) * 2


# -- the prior -----------------------------------------------------------------------------------------------------

NOISE = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(2))
LAYERS = torch.tensor([[0, 2, 0, 2, 0]] * 3)
METHODS: dict[str, Callable[[GLP, Tensor, Callable[[Tensor], Tensor]], Tensor]] = {
    "velocity": lambda glp, x, to: glp.velocity(x, to(torch.rand(3, 5, generator=seeded())), to(LAYERS)),
    "loss": lambda glp, x, to: glp.loss(x, layer=to(LAYERS), generator=3),
    "loss at times": lambda glp, x, to: glp.loss(x, t=to(torch.full((5,), 0.3)), noise=to(NOISE), layer=2),
    "project": lambda glp, x, to: glp.project(x, layer=0, generator=4),
    "paired, held": lambda glp, x, to: glp.project(
        x=x + 1, reference=to(x), hold=to(NOISE[0, 0]), noise=to(NOISE), layer=to(LAYERS), solver="ab2"
    ),
    "features": lambda glp, x, to: glp.features(x, noise=to(NOISE), layer=to(LAYERS)),
    "score": lambda glp, x, to: glp.score(x, layer=to(LAYERS), generator=6),
}


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("place", [CPU, GPU], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_methods_take_activations_from_any_device_and_give_them_back_there(name, place, tiny_glp, x, gpu):
    method, glp = METHODS[name], tiny_glp(32, (0, 2))
    expected = method(glp, x, lambda value: value)
    gpu.clear()
    glp.to(place)
    # All on the other device; and what comes with the activations on the prior's.
    for found in (
        method(glp, x.to(OTHER[place]), lambda value: value.to(OTHER[place])),
        method(glp, x.to(OTHER[place]), lambda value: value.to(place)),
    ):
        assert found.device == OTHER[place]
        assert torch.allclose(found.cpu(), expected, atol=1e-5)
    assert gpu["linear", place.type] and not gpu["linear", OTHER[place].type]
    assert glp.device == place


def test_a_gradient_reaches_activations_on_another_device(tiny_glp, x, gpu):
    glp, x = tiny_glp().to(GPU), x.requires_grad_()
    glp.loss(x, generator=0).backward()
    found = x.grad
    assert found is not None and found.device == CPU
    (expected,) = torch.autograd.grad(glp.to(CPU).loss(x, generator=0), x)
    assert torch.allclose(found, expected, atol=1e-6)


def test_samples_are_where_the_prior_is(tiny_glp, gpu):
    expected = tiny_glp().sample(7, generator=3)
    found = tiny_glp().to(GPU).sample(7, generator=3)
    assert found.device == GPU and torch.allclose(found.cpu(), expected, atol=1e-4)
    drawn = torch.Generator("cuda").manual_seed(3)
    assert torch.equal(tiny_glp().to(GPU).sample(7, generator=drawn).cpu(), found.cpu())
    with pytest.raises(MixUp):
        tiny_glp().sample(7) + found


def test_statistics_refuse_activations_of_another_device_in_one_line(tiny_glp, x, gpu):
    normalizer = tiny_glp().to(GPU).normalizer
    for refused in (normalizer.normalize, normalizer.denormalize, normalizer.sinks, normalizer.covector):
        with pytest.raises(
            InputError, match=r"^activations on cpu, statistics on cuda:0: move one with .to\(device\)$"
        ):
            refused(x)


# -- contexts ------------------------------------------------------------------------------------------------------

PROMPT = torch.tensor([[0, 5, 6, 7, 8], [0, 9, 3, 4, 5]])


def generated(model: Any, ids: Tensor = PROMPT) -> Tensor:
    return model.generate(ids.to(model.device), max_new_tokens=6, min_new_tokens=6, do_sample=False).cpu()


@pytest.fixture
def moves(monkeypatch) -> list[torch.device]:
    """Where priors were moved, in order."""
    seen: list[torch.device] = []
    before = GLP.to

    def to(glp: GLP, device: torch.device) -> GLP:
        seen.append(device)
        return before(glp, device)

    monkeypatch.setattr(GLP, "to", to)
    return seen


@pytest.mark.parametrize("inference", [False, True])
def test_attach_moves_the_prior_to_the_hidden_state_once(inference, tiny_glp, tiny_llm, gpu, moves):
    push = torch.randn(32, generator=seeded()) * 20
    options: dict[str, Any] = {"edit": lambda x: x + push.to(x), "paired": True, "generator": 0}
    model, glp = tiny_llm("llama"), tiny_glp(32, (1,), "tiny-llama")
    with glp.attach(model, **options):
        expected = generated(model)
    assert not torch.equal(expected, generated(model))
    moves.clear()
    model = model.to("cuda")
    with torch.inference_mode(inference), glp.attach(model, **options):
        assert torch.equal(generated(model), expected)
    assert moves == [GPU] and glp.device == GPU
    assert not any(p.is_inference() for p in glp.parameters())


@pytest.mark.parametrize("repair", [{}, {"rate": 0.5}, {"paired": True, "samples": 2, "hold": True}, {"readd": True}])
def test_steering_is_the_same_on_both_devices(repair, tiny_glp, tiny_llm, gpu, moves):
    def steered(device: torch.device) -> Tensor:
        model, glp = tiny_llm("llama").to(device), tiny_glp(32, (1,), "tiny-llama")
        direction = Direction.of(torch.randn(32, generator=seeded()), glp.hookpoints[0], "push", "random")
        edit = Edit(direction, torch.tensor([0.5, 1.0]))
        with steering(model, edit, mean_norm=20.0, repair=PriorRepair(glp, RepairConfig(**repair))):
            return generated(model)

    expected = steered(CPU)
    assert torch.equal(steered(GPU), expected)
    assert moves == [CPU, GPU]
    assert not torch.equal(expected, generated(tiny_llm("llama")))


# -- a model over two devices --------------------------------------------------------------------------------------


def spread(model: Any, first: int) -> Any:
    """The model with its blocks from number `first` on, and its head, on the GPU; inputs follow, as with accelerate."""

    def follow(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        def here(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(here, value))
            return value.to(GPU) if isinstance(value, Tensor) else value

        return here(args), {name: here(value) for name, value in kwargs.items()}

    for part in (*model.model.layers[first:], model.model.norm, model.lm_head):
        part.to(GPU).register_forward_pre_hook(follow, with_kwargs=True)
    return model


def test_a_spread_model_is_recorded_and_edited_where_its_layers_are(tiny_glp, tiny_llm, tiny_tokenizer, sentences, gpu):
    whole, parted = tiny_llm("llama"), spread(tiny_llm("llama"), first=2)
    texts = list(sentences)
    recorded = [record_activations(model, tiny_tokenizer, texts, [1, 2]).x for model in (whole, parted)]
    assert torch.allclose(*recorded, atol=1e-5)

    vectors = torch.randn(2, 32, generator=seeded())
    edits = [
        Edit(Direction.of(vector, Hookpoint.of(whole, layer), f"{layer}", "random"), 1.0)
        for vector, layer in zip(vectors, (1, 2), strict=True)
    ]
    prompts = tokenized(tiny_tokenizer, texts[:2])
    found = []
    for model in (whole, parted):
        glp = tiny_glp(32, (1, 2), "tiny-llama")
        repair = PriorRepair(glp, RepairConfig(rate=0.5))
        context = steering(model, edits, mean_norm=5.0, repair=repair)
        ids, _ = generate_continuations(model, prompts, 2, 5, context, share=False)
        with glp.attach(model, edit=lambda x: x + 3 * vectors[0].to(x), generator=0):
            found.append((ids, generated(model)))
        assert glp.device == CPU  # where layer 1 is, the first that it met
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    nll = [conditional_nll(model, prompts.inputs(), found[0][0], copies=2) for model in (whole, parted)]
    assert nll[0] == pytest.approx(nll[1], rel=1e-4)
    nll = [conditional_nll(model, prompts.inputs(), found[0][0][::2]) for model in (whole, parted)]
    assert nll[0] == pytest.approx(nll[1], rel=1e-4)


def test_delta_lm_loss_of_a_spread_model(tiny_glp, tiny_llm, tiny_tokenizer, sentences, gpu):
    from latentprior.config import EvaluateConfig
    from latentprior.evaluation.evaluate import lm_replacements
    from latentprior.stats.gaussian import GaussianPrior

    glp, config = tiny_glp(32, (2,), "tiny-llama"), EvaluateConfig("prior", "heldout", "output", steps=2)
    gaussian = GaussianPrior.fit(torch.randn(100, 32, generator=seeded()))
    documents = (Document(i, text) for i, text in enumerate(sentences))
    batches = list(tokenize(documents, tiny_tokenizer, max_length=16, batch_tokens=64))

    def losses(model: Any) -> dict[str, float]:
        replacements = lm_replacements(glp, gaussian, 0.5, config, None)
        return {name: loss.mean() for name, loss in lm_losses(model, batches, 2, replacements).items()}

    expected = losses(tiny_llm("llama"))
    assert losses(spread(tiny_llm("llama"), first=2)) == pytest.approx(expected, rel=1e-5)
    assert losses(tiny_llm("llama").to("cuda")) == pytest.approx(expected, rel=1e-5)
    assert len(set(expected.values())) == 4


# -- the README, the example, the commands -------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_lines_of_the_readme_run_on_both(
    device, tiny_glp, tiny_llm, tiny_tokenizer, tmp_path, monkeypatch, gpu, capsys
):
    monkeypatch.chdir(tmp_path)

    def load_llm(name: str) -> tuple[Any, Any]:
        return tiny_llm("llama").to(device), tiny_tokenizer

    monkeypatch.setattr(latentprior.lm.loading, "load_llm", load_llm)
    (lines,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    small = f'preset="fast", activations=512, d_model=16, blocks=1, device="{device}"'
    lines = lines.replace('preset="fast"', small).replace("[15]", "[1]").replace("layer=15", "layer=1")
    texts = [f"{word} fox jumps over the lazy dog, {i} times." for i in range(24) for word in ("A quick", "The slow")]
    names = {"texts": texts, "positive": ["A good day.", "Fine words."], "negative": ["A bad day.", "Poor words."]}
    exec(lines, names)
    assert names["ids"].shape[1] > 1
    assert gpu["linear", device] and not gpu["linear", "cpu" if device == "cuda" else "cuda"]


@pytest.fixture
def bench(monkeypatch) -> ModuleType:
    """`bench_commands`, which knows every command's arguments; no peak is measured by large products."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for module in ("training.trainer", "scaling.plan"):
        monkeypatch.setattr(f"latentprior.{module}.matrix_peak", lambda *_: 1e12)
    import bench_commands

    return bench_commands


def run_all(commands: dict[str, list[str]], gpu: Counter[tuple[str, str]]) -> None:
    """Every command ends well, and all of its matrix work is on the GPU."""
    for name, arguments in commands.items():
        gpu.clear()
        assert cli.main([*arguments, "--debug"]) == 0, name
        assert not gpu["linear", "cpu"], name
        assert gpu["linear", "cuda"] or name in ("plan", "convert"), name


@pytest.mark.slow
def test_every_command_on_the_gpu(bench, llm_folder, write_texts, tmp_path, gpu):
    text = write_texts(tmp_path / "texts.jsonl", 120)
    commands = bench.commands(tmp_path, llm_folder, text, layer=1, device="cuda", samples=60)
    assert {arguments[0] for arguments in commands.values()} == cli.COMMANDS.keys()
    run_all({name: arguments for name, arguments in commands.items() if name not in bench.OF_ASSETS}, gpu)

    for name in ("train", "sample"):  # on the CPU the same prior, and the same samples of it
        elsewhere = str(tmp_path / "cpu" / Path(commands[name][-1]).name)
        arguments = [{"cuda": "cpu"}.get(argument, argument) for argument in commands[name][:-1]]
        assert cli.main([*arguments, elsewhere]) == 0
    results = [json.loads((tmp_path / place / "prior" / "train.json").read_text()) for place in (".", "cpu")]
    losses = [result["summary"]["heldout_loss"] for result in results]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    samples = [load_file(tmp_path / place / "samples.safetensors")["activations"] for place in ("out", "cpu")]
    assert torch.allclose(*samples, atol=1e-3)


@pytest.mark.slow
@pytest.mark.assets
def test_the_example_on_the_gpu(bench, tiny_llm, tiny_tokenizer, tmp_path, monkeypatch, gpu):
    monkeypatch.setattr(latentprior.lm.loading, "load_llm", lambda _: (tiny_llm("llama").to("cuda"), tiny_tokenizer))
    example = runpy.run_path(str(ROOT / "examples" / "record_train_repair.py"))
    monkeypatch.setitem(example["main"].__globals__, "LAYER", 1)
    assert "The weather today" in example["main"](["--activations", "4096", "--folder", str(tmp_path)])
    assert gpu["linear", "cuda"] and not gpu["linear", "cpu"]


@pytest.mark.slow
@pytest.mark.assets
def test_steering_and_the_demo_on_the_gpu(bench, llm_folder, write_texts, tiny_glp, tmp_path, monkeypatch, gpu):
    sizes = {
        "rows": 1500,
        "activations": 2048,
        "heldout_rows": 700,
        "samples": 150,
        "lm_documents": 2,
        "prompts": 2,
        "labelled": 120,
    }
    for name, size in sizes.items():
        monkeypatch.setitem(latentprior.demo.TINY, name, size)
    commands = bench.commands(tmp_path, llm_folder, write_texts(tmp_path / "texts.jsonl", 1), layer=1, device="auto")
    tiny_glp(32, (1,), llm_folder).save_pretrained(tmp_path / "prior")
    run_all({name: commands[name] for name in bench.OF_ASSETS}, gpu)
