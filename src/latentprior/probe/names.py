"""Names in results: the families of the tasks of SAE-Probes, and short names of priors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from os.path import commonprefix
from pathlib import PurePath

OWN = "own"

_FAMILIES = {
    "people": "hist_fig|wikidata|athlete",
    "places": "nyc_borough|us_state|us_timezone|world_country",
    "headlines and news": "headline|news_class|news_fake|agnews|click_bait",
    "compound words": "(high|living|social|credit|blood|prime|gene|control|magnetic|cell|trial|second|north|human|side"
    "|public|federal|third|clinical|mental)-",
    "question answering": "sciq|truthqa|temp_|phys|reasoning|cs_tf|arith|context_type",
    "ethics": "cm_|deon|just|virtue",
    "sentence understanding": "glue_(cola|mrpc|qnli|qqp|mnli)",
    "sentiment and emotion": "glue_sst2|movie_sent|amazon|twt_emotion",
    "toxicity and spam": "toxic|spam|hate",
    "written by a model": "ai_gen|aimade",
    "medicine": "cancer|disease",
    "other topics": "art_type|it_tick",
    "code": "code_",
}


def family(task: str) -> str:
    """The family of an embedded task, such as "sentiment and emotion" for "92_glue_sst2"; "own" for any other."""
    found = re.fullmatch(r"\d+_(.+)", task)
    matching = (name for name, pattern in _FAMILIES.items() if found and re.match(pattern, found[1]))
    return next(matching, OWN)


def short_names(paths: Sequence[str]) -> list[str]:
    """Paths without the folders that all of them begin or end with."""
    parts = [PurePath(path).parts for path in paths]
    if len(set(parts)) < 2:
        return list(paths)
    start, end = (len(commonprefix(entries)) for entries in (parts, [part[::-1] for part in parts]))
    return ["/".join(part[start : len(part) - end]) or path for part, path in zip(parts, paths, strict=True)]
