"""Conversations under a tokenizer's chat template: the tokens of a prompt, and which tokens a response is."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError

from latentprior.data.tokens import missing_beginning
from latentprior.utils.errors import InputError

Conversation = list[dict[str, str]]  # messages {"role", "content"}
Span = tuple[int, int]  # first position and the one after the last


def prompt_ids(tokenizer: Any, messages: Conversation) -> list[int]:
    """Token ids with which the model is to begin its answer, BOS first."""
    text = _render(tokenizer, messages, "the prompt", add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return missing_beginning(tokenizer, ids) + ids


def response_span(
    tokenizer: Any, conversation: Conversation, *, name: str = "the conversation"
) -> tuple[list[int], Span]:
    """Token ids of a conversation under the tokenizer's chat template, and the span of its last response in them.

    The response is looked for in the text that follows the template of the messages before it (with its generation
    prompt); a token that holds any of its characters, white space at its ends aside, is in the span. What cannot be
    found so, or not be told because the tokenizer is not a fast one, is an `InputError`.
    """
    if len(conversation) < 2 or conversation[-1].get("role") != "assistant":
        raise InputError(f"{name} must be messages that end in one of the role 'assistant'")
    if not tokenizer.is_fast:
        raise InputError(f"the tokenizer {tokenizer.name_or_path!r} does not tell where tokens begin: use a fast one")
    whole = _render(tokenizer, conversation, name)
    prompt = _render(tokenizer, conversation[:-1], name, add_generation_prompt=True)
    if not whole.startswith(prompt):
        raise InputError(f"the chat template renders {name} otherwise than as its prompt and then the response")
    response = conversation[-1].get("content", "").strip()
    start = whole.find(response, len(prompt))
    if not response or start < 0:
        raise InputError(f"{name} has {'a response that the chat template changes' if response else 'no response'}")
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    stop = start + len(response)
    inside = [i for i, (begin, end) in enumerate(encoded["offset_mapping"]) if begin < stop and end > start]
    bos = missing_beginning(tokenizer, encoded["input_ids"])
    return bos + encoded["input_ids"], (len(bos) + inside[0], len(bos) + inside[-1] + 1)


def _render(tokenizer: Any, messages: Conversation, name: str, *, add_generation_prompt: bool = False) -> str:
    if not tokenizer.chat_template:
        raise InputError(f"the tokenizer {tokenizer.name_or_path!r} has no chat template: use a chat model's")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        raise InputError(f"the chat template refuses {name}: {' '.join(str(error).split())[:200]}") from error
