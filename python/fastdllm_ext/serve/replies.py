"""Answers as the JSON objects of OpenAI's API. The two endpoints differ in a :class:`Dialect` alone."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastdllm_ext.serve.answers import Answer, Piece, Scored

__all__ = ["CHAT", "COMPLETIONS", "Dialect", "Reply", "encode"]

Json = dict[str, Any]


@dataclass(frozen=True)
class Dialect:
    """How an endpoint says what.

    Attributes:
        prefix: of ids.
        whole, part: ``object`` of a response, and of a chunk of a stream.
        answer: (text) -> a choice's members.
        opening: (text) -> those of its first chunk in a stream; ``text`` is an echoed prompt.
        delta: (text) -> those of a later chunk.
        scores: (tokens) -> ``logprobs``.
    """

    prefix: str
    whole: str
    part: str
    answer: Callable[[str], Json]
    opening: Callable[[str], Json]
    delta: Callable[[str], Json]
    scores: Callable[[Sequence[Scored]], Json]


def _completion_scores(scored: Sequence[Scored]) -> Json:
    return {
        "tokens": [one.text for one in scored],
        "token_logprobs": [one.logprob for one in scored],
        "top_logprobs": None,
        "text_offset": [one.offset for one in scored],
    }


def _chat_scores(scored: Sequence[Scored]) -> Json:
    content = [
        {"token": one.text, "logprob": one.logprob, "bytes": list(one.text.encode()), "top_logprobs": []}
        for one in scored
    ]
    return {"content": content, "refusal": None}


COMPLETIONS = Dialect(
    prefix="cmpl-",
    whole="text_completion",
    part="text_completion",
    answer=lambda text: {"text": text},
    opening=lambda text: {"text": text},
    delta=lambda text: {"text": text},
    scores=_completion_scores,
)
CHAT = Dialect(
    prefix="chatcmpl-",
    whole="chat.completion",
    part="chat.completion.chunk",
    answer=lambda text: {"message": {"role": "assistant", "content": text, "refusal": None}},
    opening=lambda text: {"delta": {"role": "assistant", "content": text}},
    delta=lambda text: {"delta": {"content": text} if text else {}},
    scores=_chat_scores,
)


@dataclass
class Reply:
    """The answers to one request, and how they are to be said.

    Args:
        dialect: the endpoint's.
        identity: of the request.
        model: name of the model.
        answers: one for each choice.
        prompt_tokens: of all prompts.
        include_usage: a stream's last chunk has the usage.
        settings: what a stream of commits begins with; None streams blocks.
    """

    dialect: Dialect
    identity: str
    model: str
    answers: Sequence[Answer]
    prompt_tokens: int
    include_usage: bool = False
    settings: Json | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self) -> Json:
        """The response, when every answer has come to its end."""
        choices = [
            self._choice(one, self.dialect.answer(one.prefix + one.text), one.scored, last=True)
            for one in self.answers
        ]
        return {
            **self._envelope(self.dialect.whole),
            "choices": choices,
            "usage": self.usage(),
            "fastdllm": speed(self.answers),
        }

    async def chunks(self, pieces: AsyncIterator[Piece]) -> AsyncIterator[Json]:
        """The chunks of a stream."""
        blocks = self.settings is None
        opening = [
            self._choice(one, self.dialect.opening(one.prefix if blocks else "")) for one in self.answers
        ]
        yield self._chunk(opening, {} if blocks else {"fastdllm": self.settings})
        chunk = self._text if blocks else self._commits
        async for piece in pieces:
            if (found := chunk(piece)) is not None:
                yield found
        if self.include_usage:
            yield self._chunk([], {"usage": self.usage(), "fastdllm": speed(self.answers)})

    def usage(self) -> Json:
        """Tokens of prompts and answers."""
        tokens = sum(answer.tokens for answer in self.answers)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": self.prompt_tokens + tokens,
        }

    def _text(self, piece: Piece) -> Json | None:
        """A chunk of final text; None where there is none."""
        answer, last = piece.answer, piece.update is None
        if not (last or piece.text or piece.scored):
            return None
        choice = self._choice(answer, self.dialect.delta(piece.text), piece.scored, last=last)
        return self._chunk([choice], {"fastdllm": speed([answer])} if last else {})

    def _commits(self, piece: Piece) -> Json | None:
        """A chunk of what steps committed; the last of an answer has all its text."""
        answer, update = piece.answer, piece.update
        if update is None:
            text = self.dialect.delta(answer.prefix + answer.text)
            return self._chunk(
                [self._choice(answer, text, answer.scored, last=True)], {"fastdllm": speed([answer])}
            )
        commits = [
            {
                "position": position,
                "token_id": token,
                "token": answer.speech.name(token),
                "confidence": round(confidence, 6),
                "step": commit.step,
            }
            for commit in update.commits
            for position, token, confidence in zip(
                commit.positions, commit.tokens, commit.confidence, strict=True
            )
        ]
        if not commits and update.restarted_at is None:
            return None
        choice = self._choice(answer, self.dialect.delta(""))
        choice["commits"] = commits
        if update.restarted_at is not None:
            choice["restarted_at"] = update.restarted_at
        return self._chunk([choice], {"fastdllm": {"nfe": update.nfe, "seconds": round(update.seconds, 6)}})

    def _choice(
        self, answer: Answer, members: Json, scored: Sequence[Scored] = (), last: bool = False
    ) -> Json:
        scores = self.dialect.scores(scored) if scored else None
        reason = answer.finish_reason if last else None  # the answer may be further than its piece
        return {"index": answer.index, **members, "logprobs": scores, "finish_reason": reason}

    def _chunk(self, choices: list[Json], more: Json | None = None) -> Json:
        usage = {"usage": None} if self.include_usage else {}
        return {**self._envelope(self.dialect.part), "choices": choices, **usage, **(more or {})}

    def _envelope(self, kind: str) -> Json:
        identity = self.dialect.prefix + self.identity
        return {"id": identity, "object": kind, "created": self.created, "model": self.model}


def speed(answers: Sequence[Answer]) -> Json:
    """How fast answers came: tokens and forwards are sums, seconds the largest."""
    tokens, nfe = sum(one.tokens for one in answers), sum(one.nfe for one in answers)
    seconds = max(one.seconds for one in answers)
    queued = [one.completion.queue_seconds if one.completion else None for one in answers]
    first = [one.blocks[0] if one.blocks else None for one in answers]
    return {
        "nfe": nfe,
        "tokens": tokens,
        "tokens_per_forward": _ratio(tokens, nfe),
        "tokens_per_second": _ratio(tokens, seconds),
        "seconds": round(seconds, 6),
        "queue_seconds": _largest(queued),
        "first_block_seconds": _largest(first),
    }


def _ratio(a: float, b: float) -> float | None:
    return round(a / b, 3) if b else None


def _largest(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(max(known), 6) if len(known) == len(values) else None


def encode(value: Json) -> bytes:
    """JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
