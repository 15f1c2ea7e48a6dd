"""Judging generated text.

Texts enter, numbers leave. `concept` and `fluency` need no service: a classifier on embeddings and activations, and
likelihood and repetition. `endpoint` asks a language model behind HTTP (`post`) for answers of any kind (`answers`),
such as ratings (`ratings`), and keeps what was paid for (`cache`).
"""

from latentprior.judge.answers import Answer, Answers, Request
from latentprior.judge.concept import (
    ConcatenatedFeatures,
    ConceptClassifier,
    Embedder,
    FeatureKind,
    Features,
    LayerMean,
    features_for,
)
from latentprior.judge.endpoint import Cost, EndpointJudge, Ratings, endpoint_key
from latentprior.judge.fluency import conditional_nll, distinct_ngrams, longest_repeat, repetition
from latentprior.judge.ratings import RatingRequest, parse_rating

__all__ = [
    "Answer",
    "Answers",
    "ConcatenatedFeatures",
    "ConceptClassifier",
    "Cost",
    "Embedder",
    "EndpointJudge",
    "FeatureKind",
    "Features",
    "LayerMean",
    "RatingRequest",
    "Ratings",
    "Request",
    "conditional_nll",
    "distinct_ngrams",
    "endpoint_key",
    "features_for",
    "longest_repeat",
    "parse_rating",
    "repetition",
]
