"""Judging steered text without any service: a concept classifier on sentence embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from transformers import AutoModel, AutoTokenizer

from latentprior.assets import minilm_folder
from latentprior.llm import without_bars

NAME = "logistic regression on all-MiniLM-L6-v2 embeddings"


class Embedder:
    """Sentence embeddings of the embedded MiniLM: mean over tokens, unit norm."""

    def __init__(self) -> None:
        folder = minilm_folder()
        with without_bars():
            self._tokenizer = AutoTokenizer.from_pretrained(folder)
            self._model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], *, batch: int = 64, max_length: int = 128) -> np.ndarray:
        """Embeddings [N, 384] of `texts`, computed in order of length to save padding."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        out = np.empty((len(texts), self._model.config.hidden_size), np.float32)
        for begin in range(0, len(order), batch):
            chosen = order[begin : begin + batch]
            inputs = self._tokenizer(
                [texts[i] for i in chosen], padding=True, truncation=True, max_length=max_length, return_tensors="pt"
            )
            hidden = self._model(**inputs).last_hidden_state
            mask = inputs["attention_mask"][:, :, None]
            mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
            out[chosen] = torch.nn.functional.normalize(mean, dim=1).numpy()
        return out


class ConceptClassifier:
    """Probability that a text shows a concept, learned from labelled texts.

    Attributes:
        heldout_accuracy: accuracy on the last fifth of the labelled texts, which it did not learn from.
    """

    def __init__(self, texts: Sequence[str], labels: Sequence[int]) -> None:
        self._embed = Embedder()
        x, y = self._embed(texts), np.asarray(labels)
        cut = len(y) * 4 // 5
        self._classifier = LogisticRegression(C=10.0, max_iter=1000).fit(x[:cut], y[:cut])
        self.heldout_accuracy = float(accuracy_score(y[cut:], self._classifier.predict(x[cut:])))

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Probability [N] of the concept."""
        return self._classifier.predict_proba(self._embed(texts))[:, 1]
