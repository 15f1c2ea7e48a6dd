"""Judging steered text: a concept's presence and fluency, without any service, and answers of a language model."""

from latentprior.judge.answers import Answer, Answers, Request
from latentprior.judge.concept import (
    NAME,
    ConceptClassifier,
    Embedder,
    Features,
    Joined,
    LayerMean,
    Reading,
    features_for,
)
from latentprior.judge.endpoint import Cost, EndpointJudge, RatingResult, Ratings, endpoint_key
from latentprior.judge.fluency import conditional_nll, distinct_ngrams, longest_repeat, repetition
from latentprior.judge.ratings import RatingRequest, parse_rating

__all__ = [
    "NAME",
    "Answer",
    "Answers",
    "ConceptClassifier",
    "Cost",
    "Embedder",
    "EndpointJudge",
    "Features",
    "Joined",
    "LayerMean",
    "RatingRequest",
    "RatingResult",
    "Ratings",
    "Reading",
    "Request",
    "conditional_nll",
    "distinct_ngrams",
    "endpoint_key",
    "features_for",
    "longest_repeat",
    "parse_rating",
    "repetition",
]
