"""What only a real device can show: generations as on the CPU, more than 2^31 elements, CUDA graphs, streams.

Bodies that make sense elsewhere run there too: generation with plain instructions against the best of
the CPU, large tensors at a small size.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import pytest
import torch

import fastdllm_ext as fd
from backends import emulator, tensors
from calls import NAMES, arguments
from fastdllm_ext import _C, demo, ops
from fastdllm_ext.demo_tasks import held_out
from fastdllm_ext.ops import Row
from test_paged_attention import Case
from test_rope_write_kv import make
from test_unmask import MASK, Batch
from tiny import random_prompt, tiny_dream, tiny_llada

cuda = pytest.mark.cuda
needs_emulator = pytest.mark.skipif(emulator is None, reason="built without FASTDLLM_SIMT")

CACHES = ("none", "prefix", "dual")
RULES: tuple[dict[str, Any], ...] = (
    {"threshold": 0.2},
    {"steps": 24},
    {"factor": 1.0},
    {"steps": 24, "schedule": "linear", "remasking": "entropy", "alg_temp": 0.4},
    {"rule": "frechet:factor=1.5"},
    {"rule": "entropy_bound:bound=3"},
    {"rule": "hierarchical:threshold=0.3:low=0.1"},
    {"rule": "klass:threshold=0.1:kl=0.5:history=1"},
    {"rule": "credit:threshold=0.2"},
)
OTHERS: tuple[dict[str, Any], ...] = ({}, {"cfg_scale": 0.5}, {"refresh": 2, "window": (3, 5), "suffix": 9})


# --- Generations, token for token ------------------------------------------------------------------


def generate_on(where: str, build: Callable[[str], Any], prompts: list[torch.Tensor], **settings: Any) -> Any:
    """``where`` is a device, or an instruction set of the CPU."""
    device = "cuda" if where == "cuda" else "cpu"
    if device == "cpu":
        _C.set_cpu_isa(where)
    return fd.generate(build(device), [x.to(device) for x in prompts], **settings)


def assert_same_generation(found: Any, truth: Any) -> None:
    for name in ("sequences", "step_map", "nfe", "lengths"):
        assert torch.equal(getattr(found, name).cpu(), getattr(truth, name)), name
    torch.testing.assert_close(found.confidence.cpu(), truth.confidence, rtol=1e-3, atol=1e-6)


elsewhere = pytest.mark.parametrize("where", ["portable", pytest.param("cuda", marks=cuda)])


@elsewhere
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("rule", list(rule)[-1]))
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_tiny_model(where: str, family: str, cache: str, rule: dict[str, Any], temperature: float) -> None:
    """Unequal rows of a model with random weights and grouped heads."""
    rng = random.Random(CACHES.index(cache))
    prompts = [random_prompt(rng) for _ in range(4)]
    other = OTHERS[RULES.index(rule) % len(OTHERS)]
    settings = {
        "gen_length": [40, 17, 64, 1],
        "block_length": 16,
        "cache": cache,
        "temperature": temperature,
        "seed": 7,
        **rule,
        **({name: other[name] for name in other if name == "cfg_scale"} if cache == "none" else other),
    }

    def build(device: str) -> Any:
        model = tiny_dream(3) if family == "dream" else tiny_llada(3, n_kv_heads=2)
        return model.to(device)

    truth = generate_on(_C.cpu_isas()[-1], build, prompts, **settings)
    assert_same_generation(generate_on(where, build, prompts, **settings), truth)


@lru_cache
def demo_model(device: str) -> tuple:
    return fd.load(fd.demo_model_path(), dtype=torch.float32, device=device)


@elsewhere
@pytest.mark.parametrize("pages", ["auto", "fp8"])
@pytest.mark.parametrize("rule", [{"threshold": 0.99}, {"steps": 32}], ids=["threshold", "steps"])
@pytest.mark.parametrize("cache", CACHES)
def test_demo_model(where: str, cache: str, rule: dict[str, Any], pages: Any) -> None:
    tokenizer = demo_model("cpu")[1]
    prompts = [torch.tensor(tokenizer(problem.prompt)["input_ids"]) for problem in held_out(6, seed=3)]
    settings = {"gen_length": 64, "block_length": demo.BLOCK_LENGTH, "cache": cache, **rule}

    def build(device: str) -> Any:
        return fd.patch(demo_model(device)[0], kv_cache_dtype=pages)

    truth = generate_on(_C.cpu_isas()[-1], build, prompts, **settings)
    found = generate_on(where, build, prompts, **settings)
    # Only the tokens: it is so sure of them that rounding ranks their confidences.
    assert torch.equal(found.sequences.cpu(), truth.sequences)
    assert torch.equal(found.lengths.cpu(), truth.lengths)


# --- More than 2^31 elements -----------------------------------------------------------------------


class Place:
    """Operations on tensors that live on the device already."""

    def __init__(self, name: str) -> None:
        self.name, self.device = name, "cuda" if name == "cuda" else "cpu"

    def __call__(self, name: str, *args: Any) -> Any:
        library = torch.ops.fastdllm_simt if self.name == "simt" else ops
        return getattr(library, name)(*args)


def sizes(small: int, large: int) -> Callable:
    """The place, and a size: one that is quickly done, or one that takes int64 offsets."""
    values = [
        pytest.param(Place("cpu"), small, id="cpu"),
        pytest.param(Place("simt"), small, id="simt", marks=needs_emulator),
        pytest.param(Place("cuda"), large, id="cuda", marks=cuda),
    ]
    return pytest.mark.parametrize("place, size", values)


@pytest.fixture(autouse=True)
def memory_is_given_back() -> Iterator[None]:
    yield
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def zeros(place: Place, *shape: int, others: int = 0) -> torch.Tensor:
    """bfloat16 zeros; skips where the device has no room for them and so many others of their size."""
    bytes_needed = 2 * torch.Size(shape).numel() * (1 + others) + (1 << 30)
    if place.device == "cuda" and torch.cuda.mem_get_info()[0] < bytes_needed:
        pytest.skip(f"needs {bytes_needed / 2**30:.0f} GiB of free GPU memory")
    return torch.zeros(shape, dtype=torch.bfloat16, device=place.device)


PAGE = (2, 32, 128)
FAR = 2**31 // (2 * 32 * 128)  # the first page with offsets past 2^31
each_pool = sizes(40, FAR + 8)


@each_pool
def test_copy_pages_far_away(place: Place, size: int) -> None:
    pages = zeros(place, 2, size, *PAGE)
    pages[1, -1] = torch.randn(PAGE)
    pages[1, 2] = torch.randn(PAGE)
    last, near = pages[1, -1].clone(), pages[1, 2].clone()
    source, target = torch.tensor([[size - 1, 2], [0, size - 2]], device=place.device)
    place("copy_pages", pages, source, target)
    assert torch.equal(pages[1, 0], last)
    assert torch.equal(pages[1, -2], near)
    assert torch.equal(pages[1, -1], last)
    assert not pages[0, -2:].any()


@each_pool
def test_rope_write_kv_far_away(place: Place, size: int) -> None:
    args = [x.to(place.device) for x in make(50, head_dim=128, dtype=torch.bfloat16)]
    near = args[-1].shape[0]
    pools = [zeros(place, size, *PAGE, others=1 - i) for i in range(2)]
    wanted = place("rope_write_kv", *args)
    slots = torch.where(args[6] < 0, args[6], args[6] + (size - near) * PAGE[1])
    assert torch.equal(place("rope_write_kv", *args[:6], slots, *pools), wanted)
    for pool, small in zip(pools, args[-2:], strict=True):
        assert torch.equal(pool[-near:], small.nan_to_num())
        assert not pool[:-near].any()


@each_pool
def test_paged_attention_far_away(place: Place, size: int) -> None:
    case = Case.make([32, 5], [200, 61], head_dim=128, dtype=torch.bfloat16)
    q, k, v, table, *rest = [x.to(place.device) if isinstance(x, torch.Tensor) else x for x in case.args]
    pools = [zeros(place, size, *PAGE, others=1 - i) for i in range(2)]
    for pool, small in zip(pools, (k, v), strict=True):
        pool[-len(small) :] = small
    wanted = place("paged_attention", q, k, v, table, *rest)
    far = table + (size - len(k))
    assert torch.equal(place("paged_attention", q, *pools, far, *rest), wanted)


VOCAB = 126464


@sizes(30, 2**31 // VOCAB + 12)
def test_unmask_far_away(place: Place, size: int) -> None:
    """A sequence of 10 rows behind one of so many that their logits lie past 2^31."""
    few = Batch([10], vocab=VOCAB, dtype=torch.bfloat16, value=0.01)
    many = Batch([size - 10, 10], vocab=8, dtype=torch.bfloat16, value=0.01)
    logits = zeros(place, size, VOCAB)
    logits[-10:] = few.logits
    many.positions[-10:] = few.positions
    for name in ("tokens", "step_map", "confidence"):
        both, one = getattr(many, name), getattr(few, name)
        both[1, : one.shape[1]] = one[0]
    many.rows[1] = few.rows[0]
    many.rows[:, Row.STREAM] = 0
    alone, together = (
        [x.to(place.device) if isinstance(x, torch.Tensor) else x for x in batch.args]
        for batch in (few, many)
    )
    together[0] = logits
    place("unmask", *alone)
    place("unmask", *together)
    for index in (3, 4, 5):
        width = alone[index].shape[1]
        assert torch.equal(together[index][1, :width], alone[index][0])
    assert torch.equal(together[6][1], alone[6][0])
    assert int(together[6][0, Row.MASKS_LEFT]) == size - 10 - 1, (
        "all tie below the threshold: one is committed"
    )
    assert int((together[3][0] == MASK).sum()) == size - 10 - 1


HIDDEN = 4096


@sizes(9, 2**31 // HIDDEN + 3)
def test_norms_far_away(place: Place, size: int) -> None:
    x = zeros(place, size, HIDDEN, others=3)
    residual = torch.zeros_like(x)
    weight = torch.rand(HIDDEN, device=place.device).bfloat16()
    x[-2:] = torch.randn(2, HIDDEN)
    residual[-2:] = torch.randn(2, HIDDEN)
    few = residual[-2:].clone()
    wanted = place("rms_norm", x[-2:], weight, 1e-5)
    assert torch.equal(place("rms_norm", x, weight, 1e-5)[-2:], wanted)
    wanted = place("add_rms_norm", x[-2:], few, weight, 1e-5)
    assert torch.equal(place("add_rms_norm", x, residual, weight, 1e-5)[-2:], wanted)
    assert torch.equal(residual[-2:], few)
    wanted = place("silu_mul", x[-2:], few)
    assert torch.equal(place("silu_mul", x, residual)[-2:], wanted)
    for far, near in zip(place("quantize_fp8", x), place("quantize_fp8", x[-2:]), strict=True):
        assert torch.equal(far[-2:].float(), near.float())


# --- Graphs, streams, devices ----------------------------------------------------------------------

each_operation = pytest.mark.parametrize("name", NAMES)


def moved(args: Any, device: str = "cuda") -> list[Any]:
    return [x.to(device, copy=True) if isinstance(x, torch.Tensor) else x for x in args]


def eager(name: str, args: Any) -> list[torch.Tensor]:
    """Everything that the operation may write, and its result."""
    own = moved(args)
    out = getattr(ops, name)(*own)
    torch.cuda.synchronize()
    return tensors([*own, out])


def assert_same_bits(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a.cpu().contiguous().view(torch.uint8), b.cpu().contiguous().view(torch.uint8))


@cuda
@each_operation
def test_graph_replays_what_eager_gives(name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        first, second = arguments(name, dtype), arguments(name, dtype)
        wanted = [eager(name, args) for args in (first, second)]
        static = moved(first)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = getattr(ops, name)(*static)
        for args, truth in zip((first, second, first), (*wanted, wanted[0]), strict=True):
            for x, given in zip(tensors(static), tensors(args), strict=True):
                x.copy_(given)
            graph.replay()
            torch.cuda.synchronize()
            assert_same_bits(tensors([*static, out]), truth)


@cuda
@each_operation
def test_runs_on_the_current_stream(name: str) -> None:
    """The stream is kept busy before it gets the arguments: whoever runs elsewhere reads zeros."""
    args = arguments(name)
    wanted = eager(name, args)
    sources, late = moved(args), moved(args)
    for x in tensors(late):
        x.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for x, source in zip(tensors(late), tensors(sources), strict=True):
            x.copy_(source)
        out = getattr(ops, name)(*late)
        stream.synchronize()
    assert_same_bits(tensors([*late, out]), wanted)


@cuda
@each_operation
def test_runs_on_its_tensors_device(name: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    args = arguments(name)
    own = moved(args, "cuda:1")
    out = getattr(ops, name)(*own)
    assert torch.cuda.current_device() == 0
    assert all(x.device.index == 1 for x in tensors([*own, out]))
    assert_same_bits(tensors([*own, out]), eager(name, args))


@cuda
def test_tensors_of_two_devices_are_refused() -> None:
    x, weight = torch.rand(2, 8, device="cuda"), torch.rand(8)
    with pytest.raises(RuntimeError, match="rms_norm: weight is on another device"):
        ops.rms_norm(x, weight, 1e-5)
