"""GGUF files of tiny models, as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import torch
from gguf import GGMLQuantizationType as Kind


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of queries or keys in llama.cpp's order: those that rotate together lie next to one another."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_model(
    path: Path, model, tokenizer=None, kind: Kind = Kind.F32, *, architecture: str = "llama", without: str = "", **facts
) -> str:
    """A tiny Llama model as llama.cpp's converter writes it; `without` is a tensor to leave out."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for name, value in facts.items():
        writer.add_uint16(name.replace("_", "."), value)
    if tokenizer is not None:
        raw = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        writer.add_tokenizer_model("gpt2")
        words = sorted(raw["vocab"], key=raw["vocab"].get)
        writer.add_token_list(words)
        writer.add_token_types([3 if word in ("<bos>", "<eos>", "<pad>") else 1 for word in words])
        writer.add_token_merges([" ".join(pair) for pair in raw["merges"]])
        for add, i in ((writer.add_bos_token_id, 0), (writer.add_eos_token_id, 1), (writer.add_pad_token_id, 2)):
            add(i)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target == without:
            continue
        for part, heads in (("attn_q", config.num_attention_heads), ("attn_k", config.num_key_value_heads)):
            if f"{part}.weight" in target:
                weight = interleaved(weight, heads)
        kind_here = kind if weight.ndim == 2 else Kind.F32
        writer.add_tensor(target, gguf.quants.quantize(weight.numpy(), kind_here), raw_dtype=kind_here)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)
