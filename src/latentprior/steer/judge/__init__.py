"""Judging steered text: a concept's presence and fluency, without any service, and answers of a language model."""

from latentprior.steer.judge.answers import Answer, Answers, Request
from latentprior.steer.judge.concept import (
    NAME,
    ConceptClassifier,
    Embedder,
    Features,
    Joined,
    LayerMean,
    Reading,
    features_for,
)
from latentprior.steer.judge.endpoint import Cost, EndpointJudge, RatingResult, Ratings, endpoint_key
from latentprior.steer.judge.fluency import conditional_nll, distinct_ngrams, longest_repeat, repetition
from latentprior.steer.judge.ratings import RatingRequest, parse_rating

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
