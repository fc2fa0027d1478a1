"""Steps of fixed shapes as CUDA graphs: a whole block in one launch, or a launch a step, or plain calls.

A *step* is one forward and `unmask` on tensors that stay where they are. :class:`StepGraphs` records each
shape once and runs a block with it, as quickly as the device allows.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from fastdllm_ext import _C
from fastdllm_ext.ops import Row

__all__ = [
    "Captured",
    "CudaGraphs",
    "GraphDevice",
    "Loop",
    "Rung",
    "StaticStep",
    "StepGraphs",
    "Taken",
    "batch_bucket",
    "needs_host",
    "page_bucket",
]


class StaticStep(Protocol):
    """One step of a block, on tensors of its own.

    A call is work on the device alone: no tensor is read by the host, every shape and address is the same
    each time, and so is every number that the host puts into a kernel's arguments. Random numbers come from
    `unmask`, whose counters are on the device, and not from torch's generators. Results are in tensors that
    existed before the call; what it allocates is gone, or overwritten by other graphs, after it.

    Attributes:
        rows: [B, len(Row)] int64 contiguous, the states that `unmask` advances. A row that only fills up the
            batch holds no mask in its tokens and 1 in ``Row.MASKS_LEFT``: it is left alone and stops nothing.
    """

    rows: Tensor

    def __call__(self) -> None:
        """Takes the step."""


StepT = TypeVar("StepT", bound=StaticStep)


class Captured(Protocol):
    """A recorded step."""

    def replay(self) -> None:
        """Takes the step once."""

    def close(self) -> None:
        """Gives back what it holds; nothing of it is running."""


class Loop(Protocol):
    """A recorded step that repeats itself."""

    def launch(self) -> int:
        """Takes steps until a row needs the host; waits for them, and returns how many."""

    def close(self) -> None:
        """Gives back what it holds; nothing of it is running."""


class GraphDevice(Protocol):
    """What :class:`StepGraphs` asks of a device. What cannot be done is a RuntimeError that says why."""

    def warm_up(self, step: StaticStep) -> None:
        """Takes the step once, for all that happens in a first call only."""

    def capture(self, step: StaticStep) -> Captured:
        """Records the step without taking it. Where that fails, the device is as it was."""

    def block_loop(self, captured: Captured, rows: Tensor, cap: int) -> Loop:
        """At least one and at most ``cap`` steps, until one of the ``rows`` needs the host."""


class Rung(IntEnum):
    """How blocks are run, the quickest first.

    Attributes:
        BLOCK: one launch a block; the device decides when it is over.
        REPLAY: one launch a step; the host reads the rows after each.
        EAGER: calls of the step; likewise.
    """

    BLOCK = 0
    REPLAY = 1
    EAGER = 2


_INSTEAD = {
    Rung.REPLAY: "a block takes one launch a step instead of one in all",
    Rung.EAGER: "steps run without CUDA graphs",
}


def needs_host(rows: Tensor) -> bool:
    """Whether a row has filled its block, met its EOS or had bad logits (csrc/cuda/block_condition.h)."""
    state = rows.cpu()
    stops = (state[:, Row.MASKS_LEFT] <= 0) | (state[:, Row.EOS_AT] >= 0) | (state[:, Row.BAD_LOGITS] != 0)
    return bool(stops.any())


class Taken(NamedTuple, Generic[StepT]):
    """What a run did.

    Attributes:
        step: the step that ran, with its results.
        iterations: how often.
        rung: in which way.
    """

    step: StepT
    iterations: int
    rung: Rung


@dataclass
class _Entry(Generic[StepT]):
    """A step, and what was made of it so far."""

    step: StepT
    rung: Rung
    captured: Captured | None = None
    loop: Loop | None = None
    cap: int = 0  # of the loop

    def close_loop(self) -> None:
        loop, self.loop = self.loop, None
        if loop is not None:
            loop.close()

    def close(self) -> None:
        self.close_loop()
        captured, self.captured = self.captured, None
        if captured is not None:
            captured.close()


class StepGraphs(Generic[StepT]):
    """Captured steps, the least recently used of which go first. One for a model, or the like.

    Where a block cannot be one launch, or a step not one graph, the next rung is taken, for that key and from
    then on; one RuntimeWarning in all says why.

    Args:
        device: what captures and launches.
        capacity: how many steps are kept.
        first: the rung to begin with.

    Attributes:
        lock: to be held from :meth:`run` until its step's results are taken up.
    """

    def __init__(self, device: GraphDevice, *, capacity: int = 8, first: Rung = Rung.BLOCK) -> None:
        if capacity < 1:
            raise ValueError(f"capacity {capacity}; takes 1 or more")
        self._device, self._capacity, self._first = device, capacity, first
        self._entries: OrderedDict[Hashable, _Entry[StepT]] = OrderedDict()
        self._rungs: dict[Hashable, Rung] = {}  # of keys that had to leave the first, evicted or not
        self._warned = False
        self.lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def run(
        self,
        key: Hashable,
        make_step: Callable[[], StepT],
        load: Callable[[StepT], None],
        steps_cap: int,
    ) -> Taken[StepT]:
        """Takes steps of a block until a row needs the host (:func:`needs_host`), at least one.

        Args:
            key: all that a captured step has built in: shapes, addresses, numbers.
            make_step: makes the step, where the key has none.
            load: copies the inputs into the step's tensors. It may be called more than once.
            steps_cap: the most steps to take.

        An exception of the step itself, or of ``load``, is passed on; the key's step is then forgotten.
        """
        if steps_cap < 1:
            raise ValueError(f"steps_cap {steps_cap}; takes 1 or more")
        # Out of the cache until it is done: an exception leaves nothing half made in it.
        entry = self._entries.pop(key, None)
        if entry is None:
            entry = _Entry(make_step(), self._rungs.get(key, self._first))
        causes: list[str] = []
        try:
            while True:
                load(entry.step)
                try:
                    if self._prepare(entry, steps_cap):
                        continue  # with the inputs loaded again
                    iterations = self._take_steps(entry, steps_cap)
                    break
                except RuntimeError as error:
                    if entry.rung == Rung.EAGER:
                        raise
                    causes.append((str(error).strip().splitlines() or [type(error).__name__])[0])
                    self._leave_rung(entry)
        except BaseException:
            entry.close()
            raise
        self._entries[key] = entry
        if causes:
            self._rungs[key] = entry.rung
            self._warn(entry.rung, causes)
        while len(self._entries) > self._capacity:
            self._entries.popitem(last=False)[1].close()
        return Taken(entry.step, iterations, entry.rung)

    def clear(self) -> None:
        """Forgets all steps."""
        while self._entries:
            self._entries.popitem()[1].close()

    def _prepare(self, entry: _Entry[StepT], cap: int) -> bool:
        """Makes what the entry's rung needs. True where that took the step, so that its state is spoilt.

        Loading the inputs again undoes a warm-up. What a step commits and counts is in tensors that are
        loaded. The keys and values that it stores are those of its own queries; in each layer every step
        stores all of them, in the same slots, before anything attends to them. So what the warm-up has left
        in the pages is overwritten by the first real step before it is read. The same holds where a rung
        fails after some steps and the next one begins anew.
        """
        if entry.rung == Rung.EAGER:
            return False
        spoilt = entry.captured is None
        if entry.captured is None:
            self._device.warm_up(entry.step)
            entry.captured = self._device.capture(entry.step)
        if entry.rung == Rung.BLOCK and (entry.loop is None or entry.cap != cap):
            entry.close_loop()
            entry.loop, entry.cap = self._device.block_loop(entry.captured, entry.step.rows, cap), cap
        return spoilt

    def _take_steps(self, entry: _Entry[StepT], cap: int) -> int:
        if entry.loop is not None:
            return entry.loop.launch()
        take = entry.step if entry.captured is None else entry.captured.replay
        for taken in range(1, cap + 1):
            take()
            if needs_host(entry.step.rows):
                return taken
        return cap

    def _leave_rung(self, entry: _Entry[StepT]) -> None:
        """A step that was captured can at least be replayed."""
        entry.close_loop()
        if entry.rung == Rung.BLOCK and entry.captured is not None:
            entry.rung = Rung.REPLAY
        else:
            entry.close()
            entry.rung = Rung.EAGER

    def _warn(self, rung: Rung, causes: list[str]) -> None:
        if self._warned:
            return
        self._warned = True
        warnings.warn(f"fastdllm_ext: {_INSTEAD[rung]}: {'; '.join(causes)}", RuntimeWarning, stacklevel=3)


# --- The device ------------------------------------------------------------------------------------


class CudaGraphs:
    """:class:`GraphDevice` on a CUDA device. Importing and constructing it needs none.

    The graphs share one memory pool, so what steps allocate on their way lies in the same place for all of
    them: two of them must not run at a time.
    """

    def __init__(self, device: torch.device | str = "cuda") -> None:
        self.device = torch.device(device)
        self._stream: Any = None
        self._pool: Any = None
        self._open = 0  # graphs that use the pool

    def warm_up(self, step: StaticStep) -> None:
        """On the stream of the captures, so that libraries find their workspaces made."""
        with self._aside():
            step()

    def capture(self, step: StaticStep) -> Captured:
        """Of this thread's calls alone; others go on with their own work."""
        if self._open == 0:  # a pool that its last graph has left cannot be entered again
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        cause: Exception | None = None
        try:
            with self._aside():  # torch's own guard does not leave its stream where the capture fails
                recording = torch.cuda.graph(
                    graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                )
                with recording:
                    try:
                        step()
                    except Exception as error:
                        cause = error  # the end of the capture fails with an error of its own
                        raise
        except BaseException:
            self._recover()
            if cause is not None:
                raise cause from None
            raise
        self._open += 1
        return _CudaCaptured(graph, self)

    def block_loop(self, captured: Captured, rows: Tensor, cap: int) -> Loop:
        """The step as the body of a WHILE node (csrc/cuda/block_loop.h)."""
        assert isinstance(captured, _CudaCaptured)
        with torch.cuda.device(self.device):
            return _CudaLoop(captured, rows, cap)

    def _recover(self) -> None:
        """After a failed capture, which torch's allocator and its generators may take to be still under way.

        No other is let into the pool, and random numbers are refused. The first is ended by hand; the second
        ends with the next capture, and so one is made that cannot fail.
        """
        with torch.cuda.device(self.device):
            with suppress(Exception):
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
            self._pool = torch.cuda.graph_pool_handle()
            with suppress(RuntimeError), self._aside():
                torch.cuda.synchronize()
                number = torch.zeros(1, device="cuda")
                with torch.cuda.graph(
                    torch.cuda.CUDAGraph(), stream=self._stream, capture_error_mode="thread_local"
                ):
                    number.zero_()

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """On a stream of its own: after what the current one has been given, before what it is given next."""
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            if self._stream is None:
                self._stream = torch.cuda.Stream()
            self._stream.wait_stream(current)
            try:
                with torch.cuda.stream(self._stream):
                    yield
            finally:
                current.wait_stream(self._stream)


class _CudaCaptured:
    def __init__(self, graph: torch.cuda.CUDAGraph, owner: CudaGraphs) -> None:
        self.graph, self._owner = graph, owner

    def replay(self) -> None:
        self.graph.replay()

    def close(self) -> None:
        self.graph.reset()
        self._owner._open -= 1


class _CudaLoop:
    def __init__(self, captured: _CudaCaptured, rows: Tensor, cap: int) -> None:
        if rows.dtype != torch.int64 or rows.shape[1:] != (len(Row),) or not rows.is_contiguous():
            raise ValueError(f"rows: takes contiguous int64 [B, {len(Row)}], not {rows.dtype} {rows.shape}")
        self._rows, self._captured = rows, captured  # the graph's nodes point at the memory of both
        self._iterations = torch.zeros((), dtype=torch.int64, device=rows.device)
        step = int(captured.graph.raw_cuda_graph())
        self._loop: Any = _C.BlockLoop(step, rows.data_ptr(), len(rows), self._iterations.data_ptr(), cap)

    def launch(self) -> int:
        self._loop.launch(torch.cuda.current_stream(self._rows.device).cuda_stream)
        return int(self._iterations)  # the block's one wait for the device

    def close(self) -> None:
        self._loop = None


# --- Shapes ----------------------------------------------------------------------------------------


def batch_bucket(count: int) -> int:
    """Rows of the step that ``count`` rows run in: the next power of two.

    A step of few rows takes the time of reading the weights, whatever their number; of many rows, those that
    fill up are less than half. Sizes are few, and so are the graphs.
    """
    _check_positive("count", count)
    return 1 << (count - 1).bit_length()


def page_bucket(pages: int) -> int:
    """Columns of the block table of the step that ``pages`` pages run in: 1 to 8, 10, 12, 14, 16, 20, 24, ...

    Four sizes for each doubling: less than a quarter is unused, and a context that grows from 512 to 4,096
    positions of 32 a page meets 13 sizes. Unused columns cost no bytes, since attention reads as many keys as
    the device says; they only make the launch larger.
    """
    _check_positive("pages", pages)
    shift = max(0, pages.bit_length() - 3)
    return -(-pages >> shift) << shift


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} {value}; takes 1 or more")
