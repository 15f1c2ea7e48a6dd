"""The concept classifier: what it reads, that it is measured on texts it did not learn from, and how good it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from latentprior.data import corpus
from latentprior.judge import ConcatenatedFeatures, ConceptClassifier, Embedder, LayerMean, features_for
from latentprior.utils.errors import InputError


class Table:
    """Features that are looked up; keeps what it was asked for."""

    name = "a table"

    def __init__(self, row) -> None:
        self.row, self.asked = row, []

    def __call__(self, texts) -> np.ndarray:
        self.asked.append(list(texts))
        return np.array([self.row(text) for text in texts], float)


def one_hot(text: str) -> np.ndarray:
    """Tells every text apart, but for case and white space, and nothing else."""
    return np.eye(40)[int(text.split()[-1])]


def test_copies_of_a_text_are_not_on_both_sides():
    labels = np.random.default_rng(0).integers(0, 2, 40).tolist()
    copies = [f"text {i}" for i in range(40)] + [f" TEXT\n{i} " for i in range(40)] + [f"Text  {i}" for i in range(40)]
    features = Table(one_hot)
    classifier = ConceptClassifier(copies, labels * 3, features)
    assert features.asked == [copies[:40]]
    assert classifier.heldout_accuracy < 0.8  # 1 if it knew copies of what it is measured on
    assert classifier.heldout_texts == 8


def test_texts_sorted_by_label_are_held_out_from_both_classes():
    values = np.random.default_rng(0).normal(size=100) + np.repeat([-1.5, 1.5], 50)
    texts, labels = [f"text {i}" for i in range(100)], [0] * 50 + [1] * 50
    features = Table(lambda text: [values[int(text.split()[1])], 1.0])
    classifier = ConceptClassifier(texts, labels, features)
    assert 0.7 < classifier.heldout_accuracy <= 1.0 and classifier.heldout_texts == 20
    probabilities = classifier(texts)
    order = np.argsort(values)
    assert (np.diff(probabilities[order]) > 0).all() and probabilities[order[0]] < 0.5 < probabilities[order[-1]]
    assert classifier.name == "logistic regression on a table"
    again = ConceptClassifier(texts, labels, features)
    assert np.array_equal(again(texts), probabilities) and again.heldout_accuracy == classifier.heldout_accuracy
    other = ConceptClassifier(texts, labels, features, seed=1)
    assert not np.array_equal(other(texts), probabilities)


@pytest.mark.parametrize("seed", range(4))
def test_the_share_of_a_rare_class_is_the_same_on_both_sides(seed):
    texts, labels = [f"text {i}" for i in range(50)], [1] * 5 + [0] * 45
    classifier = ConceptClassifier(texts, labels, Table(lambda text: [1.0]), seed=seed)
    assert classifier.heldout_accuracy == 0.9  # it can but say 0: one of ten is 1
    assert classifier(["text 0"])[0] == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_layer_means_are_those_of_the_hidden_states(tiny_llm, tiny_tokenizer, sentences, family):
    model = tiny_llm(family)
    texts = [*sentences, "", "She"]
    means = LayerMean(model, tiny_tokenizer, 1, batch_tokens=40)(texts)
    for text, mean in zip(texts, means, strict=True):
        ids = torch.tensor([[0, *tiny_tokenizer(text)["input_ids"]]])
        expected = model(ids, output_hidden_states=True).hidden_states[2][0, 1:].mean(dim=0).numpy()
        assert mean == pytest.approx(expected, abs=1e-4, nan_ok=True)
    assert np.isnan(means[4]).all() and not np.isnan(means[[0, 1, 2, 3, 5]]).any()


def test_a_classifier_on_a_layer(tiny_llm, tiny_tokenizer):
    model = tiny_llm("llama", layers=6)
    features = features_for(model, tiny_tokenizer, "layer")
    assert features.name == "layer 4 of tiny-llama"
    texts = [f"{'good fine' if i % 2 else 'bad poor'} {'abcdefghij'[i // 10]} {i}" for i in range(100)]
    classifier = ConceptClassifier(texts, [i % 2 for i in range(100)], features)
    assert classifier.heldout_accuracy > 0.8
    probabilities = classifier(["", *texts])
    assert 0.3 < probabilities[0] < 0.7  # no token: like the average text
    assert classifier([]).shape == (0,)


def test_joined_features_stand_side_by_side():
    joined = ConcatenatedFeatures(Table(one_hot), Table(lambda text: [7.0]))
    assert joined(["text 3"]).tolist() == [[*one_hot("text 3"), 7.0]]
    assert joined.name == "a table and a table"


def test_messages(tiny_llm, tiny_tokenizer):
    texts = [f"text {i}" for i in range(20)]
    for labels in ([0, 1] * 9, [0, 2] * 10):
        with pytest.raises(InputError, match="a label, 0 or 1, for each of its 20 texts"):
            ConceptClassifier(texts, labels, Table(one_hot))
    with pytest.raises(InputError, match=r"5 distinct texts with and without it, got \[4, 16\]"):
        ConceptClassifier(texts, [1] * 4 + [0] * 16, Table(one_hot))
    with pytest.raises(InputError, match="layer 9"):
        LayerMean(tiny_llm("llama"), tiny_tokenizer, 9)


def test_an_unknown_reading_is_named(tiny_llm, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # as outside of tests: "layers" is no `FeatureKind`
    with pytest.raises(InputError, match="layers"):
        features_for(tiny_llm("llama"), tiny_tokenizer, "layers")  # type: ignore[arg-type]


@pytest.mark.assets
def test_embeddings_do_not_depend_on_the_batch():
    embed = Embedder()
    texts = ["a long and winding sentence about very little", "short", ""]
    whole = embed(texts)
    assert whole.shape == (3, 384) and np.linalg.norm(whole, axis=1) == pytest.approx(1, abs=1e-5)
    assert np.concatenate([embed([text]) for text in texts]) == pytest.approx(whole, abs=1e-5)


@pytest.mark.assets
@pytest.mark.slow
def test_sentiment_is_told_with_an_accuracy_over_four_fifths():
    texts, labels = corpus.labelled("92_glue_sst2")
    classifier = ConceptClassifier(texts[2500:4500], labels[2500:4500])
    assert classifier.name == "logistic regression on all-MiniLM-L6-v2 embeddings"
    assert classifier.heldout_accuracy > 0.8 and classifier.heldout_texts > 300
    good, bad = classifier(["a wonderful , moving film", "the dullest and worst film of the year"])
    assert bad < 0.3 < 0.7 < good
