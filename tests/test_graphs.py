"""Steps as graphs: the host's side with a device that only pretends, and the real one."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fastdllm_ext import _C, ops
from fastdllm_ext.ops import Row, Rule
from fastdllm_ext.runtime.graphs import (
    CudaGraphs,
    Rung,
    StepGraphs,
    batch_bucket,
    needs_host,
    page_bucket,
)
from test_unmask import EOS, MASK, Batch

FIRST = 5  # where the answers of a Batch begin
STATE = ("tokens", "step_map", "confidence", "rows")
INPUTS = (*STATE, "logits")


class Step:
    """Tokens -> "keys", stored in pages that nobody loads; attention of a kind; a head; `unmask`."""

    def __init__(self, batch: Batch, device: str = "cpu") -> None:
        self.fixed = {
            name: getattr(batch, name).to(device)
            for name in ("cu_rows", "positions", "knobs", "quotas", "eos_ids")
        }
        for name in INPUTS:
            setattr(self, name, torch.empty_like(getattr(batch, name), device=device))
        noise = torch.Generator().manual_seed(5)
        vocab = batch.logits.shape[1]
        self.embedding = torch.randn((vocab, 8), generator=noise).to(device)
        self.head = torch.randn((8, vocab), generator=noise).to(device)
        self.pages = torch.randn((*batch.tokens.shape, 8), generator=noise).to(device)

    tokens: torch.Tensor
    step_map: torch.Tensor
    confidence: torch.Tensor
    rows: torch.Tensor
    logits: torch.Tensor

    def load(self, batch: Batch) -> None:
        for name in INPUTS:
            getattr(self, name).copy_(getattr(batch, name))

    def __call__(self) -> None:
        keys = self.embedding[self.tokens[:, FIRST:]]
        self.pages[:, FIRST:] = keys
        hidden = keys + self.pages.mean(dim=1, keepdim=True)
        logits = self.logits + (hidden @ self.head).flatten(0, 1)
        ops.unmask(
            logits, self.fixed["cu_rows"], self.fixed["positions"], self.tokens, self.step_map,
            self.confidence, self.rows, self.fixed["knobs"], self.fixed["quotas"], self.fixed["eos_ids"],
            MASK,
        )  # fmt: skip

    def result(self) -> list[torch.Tensor]:
        return [getattr(self, name).cpu() for name in (*STATE, "pages")]


def make_batch(masks: list[int], **settings: Any) -> Batch:
    """All positions are given; each step fills one mask of each row, but for what ``settings`` say."""
    quota = {"rule": Rule.QUOTA, "quotas": [1]}
    return Batch(masks, vocab=80, **(quota | settings)).with_all_positions().finite()


def take_steps(step: Step, cap: int) -> int:
    for taken in range(1, cap + 1):
        step()
        if needs_host(step.rows):
            return taken
    return cap


def by_hand(batch: Batch, cap: int = 1000, device: str = "cpu") -> tuple[list[torch.Tensor], int]:
    """What is to come out, and of how many steps."""
    step = Step(batch, device)
    step.load(batch)
    taken = take_steps(step, cap)
    return step.result(), taken


def assert_same_bits(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


class Pretended:
    """A device on which graphs are the steps themselves. It keeps a diary, and fails where it is told to."""

    def __init__(self, **failures: BaseException) -> None:
        self.failures, self.diary, self.open = failures, [], 0
        self.steps_before_failure = 0

    failures: dict[str, BaseException]
    diary: list[str]

    def note(self, what: str) -> None:
        self.diary.append(what)
        if what in self.failures:
            raise self.failures[what]

    def warm_up(self, step: Step) -> None:
        self.note("warm_up")
        step()

    def capture(self, step: Step) -> Recorded:
        self.note("capture")
        return Recorded(self, step)

    def block_loop(self, captured: Recorded, rows: torch.Tensor, cap: int) -> Repeated:
        self.note("block_loop")
        assert rows is captured.step.rows
        return Repeated(self, captured.step, cap)


class Recorded:
    def __init__(self, device: Pretended, step: Step) -> None:
        self.device, self.step = device, step
        device.open += 1

    def replay(self) -> None:
        self.device.note("replay")
        self.step()

    def close(self) -> None:
        self.device.open -= 1


class Repeated(Recorded):
    def __init__(self, device: Pretended, step: Step, cap: int) -> None:
        super().__init__(device, step)
        self.cap = cap

    def launch(self) -> int:
        for _ in range(self.device.steps_before_failure):
            self.step()
        self.device.note("launch")
        return take_steps(self.step, self.cap)


class Shop:
    """StepGraphs with a pretended device, whose diary also has the loads."""

    def __init__(self, *, first: Rung = Rung.BLOCK, capacity: int = 8, **failures: BaseException) -> None:
        self.device = Pretended(**failures)
        self.graphs: StepGraphs[Step] = StepGraphs(self.device, capacity=capacity, first=first)

    def run(self, batch: Batch, key: str = "a", cap: int = 1000) -> tuple[list[torch.Tensor], int, Rung]:
        def load(step: Step) -> None:
            self.device.note("load")
            step.load(batch)

        def make() -> Step:
            self.device.note("make")
            return Step(batch)

        taken = self.graphs.run(key, make, load, cap)
        return taken.step.result(), taken.iterations, taken.rung

    def page(self) -> list[str]:
        """The diary since the last look."""
        written, self.device.diary = self.device.diary, []
        return written


@pytest.fixture(autouse=True)
def no_warning_goes_unseen() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastdllm_ext:")
        yield


# --- The rungs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rung", Rung)
@pytest.mark.parametrize("masks", [[6], [9, 4, 11]], ids=str)
def test_every_rung_does_the_same(rung: Rung, masks: list[int]) -> None:
    """Block after block through the same step: what the one before left in it does not matter."""
    shop = Shop(first=rung)
    for more in range(3):
        batch = make_batch([n + more for n in masks])
        wanted, steps = by_hand(batch)
        found, iterations, on = shop.run(batch, key=str(more))
        assert_same_bits(found, wanted)
        assert (iterations, on) == (steps, rung)
        assert steps == min(masks) + more
        again = make_batch([n + more for n in masks])
        assert_same_bits(shop.run(again, key=str(more))[0], by_hand(again)[0])


def test_inputs_are_loaded_again_after_the_warm_up() -> None:
    shop, batch = Shop(), make_batch([5, 5])
    shop.run(batch)
    assert shop.page() == ["make", "load", "warm_up", "capture", "block_loop", "load", "launch"]
    shop.run(batch)
    assert shop.page() == ["load", "launch"]
    shop = Shop(first=Rung.REPLAY)
    shop.run(batch)
    assert shop.page() == ["make", "load", "warm_up", "capture", "load", *["replay"] * 5]
    shop = Shop(first=Rung.EAGER)
    shop.run(batch)
    assert shop.page() == ["make", "load"]


def test_another_cap_is_another_loop_of_the_same_capture() -> None:
    shop, batch = Shop(), make_batch([5])
    for cap, wanted in [(3, 3), (3, 3), (4, 4), (9, 5)]:
        found, iterations, _ = shop.run(batch, cap=cap)
        assert iterations == wanted
        assert_same_bits(found, by_hand(batch, cap)[0])
    assert shop.page().count("block_loop") == 3
    assert shop.device.open == 2, "one capture and one loop"


@pytest.mark.parametrize("rung", Rung)
def test_the_cap_holds(rung: Rung) -> None:
    found, iterations, _ = Shop(first=rung).run(make_batch([9, 7]), cap=2)
    assert iterations == 2
    assert found[3][:, Row.MASKS_LEFT].tolist() == [7, 5]


@pytest.mark.parametrize("rung", Rung)
def test_the_host_is_needed_for_the_end_of_a_row(rung: Rung) -> None:
    batch = make_batch([6, 6])
    batch.logits[:, EOS] = 90.0  # the first position in order that is filled finishes the row
    _, iterations, _ = Shop(first=rung).run(batch)
    assert 1 <= iterations < 6
    batch = make_batch([6, 6])
    where = int((batch.tokens[1] == MASK).nonzero()[0])
    batch.logits[len(batch.logits) // 2 + where - FIRST, 20] = torch.nan
    found, iterations, _ = Shop(first=rung).run(batch)
    assert iterations == 1
    assert found[3][:, Row.BAD_LOGITS].tolist() == [0, 1]


@pytest.mark.parametrize("rung", Rung)
def test_rows_that_fill_up_a_batch_stop_nothing(rung: Rung) -> None:
    batch = make_batch([4, 3, 3])
    batch.tokens[1] = 20
    batch.rows[1, Row.MASKS_LEFT] = 1
    before = batch.rows[1].clone()
    found, iterations, _ = Shop(first=rung).run(batch)
    assert iterations == 3
    assert torch.equal(found[3][1], before)


# --- The cache -------------------------------------------------------------------------------------


def test_the_least_recently_used_step_goes_first() -> None:
    shop, batch = Shop(capacity=2), make_batch([3])
    for key in "abac":
        shop.run(batch, key)
    assert (len(shop.graphs), shop.device.open) == (2, 4), "a capture and a loop each"
    shop.page()
    for key, is_kept in [("a", True), ("c", True), ("b", False), ("c", True), ("a", False)]:
        shop.run(batch, key)
        assert ("capture" not in shop.page()) == is_kept, key
    shop.graphs.clear()
    assert (len(shop.graphs), shop.device.open) == (0, 0)


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="capacity 0"):
        Shop(capacity=0)
    with pytest.raises(ValueError, match="steps_cap 0"):
        Shop().run(make_batch([3]), cap=0)


# --- What fails ------------------------------------------------------------------------------------

LADDER: list[tuple[dict[str, BaseException], Rung, list[str], str]] = [
    (
        {"block_loop": RuntimeError("BlockLoop: 1 x record of an event\nmore")},
        Rung.REPLAY,
        ["make", "load", "warm_up", "capture", "block_loop", "load", *["replay"] * 3],
        "a block takes one launch a step instead of one in all: BlockLoop: 1 x record of an event$",
    ),
    (
        {"launch": RuntimeError("BlockLoop: launch")},
        Rung.REPLAY,
        ["make", "load", "warm_up", "capture", "block_loop", "load", "launch", "load", *["replay"] * 3],
        "a block takes one launch a step instead of one in all: BlockLoop: launch$",
    ),
    (
        {"capture": RuntimeError("not permitted")},
        Rung.EAGER,
        ["make", "load", "warm_up", "capture", "load"],
        "steps run without CUDA graphs: not permitted$",
    ),
    (
        {"block_loop": RuntimeError("too old"), "replay": torch.OutOfMemoryError("out of memory")},
        Rung.EAGER,
        ["make", "load", "warm_up", "capture", "block_loop", "load", "replay", "load"],
        "steps run without CUDA graphs: too old; out of memory$",
    ),
]


@pytest.mark.parametrize("failures, rung, diary, text", LADDER, ids=["loop", "launch", "capture", "replay"])
@pytest.mark.parametrize("before", [0, 2])
def test_the_next_rung_is_taken(failures: dict, rung: Rung, diary: list[str], text: str, before: int) -> None:
    """Also where the failing launch has taken steps before; one warning in all, and no second attempt."""
    shop, batch = Shop(capacity=1, **failures), make_batch([3, 4])
    shop.device.steps_before_failure = before
    wanted, steps = by_hand(batch)
    with pytest.warns(RuntimeWarning, match="fastdllm_ext: " + text) as caught:
        found, iterations, on = shop.run(batch)
    assert len([w for w in caught if "fastdllm_ext" in str(w.message)]) == 1
    assert shop.page() == diary
    assert (iterations, on) == (steps, rung)
    assert_same_bits(found, wanted)
    assert shop.device.open == (1 if rung == Rung.REPLAY else 0)

    shop.page()
    assert shop.run(batch)[2] == rung
    assert not set(shop.page()) & {"warm_up", "capture", "block_loop", "launch"}
    assert shop.run(batch, "other")[2] == rung, "which is told by no second warning"
    shop.page()
    assert_same_bits(shop.run(batch)[0], wanted)
    page = shop.page()
    assert "make" in page
    assert not {"block_loop", "launch"} & set(page), "evicted, but its rung is remembered"


@pytest.mark.parametrize("failing", ["make", "load", "warm_up", "capture", "block_loop", "launch"])
def test_other_exceptions_leave_nothing_half_made(failing: str) -> None:
    shop, batch = Shop(), make_batch([3])
    shop.run(batch, "kept")
    shop.device.failures[failing] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        shop.run(batch)
    assert (len(shop.graphs), shop.device.open) == (1, 2)
    shop.device.failures.clear()
    found, _, rung = shop.run(batch)
    assert_same_bits(found, by_hand(batch)[0])
    assert rung == Rung.BLOCK


def test_what_the_step_itself_raises_is_passed_on() -> None:
    class Broken(Step):
        def __call__(self) -> None:
            raise RuntimeError("no such thing")

    batch, device = make_batch([3]), Pretended()
    graphs: StepGraphs[Step] = StepGraphs(device)
    with pytest.raises(RuntimeError, match="no such thing"):
        graphs.run("a", lambda: Broken(batch), lambda step: step.load(batch), 9)
    assert (len(graphs), device.open) == (0, 0)
    taken = graphs.run("a", lambda: Step(batch), lambda step: step.load(batch), 9)
    assert taken.rung == Rung.BLOCK, "that was no fault of the rung"


# --- Shapes ----------------------------------------------------------------------------------------


def test_batch_bucket() -> None:
    assert [batch_bucket(n) for n in (1, 2, 3, 4, 5, 8, 9, 64, 65)] == [1, 2, 4, 4, 8, 8, 16, 64, 128]
    with pytest.raises(ValueError, match="count 0"):
        batch_bucket(0)


def test_page_bucket() -> None:
    found = [page_bucket(n) for n in range(1, 5000)]
    assert found[:8] == list(range(1, 9))
    for n, size in enumerate(found, start=1):
        assert n <= size < 1.25 * n or n == size
        assert page_bucket(size) == size
    assert len({page_bucket(n) for n in range(16, 129)}) == 13
    with pytest.raises(ValueError, match="pages 0"):
        page_bucket(0)


# --- The real device -------------------------------------------------------------------------------

cuda = pytest.mark.cuda


def run_on_gpu(
    graphs: StepGraphs[Any], batch: Batch, make: Callable[[], Any] | None = None, key: Any = 0
) -> Any:
    make = make or (lambda: Step(batch, "cuda"))
    return graphs.run(key, make, lambda step: step.load(batch), 1000)


@cuda
@pytest.mark.parametrize("rung", Rung)
def test_gpu_every_rung_gives_the_bits_of_plain_calls(rung: Rung) -> None:
    graphs: StepGraphs[Step] = StepGraphs(CudaGraphs(), first=rung)
    settings: list[dict[str, Any]] = [{}, {"rule": Rule.THRESHOLD, "value": 0.3, "temperature": 0.7}]
    for _, (key, setting) in itertools.product(range(3), enumerate(settings)):
        batch = make_batch([9, 4, 11], **setting)
        wanted, steps = by_hand(batch, device="cuda")
        taken = run_on_gpu(graphs, batch, key=key)
        assert (taken.iterations, taken.rung) == (steps, rung)
        assert_same_bits(taken.step.result(), wanted)


@cuda
def test_gpu_iterations() -> None:
    graphs: StepGraphs[Step] = StepGraphs(CudaGraphs())
    for count in (7, 8, 9, 7):
        batch = make_batch([count, 12])
        taken = run_on_gpu(graphs, batch)
        assert (taken.iterations, taken.rung) == (count, Rung.BLOCK)
        assert taken.step.rows[:, Row.MASKS_LEFT].tolist() == [0, 12 - count]


@cuda
def test_gpu_loop_itself() -> None:
    """Launches one after another, on a stream of the caller; the counter begins at 0 each time."""
    batch = make_batch([9, 9])
    step = Step(batch, "cuda")
    step.load(batch)
    device = CudaGraphs()
    device.warm_up(step)
    captured: Any = device.capture(step)
    iterations = torch.full((), 99, device="cuda")
    loop = _C.BlockLoop(
        captured.graph.raw_cuda_graph(), step.rows.data_ptr(), 2, iterations.data_ptr(), cap=4
    )
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step.load(batch)
        for left, wanted in [(5, 4), (1, 4), (0, 1), (0, 1)]:
            loop.launch(stream.cuda_stream)
            assert step.rows[:, Row.MASKS_LEFT].tolist() == [left, left]
            assert int(iterations) == wanted


@cuda
def test_gpu_nodes_that_do_not_fit_are_named() -> None:
    event = torch.cuda.Event(external=True)

    class WithEvent(Step):
        def __call__(self) -> None:
            super().__call__()
            event.record()

    batch = make_batch([5])
    wanted, steps = by_hand(batch, device="cuda")
    with pytest.warns(RuntimeWarning, match="1 x record of an event"):
        taken = run_on_gpu(StepGraphs(CudaGraphs()), batch, lambda: WithEvent(batch, "cuda"))
    assert (taken.iterations, taken.rung) == (steps, Rung.REPLAY)
    assert_same_bits(taken.step.result(), wanted)


@cuda
def test_gpu_a_failed_capture_does_no_harm() -> None:
    class Waits(Step):
        def __call__(self) -> None:
            super().__call__()
            self.rows.sum().item()

    batch = make_batch([5])
    wanted, steps = by_hand(batch, device="cuda")
    graphs: StepGraphs[Step] = StepGraphs(CudaGraphs())
    run_on_gpu(graphs, batch, key="before")
    current = torch.cuda.current_stream()
    with pytest.warns(RuntimeWarning, match="steps run without CUDA graphs: .*captur"):
        taken = run_on_gpu(graphs, batch, lambda: Waits(batch, "cuda"), key="waits")
    assert (taken.iterations, taken.rung) == (steps, Rung.EAGER)
    assert_same_bits(taken.step.result(), wanted)
    assert torch.cuda.current_stream() == current
    assert torch.rand(5, device="cuda").isfinite().all(), "torch's generators are not taken to be captured"
    for key in ("before", "after"):
        taken = run_on_gpu(graphs, batch, key=key)
        assert taken.rung == Rung.BLOCK
        assert_same_bits(taken.step.result(), wanted)


@cuda
def test_gpu_all_graphs_may_go_and_others_come() -> None:
    device = CudaGraphs()
    graphs: StepGraphs[Step] = StepGraphs(device, capacity=1)
    batch = make_batch([5])
    wanted, _ = by_hand(batch, device="cuda")
    for key in range(3):
        assert_same_bits(run_on_gpu(graphs, batch, key=key).step.result(), wanted)
        if key == 1:
            graphs.clear()
