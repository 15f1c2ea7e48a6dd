"""What is printed of objects that hold tensors: one line that says what they are, never their numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from conftest import build_glp, build_llm, build_tokenizer
from latentprior import ActivationStore, record_activations
from latentprior.data.prompts import tokenized
from latentprior.data.store.writer import StoreWriter
from latentprior.data.text import Document
from latentprior.data.tokens import tokenize
from latentprior.lm.hooks import Hookpoint
from latentprior.neurons.top_logits import TopLogits
from latentprior.probe.tasks import Task
from latentprior.sae.sae import SAE
from latentprior.steer import Direction, Edit

D = 32


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    model, tokenizer = build_llm(), build_tokenizer()
    point = Hookpoint.of(model, 1)
    texts = [f"text number {i} of many" for i in range(30)]
    batch = record_activations(model, tokenizer, texts, [1])
    folder = tmp_path_factory.mktemp("stores") / "store"
    with StoreWriter(folder, [point], source={}) as writer:
        writer.append(batch, next_batch=1, left_out={})
    eye, zeros = torch.eye(D), torch.zeros(D)
    direction = Direction.of(torch.ones(D), point, "up", "pca", texts=list(range(100)))
    rows = np.arange(200)
    ids = torch.zeros(3, 5, dtype=torch.long)
    return {
        "Direction": direction,
        "Edit": Edit(direction, torch.linspace(0, 1, 100)),
        "ActivationBatch": batch,
        "ActivationStore": ActivationStore(folder),
        "TokenBatch": next(tokenize([Document(i, t) for i, t in enumerate(texts)], tokenizer)),
        "Prompts": tokenized(tokenizer, texts),
        "SAE": SAE.of(eye, zeros, eye, zeros, point, k=4),
        "GLP": build_glp(D, (0, 2), "tiny-llama"),
        "Task": Task("mine", "own", texts, rows, rows, rows),
        "TopLogits": TopLogits(ids, ids.float(), ids, ids.float()),
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Direction", "Direction('up', pca, tiny-llama layer 1 output (width 32), norm 5.657)"),
        ("Edit", "strength=float32 [100], kind='add'"),
        ("ActivationBatch", "x=float32 ["),
        ("ActivationStore", "tiny-llama layers [1], bfloat16 ["),
        ("TokenBatch", "mask=bool ["),
        ("Prompts", "texts=<list of 30>"),
        ("SAE", "encoder=float32 [32, 32]"),
        ("GLP", "GLP(tiny-llama layers [0, 2], width 32: 2 blocks, d_model 64, 0.1 M parameters)"),
        ("Task", "train=int64 [200]"),
        ("TopLogits", "promoted=int64 [3, 5]"),
    ],
)
def test_one_line_without_numbers(objects, name, expected):
    shown = repr(objects[name])
    assert shown.startswith(f"{name}(") and expected in shown
    assert "\n" not in shown and "tensor(" not in shown and "array(" not in shown
    assert len(shown) < 400
