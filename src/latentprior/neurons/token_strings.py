"""The text of each token of a document."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

_BROKEN = "\N{REPLACEMENT CHARACTER}"  # what part of a character's bytes decodes to


class TokenStrings:
    """Tokens as they stand within a text, with their leading spaces; each is decoded once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}
        # Some tokenizers drop the space before a text's first word, so tokens are decoded after another one.
        self._anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
        self._anchor_text = self._decode([self._anchor])[0]

    def __call__(self, ids: Iterable[int]) -> list[str]:
        """Text of each token by itself; parts of a character decode to the replacement character."""
        ids = list(ids)
        missing = [i for i in dict.fromkeys(ids) if i not in self._known]
        for i, text in zip(missing, self._decode([[*self._anchor, i] for i in missing]), strict=True):
            after = text.removeprefix(self._anchor_text)
            self._known[i] = after if len(after) < len(text) or not self._anchor else self._decode([[i]])[0]
        return [self._known[i] for i in ids]

    def of_documents(self, documents: Sequence[np.ndarray]) -> list[list[str]]:
        """Each document's token strings, which joined are its text; a beginning-of-sequence token's is empty.

        The bytes of one character may be spread over tokens: then the last of them has it.
        """
        bos = self._tokenizer.bos_token_id
        bodies = [(1 if len(ids) and int(ids[0]) == bos else 0, ids.tolist()) for ids in documents]
        whole = self._decode([ids[start:] for start, ids in bodies])
        result = []
        for (start, ids), text in zip(bodies, whole, strict=True):
            strings = self(ids[start:])
            if _joined(strings, text) is None:
                strings = self._grown(ids[start:])
            result.append([""] * start + (_joined(strings, text) or strings))
        return result

    def _grown(self, ids: list[int]) -> list[str]:
        """What each token adds to the text of those before it."""
        strings, before = [], ""
        for text in self._decode([ids[: i + 1] for i in range(len(ids))]):
            settled = text if len(strings) + 1 == len(ids) else text.rstrip(_BROKEN)
            grown = settled if settled.startswith(before) else before
            strings.append(grown[len(before) :])
            before = grown
        return strings

    def _decode(self, documents: list[list[int]]) -> list[str]:
        if not documents:
            return []  # transformers gives one empty text
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return self._tokenizer.batch_decode(documents, **options)


def _joined(strings: list[str], text: str) -> list[str] | None:
    """The strings if they are the text, a space at its beginning aside; None if not."""
    joined = "".join(strings)
    if joined == text:
        return strings
    if strings and joined == " " + text and strings[0].startswith(" "):
        return [strings[0][1:], *strings[1:]]
    return None
