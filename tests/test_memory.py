"""What a generation allocates (docs/memory.md), and that nothing of it stays.

Two measures. `Watch` sees every tensor that an operation returns, with its shape. torch's profiler sees what
the allocator gives out, and so also what operations allocate inside themselves: the scratch of ours, and
torch's workspace for matrix products in bfloat16, which is not in the formula.
"""

from __future__ import annotations

import ctypes
import gc
import random
import re
import resource
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastdllm_ext as fd
from fastdllm_ext.decoder import BadLogits
from fastdllm_ext.models import DreamConfig, DreamModel, LLaDAConfig, LLaDAModelLM
from fastdllm_ext.rope import rope_table
from fastdllm_ext.rules import RULES
from fastdllm_ext.runtime import fused
from tiny import MASK, tiny_dream, tiny_llada

FAMILIES = ("llada", "dream")
CACHES = ("none", "prefix", "dual")
VOCAB = 4001  # told apart from every other size
STATM = Path("/proc/self/statm")


def model_of(family: str, dtype: torch.dtype = torch.float32, inner: int = 192) -> Any:
    """Small, but with rows long enough and a vocabulary large enough that each term of the formula shows."""
    if family == "llada":
        return tiny_llada(
            dtype=dtype, d_model=64, mlp_hidden_size=inner, vocab_size=VOCAB, embedding_size=VOCAB,
            max_sequence_length=2048,
        )  # fmt: skip
    return tiny_dream(
        dtype=dtype, hidden_size=64, intermediate_size=inner, vocab_size=VOCAB, max_position_embeddings=2048
    )


def prompts_of(*lengths: int) -> list[Tensor]:
    return [torch.randint(2, MASK, (length,)) for length in lengths]


class Watch(TorchDispatchMode):
    """Storages that operations make while it is on.

    Attributes:
        now, peak: bytes of those that are alive, and the most there ever were.
        largest: bytes of the largest.
        logits: rows of each tensor that is as wide as the vocabulary.
        logits_alive, most_logits: how many of those are alive, and the most that ever were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.now = self.peak = self.largest = self.logits_alive = self.most_logits = 0
        self.logits: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage_of(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and storage_of(x) not in given | self.known:
                self.add(x)
        return out

    def add(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        wide = x.dim() > 1 and x.shape[-1] == VOCAB
        self.known.add(storage_of(x))
        self.now += storage.nbytes()
        self.peak, self.largest = max(self.peak, self.now), max(self.largest, storage.nbytes())
        if wide:
            self.logits.append(x.numel() // VOCAB)
            self.logits_alive += 1
            self.most_logits = max(self.most_logits, self.logits_alive)
        weakref.finalize(storage, self.remove, storage_of(x), storage.nbytes(), wide)

    def remove(self, storage: int, count: int, wide: bool) -> None:
        self.known.discard(storage)
        self.now -= count
        self.logits_alive -= wide


def storage_of(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def allocated(work: Callable[[], object]) -> tuple[int, int]:
    """(most bytes allocated at once, bytes still allocated afterwards), as torch's CPU allocator counts."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak, now


# --- Logits ----------------------------------------------------------------------------------------


def masks_by_turn(step_map: Tensor, lengths: list[int], block: int, first_alone: bool) -> list[int]:
    """Masks in the blocks in progress at each turn; one for a block whose first step has one candidate."""
    counts = [0] * (int(step_map.max()) + 1)
    for steps, length in zip(step_map, lengths, strict=True):
        for part in steps[:length].split(block):
            first = int(part.min())
            for turn in range(first, int(part.max()) + 1):
                alone = first_alone and turn == first
                counts[turn] += 1 if alone else int((part >= turn).sum())
    return counts


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(
    "family, settings",
    [("llada", {}), ("llada", {"cfg_scale": 1.5}), ("dream", {"top_p": 0.9, "top_k": 50, "temperature": 0.5}),
     ("dream", {"cfg_scale": 1.5, "top_p": 0.9}), ("llada", {"suffix": 20})],
)  # fmt: skip
def test_logits_are_those_of_the_masks_in_the_blocks_in_progress(
    family: str, settings: dict[str, Any], cache: str
) -> None:
    """Of exactly those, in every turn; never of a whole row; one tensor at a time, two with guidance."""
    model, prompts, lengths = model_of(family), prompts_of(1000, 100, 350), [33, 40, 16]
    with Watch() as watch:
        output = fd.generate(
            model, prompts, gen_length=lengths, block_length=16, steps=9, cache=cache, stop_on_eos=False,
            seed=1, **settings,
        )  # fmt: skip
    twins = 2 if "cfg_scale" in settings else 1
    first_alone = family == "dream" and cache != "none"
    wanted = masks_by_turn(output.step_map, lengths, 16, first_alone)
    assert watch.logits == [count for count in wanted for _ in range(twins)]
    assert max(watch.logits) <= 3 * 16
    assert watch.most_logits == twins
    assert watch.largest < 1033 * VOCAB * 4, "nothing as large as the logits of a row"


# --- The peak --------------------------------------------------------------------------------------

LONG = {"prompts": (1500, 700, 1100), "gen_length": [32, 20, 48], "block_length": 16, "steps": 3}
SHORT = {"prompts": (10, 30), "gen_length": 128, "block_length": 128, "steps": 4}  # the logits need the most


@pytest.mark.parametrize("runtime", ["fused", "modules"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "settings",
    [
        LONG, LONG | {"inner": 48}, LONG | {"cache": "none"}, LONG | {"cfg_scale": 1.0, "cache": "prefix"},
        LONG | {"suffix": 0}, LONG | {"refresh": 2}, SHORT, SHORT | {"cfg_scale": 1.0, "cache": "none"},
        LONG | {"top_p": 0.9}, SHORT | {"infill": True},
    ],
)  # fmt: skip
def test_the_peak_is_what_the_formula_says(
    family: str, dtype: torch.dtype, runtime: str, settings: dict[str, Any]
) -> None:
    """At most that, and at least nine tenths of it: the formula is no bound of anything else.

    In bfloat16 by the tensors that operations return (see above), in float32 by all allocations. The first
    see nothing of gate and up, which the fused runtime's operation keeps to itself: it is a bound there.
    """
    settings = {k: v for k, v in settings.items() if k != "top_p" or family == "dream"}  # LLaDA has none
    model, prompts = model_of(family, dtype, settings.pop("inner", 192)), prompts_of(*settings.pop("prompts"))
    fd.generate(fd.patch(model, runtime=runtime), prompts, gen_length=1)  # joins the weights
    config = fd.GenerationConfig(**settings)
    counts = config.gen_length if isinstance(config.gen_length, list) else [config.gen_length] * len(prompts)
    needed = fd.memory_needed(model, [len(p) + n for p, n in zip(prompts, counts, strict=True)], config)
    if config.infill:
        prompts = [torch.cat((p, p.new_full((n,), MASK))) for p, n in zip(prompts, counts, strict=True)]
    rope_table.cache_clear()  # the table is in the formula
    if dtype == torch.float32:
        peak, _ = allocated(lambda: fd.generate(model, prompts, config=config))
    else:
        with Watch() as watch:
            fd.generate(model, prompts, config=config)
        peak = watch.peak
    least = 0.0 if (dtype, runtime) == (torch.bfloat16, "fused") else 0.9
    assert least * needed["total"] <= peak <= needed["total"], needed


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_peak_of_a_rule(family: str, rule: str) -> None:
    model, prompts = model_of(family), prompts_of(10, 30)
    fd.generate(model, prompts, gen_length=1)
    config = fd.GenerationConfig(gen_length=64, block_length=64, rule=rule)
    needed = fd.memory_needed(model, [74, 94], config)
    rope_table.cache_clear()
    peak, _ = allocated(lambda: fd.generate(model, prompts, config=config))
    assert 0.9 * needed["total"] <= peak <= needed["total"], needed


@pytest.mark.parametrize("runtime", ["fused", "modules"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_peak_with_pages_of_fp8(family: str, dtype: torch.dtype, runtime: str) -> None:
    """Bytes of the numbers, and 4 of each head's vector's scale; all else is as it was."""
    model, prompts = model_of(family, dtype), prompts_of(1500, 700, 1100)
    lengths, config = [1532, 732, 1132], fd.GenerationConfig(gen_length=32, block_length=16, steps=3)
    own = fd.memory_needed(fd.patch(model, runtime=runtime), lengths, config)
    needed = fd.memory_needed(fd.patch(model, kv_cache_dtype="fp8"), lengths, config)
    kv_heads = 4 if family == "llada" else 2
    assert needed["pages"] == fd.PagedKVCache.pages_for(lengths) * 2 * 2 * kv_heads * 32 * (16 + 4)
    assert needed["pages"] * 16 * dtype.itemsize == own["pages"] * 20
    assert {k: v for k, v in needed.items() if k not in ("pages", "total")} == {
        k: v for k, v in own.items() if k not in ("pages", "total")
    }
    fd.generate(model, prompts, gen_length=1)  # joins the weights
    rope_table.cache_clear()
    if dtype == torch.float32:
        peak, _ = allocated(lambda: fd.generate(model, prompts, config=config))
    else:
        with Watch() as watch:
            fd.generate(model, prompts, config=config)
        peak = watch.peak
    least = 0.0 if (dtype, runtime) == (torch.bfloat16, "fused") else 0.9
    assert least * needed["total"] <= peak <= needed["total"], needed


@pytest.mark.parametrize("chunk", [700, 1700])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_peak_of_rows_in_chunks(family: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows past what the fused runtime computes at a time, by all allocations."""
    monkeypatch.setattr(fused, "CHUNK", chunk)
    model, prompts = model_of(family), prompts_of(1500, 700, 1100)
    fd.generate(model, prompts, gen_length=1)  # joins the weights
    config = fd.GenerationConfig(gen_length=32, block_length=16, steps=4)
    needed = fd.memory_needed(model, [len(p) + 32 for p in prompts], config)
    rope_table.cache_clear()
    peak, _ = allocated(lambda: fd.generate(model, prompts, config=config))
    assert 0.9 * needed["total"] <= peak <= needed["total"], needed


@pytest.mark.parametrize("family", FAMILIES)
def test_pages_of_ones_own_take_the_place_of_the_formulas(family: str) -> None:
    model, prompts = model_of(family), prompts_of(1500, 700)
    fd.generate(model, prompts, gen_length=1)  # joins the weights
    config = fd.GenerationConfig(gen_length=40, steps=4)
    needed = fd.memory_needed(model, [1540, 740], config)
    kv_heads = 4 if family == "llada" else 2
    cache = fd.PagedKVCache(2, kv_heads, 16, num_pages=200)
    assert needed["pages"] == cache.storage[0].nbytes * (1540 // 32 + 1 + 740 // 32 + 1) // 200
    rope_table.cache_clear()
    peak, _ = allocated(lambda: fd.generate(model, prompts, config=config, kv_cache=cache))
    assert peak <= needed["total"] - needed["pages"]


def test_the_numbers_of_the_page() -> None:
    """docs/memory.md's table, in MiB, from models without weights."""
    text = (Path(__file__).parent.parent / "docs" / "memory.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (LLaDA-8B|Dream-7B) \| (\d+) \| (\d+) \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) == 6
    with torch.device("meta"):
        models: dict[str, Any] = {
            "LLaDA-8B": LLaDAModelLM(LLaDAConfig(mlp_hidden_size=12288)),
            "Dream-7B": DreamModel(DreamConfig()),
        }
    for name, batch, scale, numbers in rows:
        model = fd.patch(models[name].to(torch.bfloat16))
        config = fd.GenerationConfig(block_length=32, cfg_scale=float(scale))
        needed = fd.memory_needed(model, [2048] * int(batch), config)
        wanted = [f"{needed[key] / 2**20:,.1f}" for key in needed]
        assert [cell.strip() for cell in numbers.split("|")] == wanted, name


# --- What stays ------------------------------------------------------------------------------------


def census() -> tuple[int, int]:
    """Tensors alive, and the bytes of their storages."""
    found = [x for x in gc.get_objects() if type(x) in (Tensor, torch.nn.Parameter)]
    return len(found), sum({storage_of(x): x.untyped_storage().nbytes() for x in found}.values())


@contextmanager
def without_collector() -> Iterator[None]:
    """What is alive in it is referred to: a cycle keeps its tensors too."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Broken:
    """A streamer that raises once a row has taken some forwards."""

    def on_commit(self, commit: fd.Commit) -> None:
        if commit.step == 3:
            raise RuntimeError("stop")

    def end(self) -> None: ...


def how_it_ends(model: Any, prompts: list[Tensor], **settings: Any) -> type[Exception] | None:
    """The class of the exception that a generation raises, which itself is dropped."""
    try:
        fd.generate(model, prompts, **settings)
    except (RuntimeError, ValueError) as error:
        return type(error)
    return None


@pytest.mark.parametrize(
    "end, error",
    [("answer", None), ("streamer", RuntimeError), ("nan", BadLogits), ("pages", fd.OutOfPages)],
)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_stays(family: str, cache: str, end: str, error: type[Exception] | None) -> None:
    """However a generation ends, it leaves no tensor, no allocation and no page behind, and no cycle."""
    model, prompts = model_of(family), prompts_of(30, 60)
    own = fd.PagedKVCache(2, 4 if family == "llada" else 2, 16, num_pages=9 if end == "pages" else 20)
    settings: dict[str, Any] = {"gen_length": 40, "steps": 5, "cache": cache, "stop_on_eos": False}
    settings |= {"cfg_scale": 0.5, "streamer": Broken() if end == "streamer" else None}
    fd.generate(model, prompts, gen_length=50, steps=1)  # the table of angles is made, and kept
    if end == "nan":
        with torch.no_grad():
            model.get_output_embeddings().weight.fill_(torch.nan)
    caches = (own,) if end == "pages" else (own, None)
    works = [partial(how_it_ends, model, prompts, kv_cache=kv_cache, **settings) for kv_cache in caches]
    assert [work() for work in works] == [error] * len(works)
    with without_collector():
        before = census()
        left = [allocated(work)[1] for work in works]
        assert census() == before
    assert left == [0] * len(works)
    assert own.stats.num_used == 0


def mixed(rng: random.Random, family: str) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "block_length": rng.choice([8, 32]),
        "cache": rng.choice(CACHES),
        "temperature": rng.choice([0.0, 0.7]),
        "cfg_scale": rng.choice([0.0, 0.0, 1.0]),
        "suffix": rng.choice([None, None, 8]),
        "seed": rng.randrange(99),
        **rng.choice([{"steps": 4}, {"threshold": 0.1}, {"steps": 5, "schedule": "linear"}]),
    }
    if family == "dream" and rng.random() < 0.5:
        settings["top_p"] = 0.9
    return settings


@pytest.mark.parametrize("family", FAMILIES)
def test_200_generations_leave_nothing(family: str) -> None:
    """Of mixed settings; every fourth raises, and half use pages of one cache.

    Resident memory may grow by a tenth of what the pages of 200 generations add up to: room for the heap's
    fragments, and none for the pages, logits or activations of every tenth generation.
    """
    rng = random.Random(family)
    model = {"llada": tiny_llada, "dream": tiny_dream}[family]()
    own = fd.PagedKVCache(2, 4 if family == "llada" else 2, 8, num_pages=60)

    def once(i: int) -> int:
        prompts = prompts_of(*(rng.randint(60, 150) for _ in range(rng.randint(1, 3))))
        settings = mixed(rng, family)
        config = fd.GenerationConfig(gen_length=32, **settings)
        kv_cache, streamer = own if i % 2 else None, Broken() if i % 4 == 0 else None
        with suppress(RuntimeError):
            fd.generate(model, prompts, config=config, kv_cache=kv_cache, streamer=streamer)
        return fd.memory_needed(model, [len(p) + 32 for p in prompts], config)["pages"]

    for i in range(40):
        once(i)
    with without_collector():
        before, objects, resident = census(), len(gc.get_objects()), resident_bytes()
        pages = sum(once(i) for i in range(200))
        grown, made = resident_bytes() - resident, len(gc.get_objects()) - objects
        assert census() == before
    assert made < 50, "not one object in four generations"
    assert own.stats.num_used == 0
    assert grown < pages / 10


def resident_bytes() -> int:
    """Of this process, but for what its heap keeps for later, which would hide a leak; 0 where unknown."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None or not STATM.exists():
        return 0
    trim(0)
    return int(STATM.read_text().split()[1]) * resource.getpagesize()
