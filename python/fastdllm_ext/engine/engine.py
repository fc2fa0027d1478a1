"""``Engine``: a thread that takes turns for as long as there are requests."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from fastdllm_ext.arguments import check_model, row_seeds
from fastdllm_ext.cache import PAGE_SIZE, PAGE_SIZES, PagedKVCache
from fastdllm_ext.checks import check_count
from fastdllm_ext.decoding import GenerationConfig
from fastdllm_ext.engine.admission import Admission
from fastdllm_ext.engine.request import Completion, Request, Update
from fastdllm_ext.engine.scheduler import make_scheduler
from fastdllm_ext.engine.statistics import EngineStats
from fastdllm_ext.engine.team import Team
from fastdllm_ext.forward import device_of, evaluating, place_of_keys
from fastdllm_ext.generate import defaults_of
from fastdllm_ext.patching.registry import patched_family, patched_options, unwrapped

__all__ = ["Engine", "EngineClosed", "QueueFull"]

GRACE = 5.0  # seconds
# Of the memory that is free, what the pages may take where nothing is said; forwards need the rest.
SHARE_FOR_PAGES = 0.6


class QueueFull(RuntimeError):
    """As many requests wait as may."""


class EngineClosed(RuntimeError):
    """The engine takes no requests any more."""


class Engine:
    """Decodes requests that come and go, all that run in one forward a turn. Thread-safe.

    A request's tokens are those that :func:`generate` gives it alone (in float32; in other dtypes, where a
    library's products do not depend on the batch).

    Args:
        model: a patched model. While the engine is open, nothing else may run or change it.
        tokenizer: decodes answers into ``Completion.text``, and encodes prompts that are strings.
        config: what requests get that say nothing; by default what the checkpoint asks for
            (:func:`fastdllm_ext.generate.defaults_of`).
        num_pages: of keys and values. By default enough for ``max_rows`` of the longest requests, or what
            60 % of the free memory holds.
        page_size: positions a page holds: 16, 32 or 64.
        max_rows: requests that run at once; more wait.
        max_queue: requests that may wait; None is any number.
        max_forward_tokens: positions that a forward computes at most. Where more would have to be refreshed,
            some rows wait for the next.
        share_prompts: requests whose first forward is the same take it once.
        reuse_prompts: the first refresh of a request takes over keys and values of an earlier one, as far as
            their prompts begin with the same tokens. An approximation: docs/engine.md says of what quality.
        team: whose model it is, if several processes share it; ends with the engine.

    Attributes:
        admission: what it takes.
        failure: what ended the engine, where a fault has.

    Raises:
        ValueError: a model that is not patched, or an argument out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        config: GenerationConfig | None = None,
        num_pages: int | None = None,
        page_size: int = PAGE_SIZE,
        max_rows: int = 64,
        max_queue: int | None = None,
        max_forward_tokens: int = 8192,
        share_prompts: bool = True,
        reuse_prompts: bool = False,
        team: Team | None = None,
    ) -> None:
        for name, value in (("max_rows", max_rows), ("max_forward_tokens", max_forward_tokens)):
            check_count(name, value)
        for name, limit, least in (("num_pages", num_pages, 1), ("max_queue", max_queue, 0)):
            if limit is not None:
                check_count(name, limit, least=least)
        if page_size not in PAGE_SIZES:
            raise ValueError(f"page_size={page_size!r}; takes one of {PAGE_SIZES}")
        self.family = patched_family(model)
        check_model(model)
        self.config = defaults_of(model) if config is None else config
        self.model, self.tokenizer, self.max_rows, self.max_queue = model, tokenizer, max_rows, max_queue
        own = unwrapped(model)
        self.geometry, parts = self.family.geometry(own), self.family.parts(own)
        self.device = device_of(parts.embedding)
        if num_pages is None:
            shape, dtype, _ = place_of_keys(self.geometry, parts, patched_options(model))
            page = PagedKVCache.page_bytes(*shape, dtype, page_size)
            room = int(SHARE_FOR_PAGES * free_memory(self.device) // page)
            longest = PagedKVCache.pages_for([self.geometry.max_positions], page_size)
            num_pages = max(1, min(room, max_rows * longest))
        self.admission = Admission(self.family, self.geometry, num_pages, page_size)
        settings = {
            "num_pages": num_pages,
            "page_size": page_size,
            "max_rows": max_rows,
            "max_forward_tokens": max_forward_tokens,
            "share_prompts": share_prompts,
            "reuse_prompts": reuse_prompts,
        }
        self._scheduler = make_scheduler(
            own, decode=partial(_decode, tokenizer), together=team is not None, **settings
        )
        self.cache = self._scheduler.cache
        self._lock = threading.Condition()
        self._arrived: list[Request] = []
        self._next = 0
        self._closed = False
        self.failure: BaseException | None = None
        self._team = team
        if team is not None:
            team.start(self._end, **settings)
        self._thread = threading.Thread(target=self._work, name="fastdllm-engine", daemon=True)
        self._start()

    @property
    def longest(self) -> int:
        """Positions, prompt and answer together, that a request may have."""
        return self.admission.longest

    @property
    def stats(self) -> EngineStats:
        """State and counters; a copy."""
        with self._lock:
            scheduler, pages = self._scheduler, self.cache.stats
            return replace(
                scheduler.stats,
                queued=len(scheduler.waiting) + len(self._arrived),
                running=len(scheduler.running),
                num_pages=pages.num_pages,
                free_pages=pages.num_free,
                peak_pages=pages.peak_used,
            )

    def submit(
        self,
        input_ids: Tensor | Sequence[int],
        *,
        config: GenerationConfig | None = None,
        stream: int = 0,
        every_commit: bool = False,
        **arguments: Any,
    ) -> Request:
        """Takes a request in.

        Args:
            input_ids: [P] int64, or a list of ints: the prompt; with ``infill=True`` what holds the masks.
            config: as :func:`generate` takes it; by default the engine's.
            stream: of the seed's random numbers: row b of a :func:`generate` has stream b.
            every_commit: its updates hold every commit.
            **arguments: the fields of :class:`GenerationConfig`, over the config.

        Raises:
            TypeError, ValueError: as :func:`generate` raises them. RequestTooLong: see :attr:`longest`.
            QueueFull: ``max_queue`` requests wait.
            EngineClosed: after :meth:`close`.
        """
        check_count("stream", stream, least=0)
        config = GenerationConfig.build(self.config if config is None else config, arguments)
        row, common = self.admission.row(input_ids, config, stream)
        with self._lock:
            if self._closed:
                raise EngineClosed("the engine is closed") from self.failure
            queued = len(self._scheduler.waiting) + len(self._arrived)
            if self.max_queue is not None and queued >= self.max_queue:
                raise QueueFull(f"{queued} requests wait; max_queue={self.max_queue}")
            request = Request(self._next, row, common, every_commit, self._wake)
            self._next += 1
            self._arrived.append(request)
            self._lock.notify_all()
        return request

    async def stream(self, input_ids: Tensor | Sequence[int], **arguments: Any) -> AsyncIterator[Update]:
        """Submits a request and yields its updates; leaving the iteration before its end cancels it.

        Takes and raises what :meth:`submit` does.
        """
        request = self.submit(input_ids, **arguments)
        try:
            async for update in request:
                yield update
        finally:
            request.cancel()

    def generate(
        self,
        prompts: Iterable[str | Tensor | Sequence[int]],
        *,
        config: GenerationConfig | None = None,
        progress: bool = True,
        **arguments: Any,
    ) -> list[Completion]:
        """Decodes prompts, any number of them, and waits.

        Prompt b gets the tokens of row b of :func:`generate`, with a ``seed`` too.

        Args:
            prompts: strings (where the engine has a tokenizer), or as :meth:`submit` takes one; may be a
                generator, of which no more is read than can soon be decoded.
            config, **arguments: as for :meth:`submit`.
            progress: shows a bar, with tokens for each second and each forward.

        Raises:
            What :meth:`submit` raises, or a request failed with; the others are cancelled.
        """
        config = GenerationConfig.build(self.config if config is None else config, arguments)
        if config.seed is None:
            config = replace(config, seed=row_seeds(config, 1)[0][0])
        total = len(prompts) if isinstance(prompts, Sequence) else None
        left = enumerate(prompts)
        found: dict[int, Completion] = {}
        pending: dict[int, Request] = {}
        with tqdm(total=total, disable=not progress, unit="prompt") as shown:
            try:
                while True:
                    for b, prompt in islice(left, 2 * self.max_rows - len(pending)):
                        ids = self.encode(prompt) if isinstance(prompt, str) else prompt
                        pending[b] = self._submit_when_possible(ids, config, b)
                    if not pending:
                        return [found[b] for b in sorted(found)]
                    wait([request.future for request in pending.values()], return_when=FIRST_COMPLETED)
                    for b in [b for b, request in pending.items() if request.done]:
                        found[b] = pending.pop(b).result()
                        shown.update()
                    shown.set_postfix_str(self.stats.summary, refresh=False)
            finally:
                for request in pending.values():
                    request.cancel()

    def encode(self, text: str) -> list[int]:
        """A string as token ids. ValueError where the engine has no tokenizer."""
        if self.tokenizer is None:
            raise ValueError(f"prompt={text[:40]!r}: the engine has no tokenizer; takes token ids")
        return list(self.tokenizer(text)["input_ids"])

    def close(self, *, drain: bool = False, timeout: float | None = None) -> None:
        """Takes no more requests; cancels those that are there, or with ``drain`` finishes them first.

        Args:
            drain: finish what was submitted.
            timeout: seconds to do so in; what is then left is cancelled.
        """
        with self._lock:
            self._closed = True
            self._lock.notify_all()
            if drain:
                self._lock.wait_for(lambda: self._idle or not self._thread.is_alive(), timeout)
            requests = self._open_requests()
        for request in requests:
            request.cancel()
        if threading.current_thread() is not self._thread:
            # After a failure of the team it may wait for ever for a process that is gone.
            self._thread.join(None if self.failure is None else GRACE)
        if self._team is not None:
            self._team.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> None:
        self._thread.start()

    @property
    def _idle(self) -> bool:
        return self._scheduler.idle and not self._arrived

    def _submit_when_possible(
        self, prompt: Tensor | Sequence[int], config: GenerationConfig, stream: int
    ) -> Request:
        while True:
            try:
                return self.submit(prompt, config=config, stream=stream)
            except QueueFull:
                with self._lock:
                    self._lock.wait(1.0)  # the thread says when it has let some in

    def _wake(self) -> None:
        with self._lock:
            self._lock.notify_all()

    def _work(self) -> None:
        """Turns, until the engine is closed and nothing is left."""
        scheduler = self._scheduler
        try:
            with evaluating(scheduler.model):
                while self._wait_for_work():
                    scheduler.turn()
        except BaseException as error:  # a fault of ours: nobody may wait for ever
            self._end(error)
            raise

    def _end(self, failure: BaseException) -> None:
        """Nothing works any more: every request ends with what it was."""
        with self._lock:
            self.failure, self._closed = self.failure or failure, True
            self._lock.notify_all()
            requests = self._open_requests()
        for request in requests:
            request.finish(failure)

    def _wait_for_work(self) -> bool:
        """Waits until a request runs; False when the engine is closed and nothing is left."""
        with self._lock:
            while not self._let_in():
                if self._closed:
                    return False
                self._lock.wait()
        return True

    def _let_in(self) -> bool:
        """Lets requests in; whether any runs. The lock is held."""
        arrived, scheduler = self._arrived, self._scheduler
        gone = {request.number for request in self._open_requests() if request.cancelled}
        if self._team is not None and (arrived or gone or not scheduler.idle):
            self._team.tell(arrived, gone)
        scheduler.begin(arrived, gone)
        arrived.clear()
        self._lock.notify_all()
        return not scheduler.idle

    def _open_requests(self) -> list[Request]:
        scheduler = self._scheduler
        waiting = [request for _, request in scheduler.waiting]
        return [*self._arrived, *waiting, *list(scheduler.running.values())]


def _decode(tokenizer: PreTrainedTokenizerBase | None, tokens: Sequence[int]) -> str | None:
    if tokenizer is None:
        return None
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True))


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on a device, as far as is known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    with suppress(OSError, StopIteration):
        facts = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * int(next(line.split()[1] for line in facts if line.startswith("MemAvailable")))
    return 4 << 30
