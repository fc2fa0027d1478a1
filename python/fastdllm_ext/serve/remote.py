"""An engine elsewhere: requests go to replicas, and to another one where theirs is lost.

A request has its seed before it is sent, so that whoever decodes it comes to the same tokens. What it was
told before its replica was lost is left out of what the next one says. Nothing here knows how replicas are
reached.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

from torch import Tensor

from fastdllm_ext.arguments import row_seeds
from fastdllm_ext.checks import check_count
from fastdllm_ext.decoding import GenerationConfig
from fastdllm_ext.engine import (
    Admission,
    Completion,
    Engine,
    EngineClosed,
    EngineStats,
    QueueFull,
    Request,
    Update,
)
from fastdllm_ext.engine.admission import as_tensor
from fastdllm_ext.serve.logs import LOGGER

__all__ = ["ClusterStats", "Facts", "Question", "RemoteEngine", "Word"]

ATTEMPTS = 5
PAUSE = 0.1  # seconds before the second attempt; four times as many before each later one
LOOK_EVERY = 1.0  # seconds
# Of EngineStats, what is so now. The rest counts, and is not undone by the end of who counted.
STATES = ("queued", "running", "num_pages", "free_pages", "peak_pages")


@dataclass(frozen=True)
class Facts:
    """What a replica says of its engine, once: all have the same.

    Attributes:
        parameters: of the model.
    """

    admission: Admission
    config: GenerationConfig
    max_rows: int
    parameters: int

    @classmethod
    def of(cls, engine: Engine) -> Facts:
        """An engine's."""
        parameters = sum(weight.numel() for weight in engine.model.parameters())
        return cls(engine.admission, engine.config, engine.max_rows, parameters)


@dataclass(frozen=True)
class Question:
    """What ``Engine.submit`` takes, as it is sent."""

    input_ids: list[int]
    config: GenerationConfig
    stream: int
    every_commit: bool


# What a replica says: updates, and as the last word a completion, or an error that is the request's own.
Word = Update | Completion | Exception


@dataclass
class ClusterStats(EngineStats):
    """Of all replicas together.

    Attributes:
        replicas: that are alive.
    """

    replicas: int = 0


class RemoteEngine:
    """What the server needs of an :class:`fastdllm_ext.Engine`, over replicas of one. Thread-safe.

    Args:
        facts: of the replicas' engines.
        tokenizer: of their model.
        ask: a question's words. Fails where the replica, or the way to it, does; closing it gives the
            question up.
        look: the statistics of the replicas that are alive, by their names. TimeoutError where some do not
            answer.
        max_queue: requests that may wait beside the ``max_rows`` of each replica.
        leave: called at the end.
    """

    def __init__(
        self,
        facts: Facts,
        tokenizer: Any,
        ask: Callable[[Question], AsyncGenerator[Word, None]],
        look: Callable[[], Awaitable[Mapping[str, EngineStats]]],
        *,
        max_queue: int | None = None,
        leave: Callable[[], None] = lambda: None,
    ) -> None:
        self.facts, self.admission, self.config = facts, facts.admission, facts.config
        self.family, self.geometry = facts.admission.family, facts.admission.geometry
        self.tokenizer, self.max_rows, self.max_queue = tokenizer, facts.max_rows, max_queue
        self._ask, self._look, self._leave = ask, look, leave
        self._lock = threading.Lock()
        self._open: set[Request] = set()
        self._next = 0
        self._closed = False
        self._alive: Mapping[str, EngineStats] = {}
        self._gone = EngineStats()  # the counters of those that are not
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fastdllm-remote", daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._look_once(), self._loop).result()
        self._watch = asyncio.run_coroutine_threadsafe(self._keep_looking(), self._loop)

    @property
    def longest(self) -> int:
        """Positions, prompt and answer together, that a request may have."""
        return self.admission.longest

    @property
    def failure(self) -> BaseException | None:
        """Why requests cannot be decoded now: no replica is alive. It passes when one is."""
        return None if self._alive else ConnectionError("no replica is alive")

    @property
    def stats(self) -> ClusterStats:
        """Sums over the replicas, a second old at most; who waits is known here."""
        alive = self._alive
        found = ClusterStats(**vars(_sum([self._gone, *alive.values()])), replicas=len(alive))
        found.queued = max(0, len(self._open) - found.running)
        return found

    def submit(
        self,
        input_ids: Tensor | Sequence[int],
        *,
        config: GenerationConfig | None = None,
        stream: int = 0,
        every_commit: bool = False,
        **arguments: Any,
    ) -> Request:
        """As ``Engine.submit``; what is refused is refused here."""
        check_count("stream", stream, least=0)
        config = GenerationConfig.build(self.config if config is None else config, arguments)
        config = replace(config, seed=row_seeds(config, 1)[0][0])
        row, common = self.admission.row(input_ids, config, stream)
        question = Question(as_tensor(input_ids).tolist(), config, stream, every_commit)
        with self._lock:
            if self._closed:
                raise EngineClosed("the engine is closed")
            waiting = len(self._open) - self.max_rows * len(self._alive)
            if self.max_queue is not None and waiting >= self.max_queue:
                raise QueueFull(f"{waiting} requests wait; max_queue={self.max_queue}")
            wake = partial(self._soon, self._cancel, self._next)
            request = Request(self._next, row, common, every_commit, wake)
            self._next += 1
            self._open.add(request)
            request.future.add_done_callback(lambda _: self._open.discard(request))
            self._soon(self._begin, request, question)
        return request

    def close(self) -> None:
        """Takes no more requests, cancels those that are there, and leaves the replicas."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            requests = list(self._open)
        for request in requests:
            request.cancel()
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._leave()

    def _soon(self, call: Callable[..., object], *arguments: Any) -> None:
        self._loop.call_soon_threadsafe(call, *arguments)

    # From here on: what runs on the loop.

    def _begin(self, request: Request, question: Question) -> None:
        if not request.done:
            task = self._loop.create_task(self._answer(request, question))
            self._tasks[request.number] = task
            task.add_done_callback(lambda _: self._tasks.pop(request.number))

    def _cancel(self, number: int) -> None:
        if number in self._tasks:
            self._tasks[number].cancel()

    async def _answer(self, request: Request, question: Question) -> None:
        told = _Told(request)
        for attempt in range(ATTEMPTS):
            if attempt:
                await asyncio.sleep(PAUSE * 4 ** (attempt - 1))
            told.begin()
            try:
                request.finish(await self._words(request, question, told))
                return
            except _Differs as error:
                lost: Exception = error
                break
            except Exception as error:  # of the replica or on the way to it; a request's own are words
                LOGGER.warning("a replica was lost: %s", _first_line(error))
                lost = error
        request.finish(lost)

    async def _words(self, request: Request, question: Question, told: _Told) -> Completion | Exception:
        """Passes a replica's updates on; its last word."""
        async with aclosing(self._ask(question)) as words:
            async for word in words:
                if isinstance(word, Exception):
                    return word
                told.late = min(told.late, request.seconds - word.seconds)
                if isinstance(word, Completion):
                    return told.end(word)
                for update in told.news(word):
                    request.update(update)
        raise ConnectionError("the replica ended before its answer")

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY)
            await self._look_once()

    async def _look_once(self) -> None:
        try:
            now = await self._look()
        except TimeoutError:
            return
        except Exception as error:
            LOGGER.warning("the replicas cannot be asked: %s", _first_line(error))
            now = {}
        left = [stats for name, stats in self._alive.items() if name not in now]
        states = dict.fromkeys(STATES, 0)
        self._gone = _sum([self._gone, *(replace(stats, **states) for stats in left)])
        self._alive = now

    async def _end(self) -> None:
        self._watch.cancel()
        for task in list(self._tasks.values()):
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)


class _Differs(RuntimeError):
    """An answer came out otherwise when it was decoded again."""


class _Told:
    """What a request was told, over all attempts to answer it.

    Attributes:
        late: seconds from its submission here to that at the replica which answers now.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        self._tokens: list[int] = []
        self._commits = False
        self.begin()

    def begin(self) -> None:
        """Another attempt."""
        self.late = float("inf")
        self._seen = 0  # tokens of this attempt
        self._void = self._commits

    def news(self, update: Update) -> list[Update]:
        """Of an attempt's update, what is new."""
        begin, self._seen = self._seen, self._seen + len(update.tokens)
        known = self._tokens[begin : self._seen]
        again = len(known)
        if list(update.tokens[:again]) != known:
            raise _Differs("its replica was lost, and on another one its beginning came out otherwise")
        self._tokens += update.tokens[again:]
        found = []
        if self._void:
            self._void = False
            found.append(Update(seconds=self._request.seconds, restarted_at=0))
        if len(update.tokens) > again or self._request.every_commit:
            self._commits = self._request.every_commit
            found.append(
                replace(
                    update,
                    tokens=update.tokens[again:],
                    confidence=update.confidence[again:],
                    steps=update.steps[again:],
                    seconds=self._request.seconds,
                )
            )
        return found

    def end(self, completion: Completion) -> Completion:
        """The last word, its seconds counted from the submission here."""
        return replace(
            completion,
            queue_seconds=completion.queue_seconds + self.late,
            first_block_seconds=completion.first_block_seconds + self.late,
            seconds=completion.seconds + self.late,
        )


def _sum(parts: Sequence[EngineStats]) -> EngineStats:
    return EngineStats(**{f.name: sum(getattr(part, f.name) for part in parts) for f in fields(EngineStats)})


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
