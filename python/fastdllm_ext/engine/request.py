"""A request from the outside: what it was asked, what has come of it, and how to wait for more."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from time import perf_counter

from fastdllm_ext.decoder import Common
from fastdllm_ext.decoding import Commit
from fastdllm_ext.rows import DecodingRow

__all__ = ["Completion", "Request", "Update"]


@dataclass(frozen=True)
class Update:
    """What a turn has made of a request.

    Attributes:
        tokens: of the answer, final from left to right, behind those of the updates before: those of blocks
            that are filled, up to and including EOS.
        confidence: of each of them.
        steps: the step that committed each; -1 where none did.
        nfe: forwards of the request so far.
        seconds: since the request was submitted.
        commits: with ``every_commit``, what each step committed.
        restarted_at: the request was put aside for want of pages: commits of this step and later ones are
            void, and come again. What was final comes to the same, and is not told twice.
    """

    tokens: tuple[int, ...] = ()
    confidence: tuple[float, ...] = ()
    steps: tuple[int, ...] = ()
    nfe: int = 0
    seconds: float = 0.0
    commits: tuple[Commit, ...] = ()
    restarted_at: int | None = None


@dataclass(frozen=True)
class Completion:
    """A finished request.

    Attributes:
        prompt_length: tokens before the answer.
        tokens: the answer, up to and including the first EOS.
        confidence, steps: of each of them, as in :class:`GenerationOutput`.
        finish_reason: "stop" at an EOS, or "length".
        nfe: forwards that it took part in, those apart that were lost when it was put aside.
        text: the answer without special tokens; None where the engine has no tokenizer.
        queue_seconds: from its submission to its first admission.
        first_block_seconds: to when its first block was filled.
        seconds: to its end.
        block_seconds: of each block, from the one before.
    """

    prompt_length: int
    tokens: tuple[int, ...]
    confidence: tuple[float, ...]
    steps: tuple[int, ...]
    finish_reason: str
    nfe: int
    text: str | None
    queue_seconds: float
    first_block_seconds: float
    seconds: float
    block_seconds: tuple[float, ...]

    @property
    def tokens_per_forward(self) -> float:
        """Answer tokens for each forward."""
        return len(self.tokens) / self.nfe


@dataclass
class Progress:
    """The engine's own view of a request: only its thread touches this.

    Attributes:
        settled: answer tokens that are final.
        reported: steps whose commits were reported.
        admitted: seconds from the submission to the first admission.
        blocks: seconds to the end of each block.
    """

    settled: int = 0
    reported: int = 0
    admitted: float | None = None
    blocks: list[float] = field(default_factory=list)


class Request:
    """What :meth:`Engine.submit` returns.

    Iterate over it, with ``for`` or ``async for``, once: it yields every :class:`Update` from the first on,
    and raises what :meth:`result` raises.

    Attributes:
        number: in order of submission.
        row: what is decoded.
        common: what it has in common with requests that share its forwards.
        every_commit: updates have ``commits``.
        future: of its completion.
    """

    def __init__(
        self, number: int, row: DecodingRow, common: Common, every_commit: bool, wake: Callable[[], None]
    ) -> None:
        self.number, self.row, self.common, self.every_commit = number, row, common, every_commit
        self.progress = Progress()
        self.submitted = perf_counter()
        self._wake = wake
        self.future: Future[Completion] = Future()
        self._lock = threading.RLock()  # a listener may cancel
        self._backlog: list[Update] = []
        self._listener: Callable[[Update | None], None] | None = None

    @property
    def done(self) -> bool:
        """Finished, failed or cancelled."""
        return self.future.done()

    @property
    def cancelled(self) -> bool:
        """Cancelled before it was finished."""
        return self.future.cancelled()

    @property
    def seconds(self) -> float:
        """Since its submission."""
        return perf_counter() - self.submitted

    def cancel(self) -> None:
        """Gives it up; its place in the queue, or its pages, are free at the next turn. Never an error."""
        if self.future.cancel():
            self.update(None)
            self._wake()

    def result(self, timeout: float | None = None) -> Completion:
        """Waits for the end, ``timeout`` seconds at most.

        Raises:
            concurrent.futures.CancelledError: it was cancelled.
            TimeoutError: it is not finished yet, and goes on.
            ValueError: NaN or infinite logits. Or whatever else kept it from being finished.
        """
        return self.future.result(timeout)

    def __iter__(self) -> Iterator[Update]:
        updates: queue.SimpleQueue[Update | None] = queue.SimpleQueue()
        self._listen(updates.put)
        while (update := updates.get()) is not None:
            yield update
        self.result()

    async def __aiter__(self) -> AsyncIterator[Update]:
        loop = asyncio.get_running_loop()
        updates: asyncio.Queue[Update | None] = asyncio.Queue()

        def put(update: Update | None) -> None:
            with suppress(RuntimeError):  # the loop may be gone
                loop.call_soon_threadsafe(updates.put_nowait, update)

        self._listen(put)
        while (update := await updates.get()) is not None:
            yield update
        self.result()

    def _listen(self, listener: Callable[[Update | None], None]) -> None:
        with self._lock:
            if self._listener is not None:
                raise RuntimeError(f"request {self.number} is iterated over already; takes one iteration")
            self._listener = listener
            for update in self._backlog:
                listener(update)
            self._backlog.clear()
            if self.done:
                listener(None)

    def update(self, update: Update | None) -> None:
        """The engine's: passes an update on, or None at the end."""
        with self._lock:
            if self._listener is not None:
                self._listener(update)
            elif update is not None:
                self._backlog.append(update)

    def finish(self, end: Completion | BaseException) -> bool:
        """The engine's: the last word. False where it was cancelled before."""
        try:
            if isinstance(end, BaseException):
                self.future.set_exception(end)
            else:
                self.future.set_result(end)
        except InvalidStateError:
            return False
        self.update(None)
        return True
