"""What language models and stores cost, counted from shapes: parameters, FLOPs and bytes."""

from __future__ import annotations

from dataclasses import dataclass

METADATA_BYTES = 2.4  # of a store's row: zstd parquet of document, position, token and layer, as measured on real text


@dataclass(frozen=True)
class LLMShape:
    """What decides the cost of a language model's forward pass."""

    width: int
    """Of the residual stream."""
    parameters: int
    """All of them, embeddings and head included."""
    block_weights: tuple[int, ...]
    """Entries of the matrices that each token is multiplied with, in each block (of a mixture of experts: the active
    ones)."""
    attention: int
    """Heads times width of a head."""
    mlp: int
    """Hidden units of a block's MLP."""

    @property
    def blocks(self) -> int:
        return len(self.block_weights)


def llama_shape(
    *, width: int, blocks: int, heads: int, kv_heads: int, head: int, mlp: int, vocabulary: int, tied: bool
) -> LLMShape:
    """A decoder of Llama's architecture: no biases, gated MLP, grouped-query attention, RMS norms.

    A block's matrices: query and output ``2 w heads head``, key and value ``2 w kv_heads head``, MLP ``3 w mlp``; its
    norms add ``2 w``. Outside the blocks: embedding ``vocabulary w``, a head of that size unless it is tied, a norm.
    """
    matrices = 2 * width * (heads + kv_heads) * head + 3 * width * mlp
    outside = (1 if tied else 2) * vocabulary * width + width
    return LLMShape(width, blocks * (matrices + 2 * width) + outside, (matrices,) * blocks, heads * head, mlp)


LLM_SHAPES: dict[str, LLMShape] = {
    "smollm2-135m": llama_shape(
        width=576, blocks=30, heads=9, kv_heads=3, head=64, mlp=1536, vocabulary=49152, tied=True
    ),
    "1B": llama_shape(width=2048, blocks=16, heads=32, kv_heads=8, head=64, mlp=8192, vocabulary=128256, tied=True),
    "8B": llama_shape(width=4096, blocks=32, heads=32, kv_heads=8, head=128, mlp=14336, vocabulary=128256, tied=False),
    "70B": llama_shape(width=8192, blocks=80, heads=64, kv_heads=8, head=128, mlp=28672, vocabulary=128256, tied=False),
}


def llm_flops_per_token(shape: LLMShape, *, blocks: int, sequence: int) -> float:
    """FLOPs of one token's forward pass through the first `blocks` blocks, in a document of `sequence` tokens.

    ``2 P + 4 blocks sequence attention``: P is the blocks' matrices; queries times keys and weights times values are
    ``2 sequence attention`` each, without a discount for the causal mask. Embeddings are looked up, which is free, and
    neither later blocks nor the head run.
    """
    return 2.0 * sum(shape.block_weights[:blocks]) + 4.0 * blocks * sequence * shape.attention


def llm_forward_bytes(shape: LLMShape, *, tokens: int, layers: int, item: int = 2) -> int:
    """Bytes of a forward pass of `tokens` without gradients, roughly: three hidden vectors of one MLP and four of the
    residual stream for each token, and the recorded states of `layers` layers."""
    return tokens * item * (3 * shape.mlp + (4 + layers) * shape.width)


def store_bytes_per_activation(width: int, *, item: int = 2) -> float:
    """Bytes of a row in an activation store: the activation, and `METADATA_BYTES` that say where it comes from."""
    return width * item + METADATA_BYTES
