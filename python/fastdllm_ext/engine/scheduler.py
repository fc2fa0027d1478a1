"""Which requests hold pages, and which of them take part in the next forward."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from contextlib import suppress
from time import perf_counter
from typing import Any

from torch import nn

from fastdllm_ext.cache import OutOfPages, PagedKVCache
from fastdllm_ext.decoder import BadLogits, Common, Decoder
from fastdllm_ext.engine.prompts import KeptPrompts
from fastdllm_ext.engine.request import Completion, Request, Update
from fastdllm_ext.engine.statistics import EngineStats
from fastdllm_ext.forward import place_of_keys
from fastdllm_ext.generate import commits_of, output_of
from fastdllm_ext.patching.registry import patched_family, patched_options
from fastdllm_ext.rows import DecodingRow, Step

__all__ = ["Scheduler", "make_scheduler"]


class Scheduler:
    """Requests that wait and requests that run, turn by turn. For one thread.

    They are admitted in order of submission, each when the pages it needs are free beside those that the
    running ones need: none overtakes another, so none starves. One whose first forward is the same as that of
    a running one enters without: that forward serves both, and their pages are one until they are written. If
    there are too few by then, the request submitted last is put aside, which goes on from its last refresh
    when it is admitted again.

    Args:
        model: a patched model.
        cache: pages of the requests, and of nothing else.
        max_rows: requests that run at once.
        max_forward_tokens: positions that a forward computes, but for what the oldest of its rows needs.
        share_prompts: one forward serves requests of which it is the same.
        reuse_prompts: first refreshes take over keys of earlier prompts that begin with the same tokens.
        decode: turns answers into text.
        together: other processes take the same turns. What fails here may not have failed there: it is
            raised.
    """

    def __init__(
        self,
        model: nn.Module,
        cache: PagedKVCache,
        *,
        max_rows: int,
        max_forward_tokens: int,
        share_prompts: bool,
        reuse_prompts: bool,
        decode: Callable[[Sequence[int]], str | None],
        together: bool = False,
    ) -> None:
        self.model, self.cache, self.decode, self.together = model, cache, decode, together
        self.max_rows, self.max_forward_tokens = max_rows, max_forward_tokens
        self.share_prompts = share_prompts
        self.kept = KeptPrompts(cache) if reuse_prompts else None
        self.shift = patched_family(model).shift
        self.stats = EngineStats()
        self.waiting: list[tuple[int, Request]] = []  # a heap: those that were put aside come first again
        self.running: dict[DecodingRow, Request] = {}
        self.decoders: dict[Common, Decoder] = {}
        self._firsts: dict[Hashable, DecodingRow] = {}  # rows before their first forward, by what it computes

    @property
    def idle(self) -> bool:
        """Nothing to do."""
        return not self.waiting and not self.running

    def begin(self, arrived: Iterable[Request], gone: Collection[int]) -> None:
        """Before a turn: takes requests into the queue, drops others by number, and lets in who may."""
        for request in arrived:
            self._add(request)
        self._drop(gone)
        self._admit()

    def _add(self, request: Request) -> None:
        heapq.heappush(self.waiting, (request.number, request))

    def pages_of(self, request: Request) -> int:
        """Pages that it needs while it runs."""
        page_size = self.cache.page_size
        return self.cache.pages_for(request.row.page_lengths(self.shift, page_size), page_size)

    def _admit(self) -> None:
        """Lets requests in while there are pages and rows for them."""
        self._firsts = {k: row for k, row in self._firsts.items() if row.index >= 0 and row.nfe == 0}
        promised = sum(map(self.pages_of, self.running.values()))
        while self.waiting and len(self.running) < self.max_rows:
            request = self.waiting[0][1]
            row, needed = request.row, self.pages_of(request)
            row.reused, row.like = 0, None
            row.like = self._like(request)
            promised += needed
            if row.like is None and promised > self.cache.stats.num_pages:
                break
            heapq.heappop(self.waiting)
            self.running[row] = request
            try:
                self._take_over(request, needed)
                self._decoder(request.common).enter([row])
            except Exception as error:
                if self.together:
                    raise
                self._fail([row], error)
            if request.progress.admitted is None:
                request.progress.admitted = request.seconds

    def turn(self) -> None:
        """A forward of the running requests: one of all that have enough in common."""
        begin = perf_counter()
        for common, decoder in list(self.decoders.items()):
            rows = list(self._chosen(decoder))
            if rows:
                self._take_turn(decoder, rows)
            elif len(self.decoders) > 1:
                del self.decoders[common]
        self.stats.busy_seconds += perf_counter() - begin

    def _decoder(self, common: Common) -> Decoder:
        if common not in self.decoders:
            self.decoders[common] = Decoder(self.model, common, self.cache)
        return self.decoders[common]

    def _take_over(self, request: Request, needed: int) -> None:
        """Gives a row the kept keys of its prompt, and makes room for its others."""
        row = request.row
        if row.like is not None:
            row.reused = row.like.reused
        elif self.kept is not None:
            while self.cache.stats.num_free < needed and self.kept.give_back():
                pass
            assert row.content is not None
            found = self.kept.find(row.content.tokens[: row.first]) if _takes_over(request) else None
            if found is not None:
                row.sequences = (self.cache.branch(*found, row.end),)
                row.reused = found[1]
                self.stats.reused_tokens += row.reused

    def _drop(self, gone: Collection[int]) -> None:
        waiting = len(self.waiting)
        self.waiting = [entry for entry in self.waiting if entry[0] not in gone]
        if len(self.waiting) < waiting:
            heapq.heapify(self.waiting)
        running = [request for request in self.running.values() if request.number in gone]
        for request in running:
            self._leave(request)
        self.stats.cancelled += waiting - len(self.waiting) + len(running)

    def _leave(self, request: Request) -> None:
        del self.running[request.row]
        self._decoder(request.common).leave(request.row)

    def _like(self, request: Request) -> DecodingRow | None:
        """A running row whose first forward is the same and has not been taken; else this is the first."""
        row = request.row
        if not self.share_prompts or row.nfe > 0 or request.common.verifies:
            return None
        assert row.content is not None
        tokens = row.content.tokens.cpu().numpy().tobytes()
        key = (request.common, tokens, row.next_step(self.shift))
        first = self._firsts.setdefault(key, row)
        return None if first is row else first

    def _chosen(self, decoder: Decoder) -> Iterable[DecodingRow]:
        """The oldest row, and after it those whose queries fit in."""
        left = self.max_forward_tokens
        chosen: dict[DecodingRow, Step] = {}
        for row in decoder.rows:  # in order of submission, as they were admitted
            step = row.next_step(self.shift)
            tokens = 0 if row.like in chosen and row.nfe == 0 else step.queries[1] - step.queries[0]
            if not chosen or tokens <= left:
                chosen[row] = step
                left -= tokens
        return chosen

    def _take_turn(self, decoder: Decoder, rows: list[DecodingRow]) -> None:
        begun, shared = {row: row.nfe for row in rows}, decoder.shared
        try:
            decoder.turn(rows)
        except OutOfPages:
            if self.kept is not None and self.kept.give_back():
                return
            self._put_aside(max(self.running.values(), key=lambda request: request.number))
            return
        except BadLogits as error:
            self._fail(error.rows, error)
        except Exception as error:
            if self.together:
                raise
            self._fail(rows, error)
        rows = [row for row in rows if row in self.running]
        for row in rows:
            if self.kept is not None and begun[row] == 0 and row.nfe == 1 and _takes_over(self.running[row]):
                self.kept.keep(decoder.tokens[row.index, : row.first], row.sequences[0])
        self.stats.forwards += max((row.nfe - begun[row] for row in rows), default=1)
        self.stats.row_forwards += sum(row.nfe - begun[row] for row in rows)
        self.stats.shared_refreshes += decoder.shared - shared
        self._report(decoder, rows)

    def _put_aside(self, request: Request) -> None:
        decoder = self.decoders[request.common]
        decoder.put_aside(request.row)
        del self.running[request.row]
        self.stats.put_aside += 1
        nfe, progress = request.row.nfe, request.progress
        if request.every_commit and progress.reported > nfe:
            request.update(Update(nfe=nfe, seconds=request.seconds, restarted_at=nfe))
        progress.reported = min(progress.reported, nfe)
        self._add(request)

    def _fail(self, rows: Iterable[DecodingRow], error: Exception) -> None:
        for request in [self.running[row] for row in rows]:
            with suppress(Exception):  # a device that has failed cannot be tidied
                self._leave(request)
            self.running.pop(request.row, None)
            self.stats.failed += int(request.finish(error))

    def _report(self, decoder: Decoder, rows: Sequence[DecodingRow]) -> None:
        """Tells requests what has come of them, and lets those go that are finished."""
        requests = [self.running[row] for row in rows]
        watched = [request for request in requests if request.every_commit]
        since = [request.progress.reported for request in watched]
        found = commits_of(decoder, [request.row for request in watched], since)
        commits = dict(zip(watched, found, strict=True))
        news = [request for request in requests if request in commits or _has_settled(request)]
        if not news:
            return
        output = output_of(decoder, [request.row for request in news])
        for request, answer, confidence, steps in zip(
            news, output.answers(), output.confidence.tolist(), output.step_map.tolist(), strict=True
        ):
            row, progress, seconds = request.row, request.progress, request.seconds
            tokens: list[int] = answer.tolist()
            # One that was put aside may be behind what was final once, and comes to the same again.
            end = len(tokens) if row.done else max(min(len(tokens), _settled(row)), progress.settled)
            new = slice(progress.settled, end)
            if _has_settled(request):
                progress.blocks += [seconds] * ((row.block + int(row.done)) - len(progress.blocks))
            progress.settled, progress.reported = end, row.nfe
            request.update(
                Update(
                    tokens=tuple(tokens[new]),
                    confidence=tuple(confidence[new]),
                    steps=tuple(steps[new]),
                    nfe=row.nfe,
                    seconds=seconds,
                    commits=tuple(commits.get(request, ())),
                )
            )
            if row.done:
                try:
                    self._finish(request, tokens, confidence, steps, seconds)
                except Exception as error:  # of the tokenizer
                    self._fail([row], error)

    def _finish(
        self,
        request: Request,
        tokens: list[int],
        confidence: list[float],
        steps: list[int],
        seconds: float,
    ) -> None:
        row, blocks = request.row, request.progress.blocks
        stopped = tokens[-1] in request.common.geometry.eos_ids and not row.config.infill
        completion = Completion(
            prompt_length=row.first,
            tokens=tuple(tokens),
            confidence=tuple(confidence[: len(tokens)]),
            steps=tuple(steps[: len(tokens)]),
            finish_reason="stop" if stopped else "length",
            nfe=row.nfe,
            text=self.decode(tokens),
            queue_seconds=request.progress.admitted or 0.0,
            first_block_seconds=blocks[0],
            seconds=seconds,
            block_seconds=tuple(b - a for a, b in zip([0.0, *blocks], blocks, strict=False)),
        )
        self._leave(request)
        if not request.finish(completion):
            self.stats.cancelled += 1
            return
        stats = self.stats
        stats.finished += 1
        stats.prompt_tokens += row.first
        stats.tokens += len(tokens)
        stats.nfe += row.nfe
        stats.blocks += len(blocks)
        stats.queue_seconds += completion.queue_seconds
        stats.first_block_seconds += completion.first_block_seconds
        stats.request_seconds += seconds
        stats.block_seconds += blocks[-1]


def make_scheduler(
    model: nn.Module,
    *,
    num_pages: int,
    page_size: int,
    decode: Callable[[Sequence[int]], str | None],
    **settings: Any,
) -> Scheduler:
    """A scheduler with a cache of its own; ``settings`` are those of :class:`Scheduler`."""
    family = patched_family(model)
    shape, dtype, devices = place_of_keys(family.geometry(model), family.parts(model), patched_options(model))
    cache = PagedKVCache(*shape, num_pages=num_pages, page_size=page_size, dtype=dtype, device=devices)
    return Scheduler(model, cache, decode=decode, **settings)


def _takes_over(request: Request) -> bool:
    """Keys of its prompt are those of the prompt's tokens, and it has not been refreshed with an answer."""
    row, common = request.row, request.common
    return row.config.cache != "none" and not common.cfg_scale and not common.verifies and row.nfe <= 1


def _settled(row: DecodingRow) -> int:
    """Answer positions before the block that is being filled."""
    return row.blocks[row.block].begin - row.first


def _has_settled(request: Request) -> bool:
    return request.row.done or _settled(request.row) > request.progress.settled
