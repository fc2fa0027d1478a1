"""What becomes of an engine's updates: text, its tokens' logarithms, commits, and an end."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from fastdllm_ext.serve.text import Detokenizer, Speech, StopStrings

if TYPE_CHECKING:
    from fastdllm_ext.engine import Completion, Request, Update

__all__ = ["Answer", "Piece", "Scored", "merged"]

T = TypeVar("T")
LEAST_LOGPROB = -9999.0  # OpenAI's for "hardly ever"; JSON has no infinity


@dataclass(frozen=True)
class Scored:
    """A token of an answer: the text that it adds, where that begins, and its confidence's logarithm."""

    text: str
    offset: int
    logprob: float


@dataclass(frozen=True)
class Piece:
    """What an update adds to an answer.

    Attributes:
        text: that is certain by now.
        scored: its tokens, where they were asked for.
        update: the engine's; None for the last piece, which ends the answer.
    """

    answer: Answer
    text: str
    scored: list[Scored]
    update: Update | None


@dataclass
class Answer:
    """One choice of a response.

    Args:
        index: of the choice.
        request: the engine's.
        speech: makes its tokens text.
        stops: strings that end it.
        prefix: what stands before it: the prompt, where that is echoed.
        scores: keep its tokens' logarithms.

    Attributes:
        text: so far.
        tokens: how many, up to and including the one that ends it.
        blocks: seconds from its submission to when each of its blocks was final.
        finish_reason: "stop" or "length", at the end.
        completion: the engine's last word; None where a stop string came before it.
    """

    index: int
    request: Request
    speech: Speech
    stops: Sequence[str] = ()
    prefix: str = ""
    scores: bool = False
    text: str = ""
    scored: list[Scored] = field(default_factory=list)
    tokens: int = 0
    nfe: int = 0
    seconds: float = 0.0
    blocks: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    completion: Completion | None = None

    def __post_init__(self) -> None:
        self._detokenizer, self._stops = Detokenizer(self.speech), StopStrings(self.stops)
        self._length = 0  # of the text, what is held back included

    async def pieces(self) -> AsyncIterator[Piece]:
        """Until it ends, or the engine's request fails or is cancelled: raises what that raises."""
        async for update in self.request:
            yield self._take(update)
            if self._stops.found:
                self.request.cancel()
                break
        else:
            self.completion = self.request.result()
        yield self._end()

    def _take(self, update: Update) -> Piece:
        self.nfe, self.seconds = update.nfe, update.seconds
        if update.tokens:
            self.blocks.append(update.seconds)
        # One by one where it matters which of them a text ends in.
        size = 1 if self.scores or self.stops else len(update.tokens)
        text, before = "", len(self.scored)
        for i in range(0, len(update.tokens), size or 1):
            new = self._detokenizer.push(update.tokens[i : i + size])
            self.tokens += len(update.tokens[i : i + size])
            if self.scores:
                self.scored.append(Scored(new, self._length, logprob(update.confidence[i])))
            self._length += len(new)
            text += self._stops.push(new)
            if self._stops.found:
                break
        self.text += text
        return Piece(self, text, self.scored[before:], update)

    def _end(self) -> Piece:
        text, end = "", self.completion
        if end is not None:
            text = self._stops.push(self._detokenizer.rest()) + self._stops.rest()
            self.text += text
            self.seconds = end.seconds
        self.finish_reason = "stop" if end is None or self._stops.found else end.finish_reason
        return Piece(self, text, [], None)


def logprob(confidence: float) -> float:
    """The natural logarithm of a probability."""
    return max(math.log(min(confidence, 1.0)), LEAST_LOGPROB) if confidence > 0 else LEAST_LOGPROB


async def merged(streams: Sequence[AsyncIterator[T]]) -> AsyncIterator[T]:
    """What several iterators yield, as it comes. The first that fails ends all."""
    if len(streams) == 1:
        async for item in streams[0]:
            yield item
        return
    ready: asyncio.Queue[Any] = asyncio.Queue()  # items, and tasks that have ended

    async def forward(stream: AsyncIterator[T]) -> None:
        async for item in stream:
            ready.put_nowait(item)

    tasks = [asyncio.create_task(forward(stream)) for stream in streams]
    for task in tasks:
        task.add_done_callback(ready.put_nowait)
    try:
        left = len(tasks)
        while left:
            item = await ready.get()
            if isinstance(item, asyncio.Task):
                item.result()
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
