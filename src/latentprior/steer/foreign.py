"""Reading directions that other tools wrote: no code in a file is ever run.

Every tool counts layers in its own way. Ours: layer L is the output of block L, ``hidden_states[L + 1]`` of
transformers; the input of block L is the output of block L - 1.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from latentprior.lm.hooks import Hookpoint, check_in_range
from latentprior.steer.direction import Direction
from latentprior.utils.errors import InputError, unknown

ARCHITECTURE = "controlvector"
PREFIX = "direction."
SUFFIXES = (".gguf", ".pt", ".pth", ".bin", ".safetensors")
STEERING_VECTOR = "steering_vectors.steering_vector.SteeringVector"


def read_foreign(
    path: str | Path,
    hookpoint: Hookpoint,
    *,
    blocks: int | None = None,
    name: str | None = None,
    tensor: str | None = None,
) -> Direction:
    """The direction at `hookpoint` in a file of another tool, told by its suffix and what is in it.

    - ``.gguf``: repeng's (and llama.cpp's) control vectors, which number their layers.
    - ``.pt``: steering-vectors' `SteeringVector`, or its dictionary `layer_activations`, by number of the layer; a
      tensor [d], or one with a row for each layer.
    - ``.safetensors``: a tensor [d], or one with a row for each layer.

    Of a tensor with a row for each layer the number of rows says which is which: with as many rows as the model has
    blocks, row L is the output of block L; with one more, as persona_vectors writes it, row i is `hidden_states[i]` of
    transformers, the embeddings first, and the output of block L is row L + 1.

    Args:
        hookpoint: where it belongs, as the files say at most of which family of models they are.
        blocks: how many the model has, ``len(hooks.find_blocks(model))``; needed where a tensor has a row for each.
        tensor: which tensor of a safetensors file that holds several.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise unknown("kind of direction file", path.suffix, SUFFIXES)
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    if path.suffix == ".gguf":
        vector, facts = _from_gguf(path, hookpoint)
    elif path.suffix == ".safetensors":
        vector, facts = _from_safetensors(path, hookpoint, blocks, tensor)
    else:
        vector, facts = _from_pickle(path, hookpoint, blocks)
    if not vector.is_floating_point():
        raise InputError(f"{path} holds {vector.dtype}, not real numbers")
    return Direction.of(vector, hookpoint, name or path.stem, "file", file=path.name, **facts)


def _block(hookpoint: Hookpoint) -> int:
    if hookpoint.side == "output":
        return hookpoint.layer
    if hookpoint.layer == 0:
        raise InputError("the input of the first block is no block's output, and these files know outputs only")
    return hookpoint.layer - 1


# repeng records hidden_states[N + 1] for its layer N and adds `direction.N` to the output of block N, and so does
# llama.cpp: its number is ours.
def _from_gguf(path: Path, hookpoint: Hookpoint) -> tuple[Tensor, dict[str, Any]]:
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    except Exception as error:  # damaged files raise errors of nearly every type
        raise InputError(f"{path} is damaged or no GGUF file: {_line(error)}") from error
    if (architecture := fields.get("general.architecture")) != ARCHITECTURE:
        raise InputError(f"{path} is a GGUF file of {architecture!r}, not a control vector")
    wanted = f"{PREFIX}{_block(hookpoint)}"
    if wanted not in tensors:
        raise unknown("tensor", wanted, tensors)
    found = tensors[wanted]
    try:
        values = gguf.dequantize(found.data, found.tensor_type)
    except Exception as error:
        raise InputError(f"{path} holds {wanted} in a form that cannot be read: {_line(error)}") from error
    hint = str(fields.get(f"{ARCHITECTURE}.model_hint", ""))
    return torch.from_numpy(np.array(values, np.float32)), {"format": "repeng", "model_hint": hint}


def _from_safetensors(
    path: Path, hookpoint: Hookpoint, blocks: int | None, name: str | None
) -> tuple[Tensor, dict[str, Any]]:
    try:
        with safe_open(path, "pt") as file:
            if any(key.startswith("latentprior.") for key in file.metadata() or {}):
                raise InputError(f"{path} is a direction of latentprior: use read_direction, which checks its layer")
            names = list(file.keys())
            if name is None and len(names) != 1:
                raise InputError(f"{path} holds {len(names)} tensors ({', '.join(names[:8])}): say which one is meant")
            name = names[0] if name is None else name
            if name not in names:
                raise unknown("tensor", name, names)
            found = file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is damaged or no safetensors file: {_line(error)}") from error
    vector, facts = _of_layer(found, hookpoint, blocks, path)
    return vector, facts | {"format": "safetensors", "tensor": name}


class _SteeringVector:
    """Stands in for steering-vectors' class: takes what the file says and does nothing with it."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _from_pickle(path: Path, hookpoint: Hookpoint, blocks: int | None) -> tuple[Tensor, dict[str, Any]]:
    try:
        # The restricted unpickler calls nothing that a file names but torch's own functions that build tensors, and
        # the stand-in, which has no code.
        with torch.serialization.safe_globals([(_SteeringVector, STEERING_VECTOR)]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged and hostile pickles raise errors of nearly every type
        instead = "where it is trusted, save `{layer: vector}` with torch.save, or one tensor"
        raise InputError(f"{path} is damaged or holds more than tensors, and is not opened; {instead}") from error
    if isinstance(loaded, _SteeringVector):
        state = loaded.state if isinstance(loaded.state, dict) else {}
        if (kind := state.get("layer_type", "decoder_block")) != "decoder_block":
            raise InputError(f"{path} is a steering vector of {kind!r}, not of the output of a block")
        loaded = state.get("layer_activations")
    # steering-vectors records and adds to the output of the n-th block, counted from 0: its number is ours.
    if isinstance(loaded, dict):
        wanted = _block(hookpoint)
        if not isinstance(loaded.get(wanted), Tensor):
            raise unknown("layer", wanted, loaded)
        return loaded[wanted].detach().flatten(), {"format": "steering-vectors"}
    if not isinstance(loaded, Tensor):
        raise InputError(f"{path} holds {type(loaded).__name__}, neither a tensor nor one for each layer")
    vector, facts = _of_layer(loaded, hookpoint, blocks, path)
    return vector, {"format": "tensor"} | facts


def _of_layer(found: Tensor, hookpoint: Hookpoint, blocks: int | None, path: Path) -> tuple[Tensor, dict[str, Any]]:
    found = found.detach()
    if found.ndim == 1:
        return found, {}
    if found.ndim != 2:
        raise InputError(f"{path} holds a tensor {list(found.shape)}, neither [d] nor [layers, d]")
    rows = len(found)
    if blocks is None:
        which = f"outputs of {rows} blocks or hidden states of {rows - 1}"
        raise InputError(
            f"{path} holds {rows} rows, {which}: say which with blocks=, the number of blocks of the model"
        )
    check_in_range(hookpoint.layer, blocks, f"blocks={blocks}")
    if rows == blocks:
        return found[_block(hookpoint)], {}
    if rows != blocks + 1:
        wanted = f"neither a row for each ({blocks}) nor one for the embeddings, too ({blocks + 1})"
        raise InputError(f"{path} holds {rows} rows, and the model has {blocks} blocks: {wanted}")
    # The last row is not the last block's output: transformers puts the final norm before it.
    row = hookpoint.layer + (hookpoint.side == "output")
    return found[row], {"format": "persona_vectors", "after_final_norm": row == blocks}


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
