"""Tokens to text as they come, and strings that end an answer. No HTTP, no model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

__all__ = ["Detokenizer", "Speech", "StopStrings"]

UNFINISHED = "\ufffd"  # what a decoder makes of a part of a character


class Speech:
    """A tokenizer, both ways.

    Args:
        tokenizer: HuggingFace's.
        eos_ids: tokens that are no text.
    """

    def __init__(self, tokenizer: Any, eos_ids: Collection[int]) -> None:
        self._tokenizer, self._eos_ids = tokenizer, frozenset(eos_ids)
        self._names: dict[int, str] = {}

    @property
    def has_chat(self) -> bool:
        """There is a chat template."""
        return getattr(self._tokenizer, "chat_template", None) is not None

    def chat(self, messages: list[dict[str, str]]) -> str:
        """Messages as a prompt. jinja2.TemplateError where the template refuses them."""
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def encode(self, text: str, special: bool) -> list[int]:
        """Token ids; with ``special`` those that the tokenizer puts around a text."""
        return list(self._tokenizer(text, add_special_tokens=special)["input_ids"])

    def __call__(self, tokens: Sequence[int]) -> str:
        """An answer's text: without special tokens."""
        kept = [token for token in tokens if token not in self._eos_ids]
        return str(self._tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def whole(self, tokens: Sequence[int]) -> str:
        """All of it, special tokens by their names."""
        return str(self._tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))

    def name(self, token: int) -> str:
        """A token alone."""
        if token not in self._names:
            self._names[token] = self.whole([token])
        return self._names[token]


class Detokenizer:
    """Gives out the text of tokens, whole characters only.

    What it gives, joined, is the decoding of all tokens together. Each call decodes the tokens of the last
    calls alone, as far as the new text may depend on them.

    Args:
        decode: of token ids.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._given = 0  # characters of the window's text

    def push(self, tokens: Sequence[int]) -> str:
        """The text that is certain by now, behind that of the calls before."""
        self._window += tokens
        text = self._decode(self._window)
        certain = text.rstrip(UNFINISHED)
        new = certain[self._given :]
        if not new:
            return ""
        self._given += len(new)
        if certain == text:  # what follows starts a character of its own
            self._window = list(tokens)
            self._given = len(self._decode(self._window))
        return new

    def rest(self) -> str:
        """What was held back, at the end: a part of a character that stays one."""
        return self._decode(self._window)[self._given :]


class StopStrings:
    """Lets text pass up to the first stop string, and holds back what may become one.

    The first is the one that is complete first, whatever pieces the text comes in; of two that end together
    the longer.

    Args:
        strings: none of them empty.

    Attributes:
        found: the text has ended.
    """

    def __init__(self, strings: Sequence[str] = ()) -> None:
        self._strings = strings
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that is certain to come before any stop string, behind that of the calls before."""
        text = self._held + text
        ends = [(at + len(stop), at) for stop in self._strings if (at := text.find(stop)) >= 0]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)[1]]
        keep = len(text) - max((_begun(text, stop) for stop in self._strings), default=0)
        self._held = text[keep:]
        return text[:keep]

    def rest(self) -> str:
        """What was held back, at the end."""
        held, self._held = self._held, ""
        return held


def _begun(text: str, stop: str) -> int:
    """Characters at the text's end with which ``stop`` begins."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
