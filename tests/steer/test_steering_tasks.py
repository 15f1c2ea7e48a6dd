"""The experiments' directions, prompts and judges, on a tiny model with the embedded texts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from conftest import write_repeng
from latentprior.config import SteerConfig
from latentprior.data.activations import record_activations
from latentprior.data.store.reader import ActivationStore
from latentprior.data.store.writer import StoreWriter
from latentprior.lm.hooks import Hookpoint
from latentprior.sae.sae import SAE
from latentprior.steer import tasks
from latentprior.steer.direction import Direction, write_direction
from latentprior.steer.tasks import steering_tasks
from latentprior.steer.traits import Trait
from latentprior.utils.errors import InputError

pytestmark = pytest.mark.assets
LAYER = 1


@pytest.fixture
def llm(tiny_llm, tiny_tokenizer):
    model = tiny_llm("llama")
    return model, tiny_tokenizer, Hookpoint.of(model, LAYER)


def config(experiment: str = "sentiment", **options) -> SteerConfig:
    small = {"labelled": 120, "prompts": 3, "prompt_tokens": 12, "reading": "embedding"}
    return SteerConfig(**{"priors": ["p"], "output": "o", "experiment": experiment} | small | options)


def test_sentiment(llm):
    kinds = ["difference_of_means", "probe", "pca", "shuffled"]
    found = steering_tasks(config(directions=kinds), *llm)
    assert [task.direction.kind for task in found] == kinds
    assert all(task.direction.hookpoint == llm[2] for task in found)
    prompts = found[0].prompts
    assert prompts.ids.shape == (3, 13) and prompts.mask.all()  # BOS and 12 tokens
    assert len(set(prompts.texts)) == 3 and all(task.prompts is prompts for task in found)
    assert 0.4 < found[0].judged_by["heldout_accuracy"] <= 1
    assert abs(float(found[0].direction.vector @ found[3].direction.vector)) < 0.9  # the control is another direction


def test_prompts_are_the_most_neutral_of_the_candidates(llm):
    _, tokenizer, _ = llm
    wanted = config()
    candidates = tasks.beginnings(wanted, tokenizer, tasks.CANDIDATES)
    scores = {text: i / (len(candidates) - 1) for i, text in enumerate(candidates)}  # the middle ones are neutral
    chosen = tasks.neutral_beginnings(wanted, tokenizer, lambda texts: np.array([scores[text] for text in texts]))
    middle = (len(candidates) - 1) / 2
    assert sorted(abs(candidates.index(text) - middle) for text in chosen)[-1] <= 1.5
    assert chosen == sorted(chosen, key=candidates.index)


def test_more_prompts_than_texts(llm):
    with pytest.raises(InputError, match="only 0 .* 1000000 tokens"):
        tasks.beginnings(SteerConfig(["p"], "o", prompts=2, prompt_tokens=1_000_000), llm[1])


def test_personas(llm, monkeypatch):
    """With a trait of our own: a random model says nothing of a kind, but it answers every prompt differently."""
    questions = [f"What about {thing}?" for thing in ("cats", "rain", "tea", "maps", "iron", "songs", "rules", "ships")]
    trait = Trait(
        "loud", "It shouts.", ["SHOUT!", "Be LOUD, very."], ["whisper", "be quiet now"], questions, ["Why?", "Who?"]
    )
    monkeypatch.setattr(tasks, "TRAITS", {"loud": trait})
    monkeypatch.setattr(tasks, "ANSWER_TOKENS", 12)
    (task,) = steering_tasks(config("persona"), *llm)
    assert task.direction.kind == "persona" and task.concept == "It shouts."
    assert task.prompts.texts == ["Why?", "Who?"]
    with pytest.raises(InputError, match="'quiet'.*loud"):
        steering_tasks(config("persona", directions=["quiet"]), *llm)


@pytest.fixture
def sae_and_store(llm, tmp_path, sentences) -> tuple[str, str]:
    model, tokenizer, hookpoint = llm
    texts = [f"{sentence} {i}" for i in range(12) for sentence in sentences]
    batch = record_activations(model, tokenizer, texts, [LAYER])
    with StoreWriter(tmp_path / "store", [hookpoint], source={}) as writer:
        writer.append(batch, next_batch=1, left_out={})
    d = hookpoint.width
    basis = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(0))).Q
    SAE.of(basis, torch.zeros(d), basis.clone(), torch.zeros(d), hookpoint, k=4).save(tmp_path / "sae")
    return str(tmp_path / "sae"), str(tmp_path / "store")


def test_features(llm, sae_and_store):
    sae, store = sae_and_store
    assert len(ActivationStore(store)) > 500
    found = steering_tasks(config("sae", sae=sae, store=store, features=3), *llm)
    assert [task.direction.kind for task in found] == ["sae"] * 3
    assert len({task.direction.name for task in found}) == 3
    named = steering_tasks(config("sae", sae=sae, store=store, directions=["2", "5"]), *llm)
    assert [task.direction.provenance["latent"] for task in named] == [2, 5]
    with pytest.raises(InputError, match="'film'"):
        steering_tasks(config("sae", sae=sae, store=store, directions=["film"]), *llm)


def test_files_of_any_kind(llm, tmp_path):
    _, _, hookpoint = llm
    direction = Direction.of(torch.arange(1.0, 1 + hookpoint.width), hookpoint, "ramp", "random")
    ours = write_direction(direction, tmp_path / "a.safetensors")
    theirs = write_repeng(tmp_path / "b.gguf", {LAYER: direction.vector.numpy()})
    found = steering_tasks(config("files", directions=[str(ours), str(theirs)]), *llm)
    for task in found:
        torch.testing.assert_close(task.direction.vector, direction.vector)
    torch.save(torch.stack([direction.vector * (i - LAYER or 0.5) for i in range(4)]), tmp_path / "of_blocks.pt")
    (task,) = steering_tasks(config("files", directions=[str(tmp_path / "of_blocks.pt")]), *llm)
    torch.testing.assert_close(task.direction.vector, direction.vector)  # row 1; row 2 points there, too, and is longer
    assert task.direction.norm == pytest.approx(0.5)
    elsewhere = Direction.of(direction.vector, Hookpoint.of(llm[0], 0), "ramp", "random")
    path = str(write_direction(elsewhere, tmp_path / "c.safetensors"))
    with pytest.raises(InputError, match="layer 0 .* layer 1"):
        steering_tasks(config("files", directions=[path]), *llm)
