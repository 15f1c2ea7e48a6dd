"""What language models and stores cost, counted from shapes: parameters, FLOPs and bytes."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import torch

from latentprior.config import GEMMA3, SMOLLM2, LLMConfig
from latentprior.utils.errors import InputError, unknown
from latentprior.utils.hub import cache_only

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METADATA_BYTES = 2.4  # of a store's row: zstd parquet of document, position, token and layer, as measured on real text


@dataclass(frozen=True)
class LLMShape:
    """What decides the cost of a language model's forward pass."""

    width: int
    parameters: int
    """All of them, embeddings and head included."""
    block_weights: tuple[int, ...]
    """Of each block: entries of the matrices that each token is multiplied with (active experts only)."""
    attention: int
    """Heads times width of a head."""
    mlp: int
    """Hidden units of a block's MLP."""

    @property
    def blocks(self) -> int:
        return len(self.block_weights)


def llama_shape(
    *,
    width: int,
    blocks: int,
    heads: int,
    kv_heads: int,
    head: int,
    mlp: int,
    vocabulary: int,
    tied: bool,
    norms: int | None = None,
) -> LLMShape:
    """A decoder of Llama's architecture: no biases, gated MLP, grouped-query attention, RMS norms.

    A block's matrices: query and output ``2 w heads head``, key and value ``2 w kv_heads head``, MLP ``3 w mlp``; its
    norms add `norms`, by default ``2 w``. Outside the blocks: embedding ``vocabulary w``, a head of that size unless it
    is tied, a norm.
    """
    matrices = 2 * width * (heads + kv_heads) * head + 3 * width * mlp
    outside = (1 if tied else 2) * vocabulary * width + width
    parameters = blocks * (matrices + (2 * width if norms is None else norms)) + outside
    return LLMShape(width, parameters, (matrices,) * blocks, heads * head, mlp)


LLM_SHAPES: dict[str, LLMShape] = {
    SMOLLM2: llama_shape(width=576, blocks=30, heads=9, kv_heads=3, head=64, mlp=1536, vocabulary=49152, tied=True),
    GEMMA3: llama_shape(
        width=640,
        blocks=18,
        heads=4,
        kv_heads=1,
        head=256,
        mlp=2048,
        vocabulary=262144,
        tied=True,
        norms=4 * 640 + 2 * 256,  # also after attention and MLP, and of queries and keys
    ),
    "1B": llama_shape(width=2048, blocks=16, heads=32, kv_heads=8, head=64, mlp=8192, vocabulary=128256, tied=True),
    "8B": llama_shape(width=4096, blocks=32, heads=32, kv_heads=8, head=128, mlp=14336, vocabulary=128256, tied=False),
    "70B": llama_shape(width=8192, blocks=80, heads=64, kv_heads=8, head=128, mlp=28672, vocabulary=128256, tied=False),
}


def llm_shape(config: LLMConfig) -> LLMShape:
    """The shape of a known model, or of one whose config transformers reads from the Hub or a folder."""
    if (known := named(config.model, LLM_SHAPES)) is not None:
        return LLM_SHAPES[known]
    if config.gguf is None and _mistyped(config.model):
        raise unknown("model", config.model, LLM_SHAPES)
    from transformers import AutoConfig, AutoModelForCausalLM  # slow to import, and known shapes do without

    from latentprior.lm.dequantise import config_of

    try:
        trust = {"trust_remote_code": config.trust_remote_code}
        if config.gguf is not None:
            loaded = config_of(config.gguf)
        else:
            cached = not Path(config.model).is_dir() and cache_only(config.model, config.revision)
            source = {"revision": config.revision or "main", "local_files_only": cached}
            loaded = AutoConfig.from_pretrained(config.model, **source, **trust)
        with torch.device("meta"):  # shapes only
            model = AutoModelForCausalLM.from_config(loaded, **trust)
    except InputError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"cannot read the config of {config.model!r}: {shorten(str(error), 300)}") from error
    return shape_of(model)


def _mistyped(model: str) -> bool:
    """Whether `model` is a size or nearly the name of a known shape: the Hub need not be asked."""
    if "/" in model or Path(model).exists():
        return False
    near = difflib.get_close_matches(model.lower(), LLM_SHAPES, n=1, cutoff=0.75)
    return bool(near) or re.fullmatch(r"[\d.]+[bm]", model.lower()) is not None


def shape_of(model: PreTrainedModel) -> LLMShape:
    """The shape of any decoder-only model, by its parameters; it may lie on the meta device."""
    from latentprior.lm.hooks import find_blocks

    blocks = find_blocks(model)
    config: Any = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    return LLMShape(
        width=config.hidden_size,
        parameters=sum(p.numel() for p in model.parameters()),
        block_weights=tuple(sum(_used(p, config) for p in block.parameters()) for block in blocks),
        attention=heads * (getattr(config, "head_dim", None) or config.hidden_size // heads),
        mlp=max(max(p.shape) for p in blocks.parameters() if p.ndim == 2),
    )


def _used(parameter: torch.Tensor, config: Any) -> int:
    """Entries of a parameter that one token is multiplied with: all of a matrix, the chosen ones of stacked experts."""
    chosen = getattr(config, "num_experts_per_tok", None)
    if parameter.ndim == 3 and chosen:
        return parameter.numel() * chosen // parameter.shape[0]
    return parameter.numel() if parameter.ndim > 1 else 0


def named(name: str, table: Mapping[str, Any]) -> str | None:
    """The key of `table` that `name` spells, in any case."""
    return {key.lower(): key for key in table}.get(name.lower())


def llm_flops_per_token(shape: LLMShape, *, blocks: int, sequence: int) -> float:
    """FLOPs of one token's forward pass through the first `blocks` blocks, in a document of `sequence` tokens.

    ``2 P + 4 blocks sequence attention``: P is the blocks' matrices; queries times keys and weights times values are
    ``2 sequence attention`` each, without a discount for the causal mask.
    """
    return 2.0 * sum(shape.block_weights[:blocks]) + 4.0 * blocks * sequence * shape.attention


def llm_forward_bytes(shape: LLMShape, *, tokens: int, layers: int, item: int = 2) -> int:
    """Bytes of a forward pass, roughly: of each token three vectors of an MLP, four states, and the recorded states."""
    return tokens * item * (3 * shape.mlp + (4 + layers) * shape.width)


def store_bytes_per_activation(width: int) -> float:
    """Bytes of a row in an activation store."""
    return width * 2 + METADATA_BYTES
