"""Language models: a name goes in, a model whose hidden states can be read and changed comes out.

- `loading`: from the Hub, a folder, a GGUF file (`dequantise`) or an embedded package (`assets`).
- `hooks`: decoder blocks, hookpoints, and the only hooks that are registered on a model.
- `positions`: what position each column of a forward pass has, and where the prompt ends.
- `edits`: `edit_positions` changes activations at chosen positions, also under ``generate()``.
"""
