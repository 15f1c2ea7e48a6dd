"""Last-token activations of labelled texts: recorded once for all hookpoints, kept in stores, found again by text.

Two stores share a folder: ``output`` with the layer's output and ``mlp`` with the hidden units of every MLP before it.
A row's `doc` is a hash of its text, so tasks that share texts share rows, a further task records only what is new, and
an interrupted recording goes on with what is missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from latentprior.data import tokens
from latentprior.data.activations import ActivationBatch, activations
from latentprior.data.store.manifest import MANIFEST
from latentprior.data.store.reader import ActivationStore
from latentprior.data.store.writer import StoreWriter
from latentprior.data.text import Document
from latentprior.data.tokens import TokenBatch
from latentprior.lm import hooks
from latentprior.lm.hooks import Hookpoint
from latentprior.utils.errors import InputError
from latentprior.utils.progress import Report, silent

OUTPUT, MLP = "output", "mlp"
SHARD_TEXTS = 4096  # texts in a shard: what a kill loses at most


def text_key(text: str) -> int:
    """A hash of a text that fits the stores' int64; equal by chance for two of a million texts with odds of 1e-7."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8, person=b"probe").digest()) >> 1


def record_texts(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    hookpoint: Hookpoint,
    folder: str | Path,
    *,
    mlp: bool = True,
    max_length: int = 1024,
    batch_tokens: int = 4096,
    report: Report = silent,
) -> Recording:
    """Record the last token's activations of all `texts` that `folder` does not hold yet.

    Longer texts keep their last tokens, as in SAE-Probes, so that the last token is the text's own. Texts without a
    token after the first position, and activations that are not finite, are left out: `Recording.has` tells.

    Args:
        mlp: also record the hidden units of the MLPs of all blocks up to `hookpoint`.
        max_length: tokens that are kept, the beginning-of-sequence token included.
        batch_tokens: most tokens of one forward pass, padding included.
    """
    folder = Path(folder)
    hookpoint.check(model)
    layers = list(range(hookpoint.layer + (hookpoint.side != "input"))) if mlp else []
    writers = _writers(model, hookpoint, layers, folder, {"texts": "last token", "max_length": max_length})
    known = set.intersection(*(_keys(folder / name) for name in writers))
    missing = [text for text in dict.fromkeys(texts) if text_key(text) not in known]
    documents = (Document(text_key(text), text) for text in missing)
    batches = tokens.tokenize(documents, tokenizer, max_length=max_length, batch_tokens=batch_tokens, keep="last")
    done = 0
    for batch, parts in _recorded(model, batches, hookpoint, layers):
        finite = _finite(list(parts.values()))
        for name, writer in writers.items():
            rows = parts[name]
            kept = finite.repeat(len(rows) // len(finite))
            left_out = {"nonfinite": int((~kept).sum())}
            writer.append(rows.select(kept), next_batch=writer.next_batch + 1, left_out=left_out)
        done += len(batch.doc)
        report(done, len(missing), {})
    for writer in writers.values():
        writer.flush()  # never closed: more tasks may come
    return Recording(folder)


class Recording:
    """What `record_texts` wrote, read by text; `mlp_hookpoints` are empty if MLPs were not recorded."""

    def __init__(self, folder: str | Path) -> None:
        self.folder, self.device = Path(folder), torch.device("cpu")
        self._output = ActivationStore(self.folder / OUTPUT)
        self.hookpoint = self._output.hookpoints[0]
        self._rows = _index(self._output, self.hookpoint.layer)
        self._mlp, self.mlp_hookpoints, self._mlp_rows = None, (), []
        if (self.folder / MLP / MANIFEST).exists():
            self._mlp = ActivationStore(self.folder / MLP)
            self.mlp_hookpoints = self._mlp.hookpoints
            self._mlp_rows = [_index(self._mlp, h.layer) for h in self.mlp_hookpoints]

    def to(self, device: torch.device) -> Recording:
        """This recording, with its rows read onto `device`."""
        self.device = device
        return self

    def has(self, texts: Sequence[str]) -> np.ndarray:
        """[N] bool: which texts have a row in every store."""
        keys = [text_key(text) for text in texts]
        return np.array([all(key in rows for rows in (self._rows, *self._mlp_rows)) for key in keys], dtype=bool)

    def output(self, texts: Sequence[str]) -> Float[Tensor, "n d"]:
        """The layer's output at the last token of each text, as stored; KeyError for a text that is not."""
        return self._output.rows(_find(self._rows, texts)).to(self.device)

    def mlp(self, texts: Sequence[str], block: int) -> Float[Tensor, "n d_mlp"]:
        """The hidden units of one block's MLP, likewise."""
        if self._mlp is None or not 0 <= block < len(self._mlp_rows):
            raise InputError(f"{self.folder} holds no MLP units of block {block}: record them first")
        return self._mlp.rows(_find(self._mlp_rows[block], texts)).to(self.device)


def _writers(
    model: nn.Module, hookpoint: Hookpoint, layers: list[int], folder: Path, source: dict[str, Any]
) -> dict[str, StoreWriter]:
    hookpoints = {OUTPUT: [Hookpoint.of(model, hookpoint.layer, hookpoint.side)]}
    if layers:
        hookpoints[MLP] = [Hookpoint.of(model, layer, "mlp") for layer in layers]
    dtype = "float32" if next(model.parameters()).dtype == torch.float32 else "bfloat16"
    return {
        name: StoreWriter(folder / name, of, dtype=dtype, shard_rows=SHARD_TEXTS * len(of), source=source, resume=True)
        for name, of in hookpoints.items()
    }


def _keys(folder: Path) -> set[int]:
    if not (folder / MANIFEST).exists():
        return set()
    store = ActivationStore(folder)
    return set(store.metadata(torch.arange(len(store)))[1].tolist())


def _index(store: ActivationStore, layer: int) -> dict[int, int]:
    """Row of each text at one layer. A kill between two stores' shards may leave a text twice; either row serves."""
    layers, keys, _, _ = store.metadata(torch.arange(len(store)))
    rows = (layers == layer).nonzero().squeeze(1)
    return dict(zip(keys[rows].tolist(), rows.tolist(), strict=True))


def _find(index: dict[int, int], texts: Sequence[str]) -> Int64[Tensor, " n"]:
    return torch.tensor([index[text_key(text)] for text in texts], dtype=torch.long)


def _recorded(
    model: nn.Module, batches: Iterator[TokenBatch], hookpoint: Hookpoint, mlp_layers: list[int]
) -> Iterator[tuple[TokenBatch, dict[str, ActivationBatch]]]:
    """One pass for each batch: the last token's rows of the layer's output and of the MLPs up to it."""
    with hooks.capture(model, mlp_layers, side="mlp") as units:
        for batch in batches:
            output = next(activations(model, [batch], [hookpoint.layer], side=hookpoint.side, positions="last"))
            parts = {OUTPUT: output}
            if mlp_layers:
                parts[MLP] = _last_units(units, batch, output)
            yield batch, parts


def _last_units(units: dict[int, Tensor], batch: TokenBatch, output: ActivationBatch) -> ActivationBatch:
    last = batch.position.argmax(dim=1)  # every row has one, as documents of one token are left out
    row = torch.arange(len(last))
    x = [state[row.to(state.device), last.to(state.device)].cpu() for state in units.values()]
    repeated = (getattr(output, name).repeat(len(units)) for name in ("doc", "position", "token"))
    return ActivationBatch(torch.cat(x), torch.tensor(list(units)).repeat_interleave(len(row)), *repeated)


def _finite(parts: list[ActivationBatch]) -> Tensor:
    """[N] bool: the texts all of whose rows are finite; `parts` hold one or more rows a text, layer by layer."""
    n = len(parts[0])
    finite = [part.x.isfinite().all(dim=1).cpu().reshape(-1, n).all(dim=0) for part in parts]
    return torch.stack(finite).all(dim=0)
