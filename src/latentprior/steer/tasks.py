"""What the paper's experiments steer: directions, the prompts that they are tried on, and a judge for their concept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import numpy as np

from latentprior.config import SteerConfig, TextConfig
from latentprior.data import corpus, text
from latentprior.data.prompts import Prompts, tokenized
from latentprior.data.store.reader import ActivationStore
from latentprior.data.tokens import encode
from latentprior.judge.concept import ConceptClassifier, Features, features_for
from latentprior.lm.hooks import Hookpoint, find_blocks
from latentprior.lm.loading import count_blocks
from latentprior.sae.saelens import sae_at
from latentprior.steer.collect import (
    LabelledKind,
    labelled_direction,
    paired_direction,
    persona_answers,
    persona_direction,
)
from latentprior.steer.direction import Direction, is_direction, read_direction
from latentprior.steer.features import describe_latents, sae_direction
from latentprior.steer.foreign import read_foreign
from latentprior.steer.traits import TRAITS, Trait
from latentprior.utils.errors import InputError, unknown

Judge = Callable[[Sequence[str]], np.ndarray]  # texts -> probability of the concept [N]

MAX_LENGTH = 128
CANDIDATES = 10  # news beginnings looked at for each neutral one that is taken
ANSWER_TOKENS = 48
LATENT_EXAMPLES = 60  # texts that a latent is most active on, for its judge


@dataclass(frozen=True, eq=False)
class Case:
    """A direction with what it is tried on."""

    direction: Direction
    prompts: Prompts
    judge: Judge
    judged_by: dict[str, Any]
    """The judge's name and held-out accuracy."""
    concept: str
    """What the direction is to bring about, in words."""


def cases_of(config: SteerConfig, model: Any, tokenizer: Any, hookpoint: Hookpoint) -> list[Case]:
    """The cases of an experiment (paper, on-manifold steering: sentiment, SAE features, personas).

    Raises:
        InputError: a direction that does not exist or is of another layer, width or model; missing asset packages.
    """
    return {"sentiment": _sentiment, "sae": _features, "persona": _personas, "files": _files}[config.experiment](
        config, model, tokenizer, hookpoint
    )


def check_named(config: SteerConfig, hookpoint: Hookpoint) -> list[Direction]:
    """Find what is wrong with what `config` names (files, traits, task, latents, store) before a model is loaded.

    Returns:
        the directions, if they are from files.

    Raises:
        InputError: as `cases_of`.
    """
    if config.experiment in ("sentiment", "files"):
        binary_task(config.task)
    if config.experiment == "persona":
        _traits(config)
    if config.experiment == "sae":
        sae_at(str(config.sae), hookpoint, model=config.llm.model)
        ActivationStore(str(config.store))
        for name in config.directions:
            _number(name)
    return directions_in_files(config, hookpoint, count_blocks(config.llm)) if config.experiment == "files" else []


# -- sentiment -----------------------------------------------------------------------------------------------------

DIRECTIONS = ("difference_of_means", "probe", "pca")
SENTIMENT = Trait(
    name="positive",
    description="The text is full of praise, delight and approval.",
    positive=[
        "You are enthusiastic about everything. Praise what you are asked about and say how wonderful it is.",
        "Answer with joy and warm approval, whatever the subject.",
        "You see the best in all things and write glowing, happy answers.",
    ],
    negative=[
        "You are disappointed by everything. Complain about what you are asked about and say how bad it is.",
        "Answer with disgust and cold disapproval, whatever the subject.",
        "You see the worst in all things and write bitter, unhappy answers.",
    ],
    questions=[
        "What did you think of the film?",
        "How was the restaurant last night?",
        "Tell me about the hotel.",
        "What is the new phone like?",
        "How was the concert?",
        "Describe the book that you have just read.",
        "What do you think of the new park?",
        "How is the food at the airport?",
        "What was the play like?",
        "How did the match go?",
        "What is your opinion of this song?",
        "How was the train journey?",
    ],
    held_out_questions=[],
)
FRAMES = ("{} I loved every minute of it. It was wonderful.", "{} I hated every minute of it. It was terrible.")


def _sentiment(config: SteerConfig, model: Any, tokenizer: Any, hookpoint: Hookpoint) -> list[Case]:
    texts, labels, judge, prompts = _labelled(config, model, tokenizer)
    half = len(texts) // 2

    def direction(kind: str) -> Direction:
        name = f"sentiment, {kind.replace('_', ' ')}"
        if kind == "pca":
            pairs = [[frame.format(text) for text in texts[: half // 2]] for frame in FRAMES]
            return paired_direction(model, tokenizer, pairs[0], pairs[1], hookpoint, name=name, max_length=MAX_LENGTH)
        if kind == "persona":
            return persona_direction(
                model, tokenizer, SENTIMENT, hookpoint, name=name, max_new_tokens=ANSWER_TOKENS, seed=config.seed
            )
        return labelled_direction(
            model,
            tokenizer,
            texts[:half],
            labels[:half],
            hookpoint,
            kind=cast(LabelledKind, kind),
            name=name,
            seed=config.seed,
        )

    concept = f"the concept of task {config.task}"
    return [
        Case(direction(kind), prompts, judge, _described(judge), concept) for kind in config.directions or DIRECTIONS
    ]


def _labelled(
    config: SteerConfig, model: Any, tokenizer: Any
) -> tuple[list[str], list[int], ConceptClassifier, Prompts]:
    """The texts and labels of the task, the judge that learned from them, and prompts that it finds neutral."""
    texts, labels = binary_task(config.task)
    texts, labels = texts[: config.labelled], labels[: config.labelled]
    judge = ConceptClassifier(texts, labels, features_for(model, tokenizer, config.reading))
    return texts, labels, judge, tokenized(tokenizer, neutral_beginnings(config, tokenizer, judge))


def binary_task(name: str) -> tuple[list[str], list[int]]:
    """Texts and labels of an embedded task; one that is not there or not binary is an `InputError`."""
    texts, labels = corpus.labelled(name)
    if set(labels) != {0, 1}:
        raise InputError(f"the task {name!r} is not binary: it has {len(set(labels))} classes")
    return texts, labels


def neutral_beginnings(config: SteerConfig, tokenizer: Any, judge: Judge) -> list[str]:
    """The beginnings of held-out news that the judge finds most neutral, each of `prompt_tokens` tokens."""
    found = beginnings(config, tokenizer, CANDIDATES)
    neutrality = np.abs(np.asarray(judge(found)) - 0.5)
    return [found[i] for i in sorted(np.argsort(neutrality, kind="stable")[: config.prompts])]


def beginnings(config: SteerConfig, tokenizer: Any, times: int = 1) -> list[str]:
    """`times` as many beginnings of held-out news as there are prompts to be, each of `prompt_tokens` tokens.

    Raises:
        InputError: there are fewer than prompts.
    """
    news = (d.text for d in text.documents(TextConfig(part="heldout")) if "news" in d.source)
    found = list(dict.fromkeys(islice(_cut(news, tokenizer, config.prompt_tokens), times * config.prompts)))
    if len(found) < config.prompts:
        raise InputError(f"there are only {len(found)} news texts of {config.prompt_tokens} tokens for prompts")
    return found


def _cut(texts: Any, tokenizer: Any, length: int) -> Any:
    """Beginnings that are `length` tokens long, also when they are tokenised again."""
    special = 0 if tokenizer.bos_token_id is None else 1
    for whole in texts:
        ids = encode([whole], tokenizer)[0][special : special + length]
        beginning = tokenizer.decode(ids)
        if len(ids) == length and encode([beginning], tokenizer)[0][special:] == ids:
            yield beginning


def _described(judge: Any) -> dict[str, Any]:
    return {"name": judge.name, "heldout_accuracy": judge.heldout_accuracy}


# -- directions from files -----------------------------------------------------------------------------------------


def _files(config: SteerConfig, model: Any, tokenizer: Any, hookpoint: Hookpoint) -> list[Case]:
    directions = directions_in_files(config, hookpoint, len(find_blocks(model)))
    _, _, judge, prompts = _labelled(config, model, tokenizer)
    return [Case(d, prompts, judge, _described(judge), f"the concept of task {config.task}") for d in directions]


def directions_in_files(config: SteerConfig, hookpoint: Hookpoint, blocks: int) -> list[Direction]:
    """The directions of the experiment "files".

    Args:
        blocks: how many the model has.

    Raises:
        InputError: no such file, no direction of this place in it, or two of one name.
    """
    directions = [at(read_any(path, hookpoint, blocks), hookpoint, path) for path in config.directions]
    names = [direction.name for direction in directions]
    if len(set(names)) < len(names):
        raise InputError(f"two directions have the same name: {', '.join(names)}")
    return directions


def read_any(path: str, hookpoint: Hookpoint, blocks: int) -> Direction:
    """A direction from a file of this project or of another (repeng, persona_vectors, steering-vectors).

    Args:
        blocks: how many the model has.

    Raises:
        InputError: no such file, or no direction of this width in it.
    """
    return read_direction(path) if is_direction(path) else read_foreign(path, hookpoint, blocks=blocks)


def at(direction: Direction, hookpoint: Hookpoint, path: str) -> Direction:
    """`direction`, if it belongs to the priors' layer.

    Raises:
        InputError: another layer, side or width.
    """
    if not direction.hookpoint.same_place(hookpoint, check_model=False):  # `Edit` checks the model
        raise InputError(f"the direction in {path} belongs to {direction.hookpoint}, the prior to {hookpoint}")
    return direction


# -- personas ------------------------------------------------------------------------------------------------------


def _personas(config: SteerConfig, model: Any, tokenizer: Any, hookpoint: Hookpoint) -> list[Case]:
    traits = _traits(config)
    features = features_for(model, tokenizer, config.reading)
    return [_persona(config, model, tokenizer, hookpoint, trait, features) for trait in traits]


def _traits(config: SteerConfig) -> list[Trait]:
    for name in config.directions:
        if name not in TRAITS:
            raise unknown("trait", name, TRAITS)
    return [TRAITS[name] for name in config.directions or TRAITS]


def _persona(
    config: SteerConfig, model: Any, tokenizer: Any, hookpoint: Hookpoint, trait: Trait, features: Features
) -> Case:
    options: dict[str, Any] = {"max_new_tokens": ANSWER_TOKENS, "seed": config.seed}
    positive, negative = answers = persona_answers(model, tokenizer, trait, **options)
    direction = persona_direction(model, tokenizer, trait, hookpoint, answers=answers, **options)
    texts = [conversation[-1]["content"] for conversation in (*negative, *positive)]
    judge = ConceptClassifier(texts, [0] * len(negative) + [1] * len(positive), features)
    questions = trait.held_out_questions[: config.prompts]
    return Case(direction, tokenized(tokenizer, questions, chat=True), judge, _described(judge), trait.description)


# -- features of a sparse autoencoder ------------------------------------------------------------------------------


def _features(config: SteerConfig, model: Any, tokenizer: Any, hookpoint: Hookpoint) -> list[Case]:
    """Latents are judged by whether a text is like those that they are most active on, rather than other latents'."""
    sae = sae_at(str(config.sae), hookpoint, model=config.llm.model)
    latents: list[int] | int = [_number(name) for name in config.directions] or config.features
    described = describe_latents(
        sae, ActivationStore(str(config.store)), tokenizer, latents=latents, examples=LATENT_EXAMPLES, seed=config.seed
    )
    if len(described) < 2:
        raise InputError("a latent is judged against others: name at least two, or raise `features`")
    prompts = tokenized(tokenizer, beginnings(config, tokenizer))
    features = features_for(model, tokenizer, config.reading)
    texts = {d.latent: [f"{e.before}{e.token}{e.after}" for e in d.examples] for d in described}
    cases = []
    for description in described:
        mine = texts[description.latent]
        others = [text for latent, found in texts.items() if latent != description.latent for text in found]
        judge = ConceptClassifier([*mine, *others], [1] * len(mine) + [0] * len(others), features)
        concept = f"What these texts share: {'; '.join(mine[:3])}"
        direction = sae_direction(sae, description.latent, description=description)
        cases.append(Case(direction, prompts, judge, _described(judge), concept))
    return cases


def _number(name: str) -> int:
    if not name.isdigit():
        raise InputError(f"latents are named by their number, got {name!r}")
    return int(name)
