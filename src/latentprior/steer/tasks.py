"""What the paper's experiments steer: directions, the prompts that they are tried on, and a judge for their concept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from latentprior.config import SteerConfig, TextConfig
from latentprior.data import corpus, text
from latentprior.data.prompts import Prompts, tokenized
from latentprior.data.store.reader import ActivationStore
from latentprior.data.tokens import encode
from latentprior.judge.concept import ConceptClassifier, features_for
from latentprior.lm.hooks import Hookpoint, find_blocks
from latentprior.lm.loading import count_blocks
from latentprior.sae.saelens import sae_at
from latentprior.steer.direction import Direction, is_direction, read_direction
from latentprior.steer.features import describe_latents, sae_direction
from latentprior.steer.foreign import read_foreign
from latentprior.steer.from_texts import labelled_direction, paired_direction, persona_answers, persona_direction
from latentprior.steer.traits import SENTIMENT, TRAITS, Trait
from latentprior.utils.errors import InputError, unknown

Judge = Callable[[Sequence[str]], np.ndarray]  # texts -> probability of the concept [N]

CANDIDATES = 10  # news beginnings looked at for each neutral one that is taken
ANSWER_TOKENS = 48
LATENT_EXAMPLES = 60  # texts that a latent is most active on, for its judge


@dataclass(frozen=True, eq=False)
class SteeringTask:
    """A direction with what it is tried on."""

    direction: Direction
    prompts: Prompts
    judge: Judge
    judged_by: dict[str, Any]  # the judge's name and held-out accuracy
    concept: str  # what the direction is to bring about, in words


def steering_tasks(config: SteerConfig, model: Any, tokenizer: Any, hookpoint: Hookpoint) -> list[SteeringTask]:
    """The tasks of an experiment (paper, on-manifold steering: sentiment, SAE features, personas)."""
    make = {"sentiment": _labelled, "files": _labelled, "sae": _features, "persona": _personas}[config.experiment]
    return make(config, model, tokenizer, hookpoint)


def check_named(config: SteerConfig, hookpoint: Hookpoint) -> list[Direction]:
    """Check what `config` names before a model is loaded; returns the directions that are from files."""
    if config.experiment in ("sentiment", "files"):
        binary_task(config.task)
    if config.experiment == "persona":
        _traits(config)
    if config.experiment == "sae":
        sae_at(str(config.sae), hookpoint, model=config.llm.model)
        ActivationStore(str(config.store))
        _latents(config)
    return directions_in_files(config, hookpoint, count_blocks(config.llm)) if config.experiment == "files" else []


def _task(direction: Direction, prompts: Prompts, judge: ConceptClassifier, concept: str) -> SteeringTask:
    judged_by = {"name": judge.name, "heldout_accuracy": judge.heldout_accuracy}
    return SteeringTask(direction, prompts, judge, judged_by, concept)


DIRECTIONS = ("difference_of_means", "probe", "pca")
FRAMES = ("{} I loved every minute of it. It was wonderful.", "{} I hated every minute of it. It was terrible.")


def _labelled(config: SteerConfig, model: Any, tokenizer: Any, hookpoint: Hookpoint) -> list[SteeringTask]:
    """Directions of sentiment, or from files, judged by a labelled task."""
    texts, labels = binary_task(config.task)
    texts, labels = texts[: config.labelled], labels[: config.labelled]
    half, common = len(texts) // 2, (model, tokenizer)

    def sentiment(kind: str) -> Direction:
        named: dict[str, Any] = {"name": f"sentiment, {kind.replace('_', ' ')}"}
        if kind == "pca":
            pairs = [[frame.format(text) for text in texts[: half // 2]] for frame in FRAMES]
            return paired_direction(*common, pairs[0], pairs[1], hookpoint, **named)
        named["seed"] = config.seed
        if kind == "persona":
            return persona_direction(*common, SENTIMENT, hookpoint, max_new_tokens=ANSWER_TOKENS, **named)
        named["kind"] = kind
        return labelled_direction(*common, texts[:half], labels[:half], hookpoint, **named)

    if config.experiment == "files":
        directions = directions_in_files(config, hookpoint, len(find_blocks(model)))
    else:
        directions = [sentiment(kind) for kind in config.directions or DIRECTIONS]
    judge = ConceptClassifier(texts, labels, features_for(*common, config.reading))
    prompts = tokenized(tokenizer, neutral_beginnings(config, tokenizer, judge))
    return [_task(direction, prompts, judge, f"the concept of task {config.task}") for direction in directions]


def directions_in_files(config: SteerConfig, hookpoint: Hookpoint, blocks: int) -> list[Direction]:
    """The directions of the experiment "files", which must belong to the priors' `hookpoint`."""
    directions = []
    for path in config.directions:
        found = read_direction(path) if is_direction(path) else read_foreign(path, hookpoint, blocks=blocks)
        if not found.hookpoint.same_place(hookpoint, check_model=False):  # `Edit` checks the model
            raise InputError(f"the direction in {path} belongs to {found.hookpoint}, the prior to {hookpoint}")
        directions.append(found)
    names = [direction.name for direction in directions]
    if len(set(names)) < len(names):
        raise InputError(f"two directions have the same name: {', '.join(names)}")
    return directions


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
    news = (d.text for d in text.documents(TextConfig(part="heldout")) if "news" in d.source)
    found = list(dict.fromkeys(islice(_cut(news, tokenizer, config.prompt_tokens), times * config.prompts)))
    if len(found) < config.prompts:
        raise InputError(f"there are only {len(found)} news texts of {config.prompt_tokens} tokens for prompts")
    return found


def _cut(texts: Iterable[str], tokenizer: Any, length: int) -> Iterator[str]:
    """Beginnings that are `length` tokens long, also when they are tokenised again."""
    special = 0 if tokenizer.bos_token_id is None else 1
    for whole in texts:
        ids = encode([whole], tokenizer)[0][special : special + length]
        beginning = tokenizer.decode(ids)
        if len(ids) == length and encode([beginning], tokenizer)[0][special:] == ids:
            yield beginning


def _personas(config: SteerConfig, model: Any, tokenizer: Any, hookpoint: Hookpoint) -> list[SteeringTask]:
    """A trait's judge learns from the answers that its direction is made of."""
    features = features_for(model, tokenizer, config.reading)
    options: dict[str, Any] = {"max_new_tokens": ANSWER_TOKENS, "seed": config.seed}
    tasks = []
    for trait in _traits(config):
        positive, negative = answers = persona_answers(model, tokenizer, trait, **options)
        direction = persona_direction(model, tokenizer, trait, hookpoint, answers=answers, **options)
        texts = [conversation[-1]["content"] for conversation in (*negative, *positive)]
        judge = ConceptClassifier(texts, [0] * len(negative) + [1] * len(positive), features)
        prompts = tokenized(tokenizer, trait.held_out_questions[: config.prompts], chat=True)
        tasks.append(_task(direction, prompts, judge, trait.description))
    return tasks


def _traits(config: SteerConfig) -> list[Trait]:
    for name in config.directions:
        if name not in TRAITS:
            raise unknown("trait", name, TRAITS)
    return [TRAITS[name] for name in config.directions or TRAITS]


def _features(config: SteerConfig, model: Any, tokenizer: Any, hookpoint: Hookpoint) -> list[SteeringTask]:
    """Latents are judged by whether a text is like those that they are most active on, rather than other latents'."""
    sae, store = sae_at(str(config.sae), hookpoint, model=config.llm.model), ActivationStore(str(config.store))
    wanted: dict[str, Any] = {"latents": _latents(config) or config.features, "examples": LATENT_EXAMPLES}
    described = describe_latents(sae, store, tokenizer, **wanted, seed=config.seed)
    if len(described) < 2:
        raise InputError("a latent is judged against others: name at least two, or raise `features`")
    prompts = tokenized(tokenizer, beginnings(config, tokenizer))
    features = features_for(model, tokenizer, config.reading)
    texts = {d.latent: [f"{e.before}{e.token}{e.after}" for e in d.examples] for d in described}
    tasks = []
    for description in described:
        mine = texts[description.latent]
        others = [text for latent, found in texts.items() if latent != description.latent for text in found]
        judge = ConceptClassifier([*mine, *others], [1] * len(mine) + [0] * len(others), features)
        direction = sae_direction(sae, description.latent, description=description)
        tasks.append(_task(direction, prompts, judge, f"What these texts share: {'; '.join(mine[:3])}"))
    return tasks


def _latents(config: SteerConfig) -> list[int]:
    for name in config.directions:
        if not name.isdigit():
            raise InputError(f"latents are named by their number, got {name!r}")
    return [int(name) for name in config.directions]
