"""Is each operation near its floor? Every operation beside torch, and beside a copy measured in the same run.

    python benchmarks/ops.py --out benchmarks/results/ops-cpu.json

Shapes are those of one block step: 32 query rows, LLaDA-8B (32 heads) and Dream-7B (28 heads over 4 KV
heads). The floor is the bytes that must move once; "of copy" is their rate as a share of a plain copy's (read
and written). All candidates of a case run interleaved (A B A B ...), each over several sets of data in
rotation, which together are larger than the last cache. On CUDA a candidate's round over its sets is one
graph, timed by events.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common import machine_facts
from fastdllm_ext import _C, ops
from fastdllm_ext.ops import Knob, Row, Rule
from fastdllm_ext.rope import rope_table

BLOCK, PAGE, HEAD_DIM = 32, 32, 128
Call = Callable[[int], Any]  # on one of the sets of data


@dataclass(frozen=True)
class Model:
    """The shapes of a model that matter here."""

    name: str
    heads: int
    kv_heads: int
    hidden: int
    intermediate: int
    vocab: int


LLADA = Model("llada-8b", 32, 32, 4096, 12288, 126464)
DREAM = Model("dream-7b", 28, 4, 3584, 18944, 152064)


@dataclass
class Case:
    """Candidates for the same work, ours first."""

    question: str
    model: str
    batch: int
    context: int
    dtype: torch.dtype
    floor_bytes: int
    sets: int
    calls: dict[str, Call]
    missing: dict[str, str]  # candidates that could not be made, and why


class Bench:
    """Device, sizes and clock of a run."""

    def __init__(self, device: str, repeats: int) -> None:
        self.device, self.repeats = device, repeats
        self.cuda = device == "cuda"
        if self.cuda:
            facts = torch.cuda.get_device_properties(0)
            self.cache, memory = facts.L2_cache_size, torch.cuda.mem_get_info()[0]
        else:
            self.cache = _last_cache()
            memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        self.largest_set = memory // 24
        self.rotation = min(4 * self.cache, 3 << 29)

    def sets(self, set_bytes: int) -> int:
        """How many sets of that size make a round."""
        return max(2, -(-self.rotation // set_bytes))

    def randn(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Standard normal numbers, drawn in the dtype."""
        return torch.empty(shape, dtype=dtype, device=self.device).normal_()

    def samples(self, case: Case) -> dict[str, list[float]]:
        """Seconds of a call of each candidate, interleaved, after a warm-up. Candidates that fail leave."""
        timers: dict[str, Callable[[], float]] = {}
        for name, call in case.calls.items():
            try:
                timers[name] = self._graph_timer(call, case.sets) if self.cuda else _timer(call, case.sets)
                for _ in range(2):
                    timers[name]()
            except Exception as error:
                if name == next(iter(case.calls)):
                    raise
                timers.pop(name, None)
                case.missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        samples: dict[str, list[float]] = {name: [] for name in timers}
        for _ in range(self.repeats):
            for name, timer in timers.items():
                samples[name].append(timer())
        return samples

    def _graph_timer(self, call: Call, sets: int) -> Callable[[], float]:
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            call(0)
            call(1)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for turn in range(sets):
                call(turn)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def run() -> float:
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / 1e3 / sets

        return run


def _last_cache() -> int:
    file = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")  # "36864K"
    return 1024 * int(file.read_text().strip().removesuffix("K")) if file.exists() else 64 << 20


def _timer(call: Call, sets: int) -> Callable[[], float]:
    turn = 0

    def run() -> float:
        nonlocal turn
        turn = (turn + 1) % sets
        start = time.perf_counter()
        call(turn)
        return time.perf_counter() - start

    return run


# ---------------------------------------------------------------------------------------------------------
# Operations
# ---------------------------------------------------------------------------------------------------------


def attention(bench: Bench, model: Model, dtype: torch.dtype, batch: int, context: int) -> Case:
    """Paged attention beside torch's on keys and values that already lie dense, and on gathered ones."""
    blocks, group, scale = context // PAGE, model.heads // model.kv_heads, HEAD_DIM**-0.5
    set_bytes = 2 * batch * context * model.kv_heads * HEAD_DIM * dtype.itemsize
    sets = bench.sets(set_bytes)
    pages = bench.randn(sets, 2, batch * blocks, model.kv_heads, PAGE, HEAD_DIM, dtype=dtype)
    table = torch.randperm(batch * blocks, device=bench.device).view(batch, blocks)
    table32 = table.int()
    kv_lens = torch.full((batch,), context, dtype=torch.int32, device=bench.device)
    offsets = torch.arange(batch + 1, dtype=torch.int32, device=bench.device) * BLOCK
    q = bench.randn(batch * BLOCK, model.heads, HEAD_DIM, dtype=dtype)
    q_dense = q.view(batch, BLOCK, model.heads, HEAD_DIM).transpose(1, 2).contiguous()
    q_folded = q_dense.view(batch, model.kv_heads, group * BLOCK, HEAD_DIM)

    def gather(x: Tensor) -> Tensor:  # [batch, kv_heads, context, head_dim]
        return x.transpose(0, 1)[:, table].flatten(2, 3).transpose(0, 1)

    dense = [tuple(gather(x).contiguous() for x in pages[i]) for i in range(sets)]

    def sdpa(k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q_dense, k, v, enable_gqa=group > 1)

    def ours(turn: int) -> Tensor:
        k, v = pages[turn]
        return ops.paged_attention(q, k, v, table32, kv_lens, offsets, BLOCK, scale)

    def ours_avx2(turn: int) -> Tensor:
        best = _C.cpu_isa()
        _C.set_cpu_isa("avx2")
        out = ours(turn)
        _C.set_cpu_isa(best)
        return out

    def ours_bulk(turn: int) -> Tensor:
        os.environ["FASTDLLM_CUDA_COPY"] = "bulk"  # read at every launch
        try:
            return ours(turn)
        finally:
            del os.environ["FASTDLLM_CUDA_COPY"]

    def gather_and_sdpa(turn: int) -> Tensor:
        k, v = pages[turn]
        return sdpa(gather(k), gather(v))

    def eager(turn: int) -> Tensor:
        k, v = dense[turn]
        weights = torch.softmax(q_folded @ k.transpose(2, 3) * scale, dim=-1)
        return (weights @ v).view(q_dense.shape)

    calls: dict[str, Call] = {"paged_attention": ours}
    if not bench.cuda and dtype == torch.float32 and "avx2" in _C.cpu_isas():
        calls["paged_attention, avx2"] = ours_avx2
    hopper = bench.cuda and torch.cuda.get_device_capability()[0] >= 9
    if hopper and dtype != torch.float32 and "FASTDLLM_CUDA_COPY" not in os.environ:
        calls["paged_attention, bulk"] = ours_bulk
    calls |= {
        "torch sdpa": lambda turn: sdpa(*dense[turn]),
        "torch gather + sdpa": gather_and_sdpa,
        "torch eager": eager,
    }
    missing = {}
    if bench.cuda and dtype != torch.float32:
        for name, make in (("torch varlen_attn", _varlen), ("flashinfer", _flashinfer)):
            try:
                calls[name] = make(q, pages, dense, table, offsets, model)
            except Exception as error:  # not there, or not for these shapes
                missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    _check_same(calls, (batch * BLOCK, model.heads, HEAD_DIM), missing)
    floor_bytes = set_bytes + 2 * q.nbytes
    return Case("attention", model.name, batch, context, dtype, floor_bytes, sets, calls, missing)


def _varlen(q: Tensor, pages: Tensor, dense: list, table: Tensor, offsets: Tensor, model: Model) -> Call:
    """torch's varlen_attn: over pages of its own layout where it takes a block table, else dense."""
    from torch.nn.attention.varlen import varlen_attn

    page = 256  # what its kernel takes
    batch, context = table.shape[0], table.shape[1] * PAGE
    takes = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {}
    if model.heads != model.kv_heads:
        if "enable_gqa" not in takes:
            raise RuntimeError("varlen_attn of this torch has no GQA")
        options["enable_gqa"] = True
    keys = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * context
    if "block_table" in takes and "seqused_k" in takes:
        options["block_table"] = torch.arange(
            batch * context // page, dtype=torch.int32, device=q.device
        ).view(batch, -1)
        options["seqused_k"] = torch.full((batch,), context, dtype=torch.int32, device=q.device)
    shape = (-1, page) if "block_table" in options else (-1,)
    pools = [tuple(x.transpose(1, 2).reshape(*shape, model.kv_heads, HEAD_DIM) for x in kv) for kv in dense]

    def run(turn: int) -> Any:
        k, v = pools[turn]
        cu_keys = None if "block_table" in options else keys
        return varlen_attn(q, k, v, offsets, cu_keys, BLOCK, context, **options)

    return run


def _flashinfer(q: Tensor, pages: Tensor, dense: list, table: Tensor, offsets: Tensor, model: Model) -> Call:
    """flashinfer's prefill over our own pages."""
    import flashinfer  # type: ignore[import-not-found]

    batch, blocks = table.shape
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
    wrapper.plan(
        offsets,
        torch.arange(batch + 1, dtype=torch.int32, device=q.device) * blocks,
        table.flatten().int(),
        torch.full((batch,), PAGE, dtype=torch.int32, device=q.device),
        model.heads,
        model.kv_heads,
        HEAD_DIM,
        PAGE,
        causal=False,
        q_data_type=q.dtype,
        kv_data_type=q.dtype,
    )
    return lambda turn: wrapper.run(q, (pages[turn, 0], pages[turn, 1]))


def _check_same(calls: dict[str, Call], shape: tuple[int, ...], missing: dict[str, str]) -> None:
    """All candidates must give what the first one gives; those that cannot run at all leave."""
    truth = None
    for name, call in list(calls.items()):
        try:
            out = call(0)
        except Exception as error:
            if truth is None:
                raise
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            del calls[name]
            continue
        out = (out.transpose(1, 2) if out.dim() == 4 else out).reshape(shape).float()
        truth = out if truth is None else truth
        distance = float((out - truth).norm() / truth.norm())
        if not distance < 2e-2:
            raise AssertionError(f"{name} differs from {next(iter(calls))}: {distance:.1e} of the norm")


def unmask(bench: Bench, model: Model, dtype: torch.dtype, batch: int) -> Case:
    """Confidence, selection and commit of a block: the published path, and a float32 one that makes sense."""
    rows, mask_id, threshold = batch * BLOCK, model.vocab - 1, 0.9
    set_bytes = rows * model.vocab * dtype.itemsize
    sets = bench.sets(set_bytes)
    logits = bench.randn(sets, rows, model.vocab, dtype=dtype)
    cu_rows = torch.arange(batch + 1, dtype=torch.int32, device=bench.device) * BLOCK
    positions = torch.arange(BLOCK, device=bench.device).repeat(batch)
    tokens = torch.full((batch, BLOCK), mask_id, device=bench.device)
    masked = tokens.clone()
    step_map = torch.zeros((batch, BLOCK), dtype=torch.int32, device=bench.device)
    confidence = torch.zeros((batch, BLOCK), device=bench.device)
    state = torch.zeros((batch, len(Row)), dtype=torch.int64, device=bench.device)
    state[:, Row.RULE], state[:, Row.END] = Rule.THRESHOLD, BLOCK
    # More masks than steps will be taken, and all positions are masked again: every call finds the same work.
    state[:, Row.MASKS_LEFT] = 1 << 40
    knobs = torch.zeros((batch, len(Knob)), device=bench.device)
    knobs[:, Knob.VALUE], knobs[:, Knob.SOFTMAX_TEMPERATURE] = threshold, 1
    quotas = torch.ones((batch, 1), dtype=torch.int32, device=bench.device)
    eos = torch.tensor([1], device=bench.device)

    def ours(turn: int) -> None:
        tokens.copy_(masked)  # its time counts
        ops.unmask(
            logits[turn], cu_rows, positions, tokens, step_map, confidence, state, knobs, quotas, eos, mask_id
        )

    def float32(turn: int) -> Tensor:
        p, best = (
            x.view(batch, BLOCK) for x in torch.softmax(logits[turn], dim=-1, dtype=torch.float32).max(dim=-1)
        )
        p = torch.where(masked == mask_id, p, -torch.inf)
        commit = (p >= threshold) | (p == p.max(dim=1, keepdim=True).values)
        return torch.where(commit, best, masked)

    def published(turn: int) -> Tensor:
        x = logits[turn]
        best = x.argmax(dim=-1, keepdim=True)
        p = torch.softmax(x.double(), dim=-1).gather(-1, best).view(batch, BLOCK)
        p = torch.where(masked == mask_id, p, -torch.inf)
        chosen = p.topk(1, dim=-1).indices
        return masked.scatter(1, chosen, best.view(batch, BLOCK).gather(1, chosen))

    calls: dict[str, Call] = {
        "unmask": ours,
        "torch float32": float32,
        "published float64": published,
    }
    return Case("unmask", model.name, batch, 0, dtype, set_bytes, sets, calls, {})


def rope(bench: Bench, model: Model, dtype: torch.dtype, batch: int) -> Case:
    """RoPE and the write to pages. Torch: rotate_half as published, then an index_put into pages."""
    tokens, half = batch * BLOCK, HEAD_DIM // 2
    width = (model.heads + 2 * model.kv_heads) * HEAD_DIM
    set_bytes = 2 * tokens * width * dtype.itemsize
    sets = bench.sets(set_bytes)
    qkv = bench.randn(sets, tokens, model.heads + 2 * model.kv_heads, HEAD_DIM, dtype=dtype)
    pages = bench.randn(sets, 2, batch * BLOCK // PAGE, model.kv_heads, PAGE, HEAD_DIM, dtype=dtype)
    cos, sin = rope_table(tokens, HEAD_DIM, 500000.0, torch.device(bench.device))
    at = torch.arange(tokens, device=bench.device)

    def parts(turn: int) -> tuple[Tensor, ...]:
        return qkv[turn].split([model.heads, model.kv_heads, model.kv_heads], dim=1)

    def ours(turn: int) -> Tensor:
        q, k, v = parts(turn)
        return ops.rope_write_kv(q, k, v, cos, sin, at, at, pages[turn, 0], pages[turn, 1])

    def eager(turn: int) -> Tensor:
        c, s = (x[at].repeat(1, 2)[:, None].to(dtype) for x in (cos, sin))

        def rotate(x: Tensor) -> Tensor:
            return x * c + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * s

        q, k, v = parts(turn)
        pages[turn, 0][at // PAGE, :, at % PAGE] = rotate(k)
        pages[turn, 1][at // PAGE, :, at % PAGE] = v
        return rotate(q)

    calls: dict[str, Call] = {"rope_write_kv": ours, "torch eager": eager}
    return Case("rope_write_kv", model.name, batch, 0, dtype, set_bytes, sets, calls, {})


def norm(bench: Bench, model: Model, dtype: torch.dtype, batch: int) -> Case:
    """The residual sum and its RMS norm."""
    rows = batch * BLOCK
    set_bytes = 4 * rows * model.hidden * dtype.itemsize
    sets = bench.sets(set_bytes)
    x, residual = bench.randn(2, sets, rows, model.hidden, dtype=dtype)
    weight = bench.randn(model.hidden, dtype=dtype)

    def eager(turn: int) -> Tensor:
        return F.rms_norm(residual[turn].add_(x[turn]), (model.hidden,), weight, 1e-5)

    calls: dict[str, Call] = {
        "add_rms_norm": lambda turn: ops.add_rms_norm(x[turn], residual[turn], weight, 1e-5),
        "torch add_, rms_norm": eager,
    }
    return Case("add_rms_norm", model.name, batch, 0, dtype, set_bytes, sets, calls, {})


def silu(bench: Bench, model: Model, dtype: torch.dtype, batch: int) -> Case:
    """The gated activation."""
    rows = batch * BLOCK
    set_bytes = 3 * rows * model.intermediate * dtype.itemsize
    sets = bench.sets(set_bytes)
    gate, up = bench.randn(2, sets, rows, model.intermediate, dtype=dtype)
    calls: dict[str, Call] = {
        "silu_mul": lambda turn: ops.silu_mul(gate[turn], up[turn]),
        "torch silu, mul": lambda turn: F.silu(gate[turn]) * up[turn],
    }
    return Case("silu_mul", model.name, batch, 0, dtype, set_bytes, sets, calls, {})


def quantize(bench: Bench, model: Model, dtype: torch.dtype, batch: int) -> Case:
    """8-bit floats of the gated activation, for the projection down."""
    rows = batch * BLOCK
    set_bytes = rows * (model.intermediate * (dtype.itemsize + 1) + 4)
    sets = bench.sets(set_bytes)
    x = bench.randn(sets, rows, model.intermediate, dtype=dtype)

    def eager(turn: int) -> tuple[Tensor, Tensor]:
        y = x[turn].float()
        scales = y.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 448
        return (y / scales).to(torch.float8_e4m3fn), scales

    calls: dict[str, Call] = {
        "quantize_fp8": lambda turn: ops.quantize_fp8(x[turn]),
        "torch amax, div, to": eager,
    }
    return Case("quantize_fp8", model.name, batch, 0, dtype, set_bytes, sets, calls, {})


def linear(bench: Bench, model: Model, dtype: torch.dtype, batch: int) -> Case:
    """The output projection of the attention, [hidden, hidden]."""
    set_bytes = model.hidden * model.hidden * dtype.itemsize
    sets = bench.sets(set_bytes)
    weight = bench.randn(sets, model.hidden, model.hidden, dtype=dtype)
    x = bench.randn(batch * BLOCK, model.hidden, dtype=dtype)
    calls: dict[str, Call] = {
        "linear": lambda turn: ops.linear(x, weight[turn]),
        "torch linear": lambda turn: F.linear(x, weight[turn]),
    }
    return Case("linear", model.name, batch, 0, dtype, set_bytes + 2 * x.nbytes, sets, calls, {})


def copy_pages(bench: Bench, model: Model, dtype: torch.dtype, batch: int) -> Case:
    """Every page of a sequence of 2,048 positions, in one layer's keys and values."""
    pairs = batch * 2048 // PAGE
    page_bytes = model.kv_heads * PAGE * HEAD_DIM * dtype.itemsize
    set_bytes = 4 * pairs * page_bytes
    sets = bench.sets(set_bytes)
    pages = bench.randn(sets, 2, 2 * pairs, model.kv_heads, PAGE, HEAD_DIM, dtype=dtype)
    src, dst = torch.randperm(2 * pairs, device=bench.device).split(pairs)

    def eager(turn: int) -> None:
        pages[turn][:, dst] = pages[turn][:, src]

    calls: dict[str, Call] = {
        "copy_pages": lambda turn: ops.copy_pages(pages[turn], src, dst),
        "torch index": eager,
    }
    return Case("copy_pages", model.name, batch, 0, dtype, set_bytes, sets, calls, {})


def copy(bench: Bench) -> Case:
    """A plain copy between large buffers: what the shares are taken of."""
    size = min(max(bench.cache, 1 << 28), 1 << 29)
    a, b = bench.randn(2, 2, size // 4, dtype=torch.float32)
    calls: dict[str, Call] = {"torch copy_": lambda turn: a[turn].copy_(b[turn])}
    return Case("copy", "", 1, 0, torch.float32, 2 * size, 2, calls, {})


def cases(bench: Bench, contexts: list[int], batches: list[int]) -> Iterator[Case]:
    """The copy, then every operation, where its data fit into memory; what matters most first."""
    yield copy(bench)
    for batch in batches:
        for dtype in (torch.bfloat16, torch.float32):
            for model in (LLADA, DREAM):
                for context in contexts:
                    kv_bytes = 2 * batch * context * model.kv_heads * HEAD_DIM * dtype.itemsize
                    if kv_bytes <= bench.largest_set:
                        yield attention(bench, model, dtype, batch, context)
                if batch * BLOCK * model.vocab * 8 <= bench.largest_set:
                    yield unmask(bench, model, dtype, batch)
                for make in (rope, norm, silu, quantize, linear, copy_pages):
                    yield make(bench, model, dtype, batch)
    yield copy(bench)


# ---------------------------------------------------------------------------------------------------------
# Report
# ---------------------------------------------------------------------------------------------------------


def report(case: Case, samples: dict[str, list[float]], copy_rate: float) -> Iterator[dict[str, Any]]:
    """One row a candidate; prints them as lines of a table."""
    ours = None
    for name, seconds in samples.items():
        low, median, high = statistics.quantiles(seconds, n=4)
        ours = ours or median
        row = {
            "question": case.question,
            "call": name,
            "model": case.model,
            "dtype": str(case.dtype).removeprefix("torch."),
            "batch": case.batch,
            "context": case.context,
            "sets": case.sets,
            "floor_bytes": case.floor_bytes,
            "median_ms": median * 1e3,
            "quartiles_ms": [low * 1e3, high * 1e3],
            "gb_per_s": case.floor_bytes / median / 1e9,
            "of_copy": case.floor_bytes / median / (copy_rate or case.floor_bytes / median),
            "times_ours": median / ours,
            "samples_s": seconds,
        }
        shape = f"{case.model} batch {case.batch}" + (f" context {case.context}" if case.context else "")
        print(
            f"{case.question:<13} {shape:<31} {row['dtype']:<8} {name:<21} {median * 1e3:9.4f} ms "
            f"[{low * 1e3:.4f}, {high * 1e3:.4f}] {row['gb_per_s']:7.1f} GB/s {row['of_copy']:5.2f} of copy "
            f"{row['times_ours']:6.2f}x",
            flush=True,
        )
        yield row


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "cuda" if torch.cuda.is_available() and _C.cuda_built else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--quick", action="store_true", help="the first context and batch, 5 repeats")
    parser.add_argument("--contexts", type=int, nargs="+", help="default: 2048; on CUDA 512 ... 32768")
    parser.add_argument("--batches", type=int, nargs="+", help="default: 1; on CUDA 1 and 16")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no new case after so many")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    cuda = args.device == "cuda"
    contexts = args.contexts or ([2048, 512, 8192, 32768] if cuda else [2048])
    batches = args.batches or ([1, 16] if cuda else [1])
    if args.quick:
        contexts, batches, args.repeats = contexts[:1], batches[:1], 5
    if any(context % 256 for context in contexts):
        parser.error("--contexts: takes multiples of 256")

    torch.manual_seed(0)
    bench = Bench(args.device, args.repeats)
    facts = machine_facts(args.device) | {
        "conditions": {
            "head_dim": HEAD_DIM, "queries": BLOCK, "page_size": PAGE, "repeats": args.repeats,
            "order": "interleaved", "cache_bytes": bench.cache, "rotation_bytes": bench.rotation,
            "ratios": "times_ours: seconds of the call over those of ours",
        },
    }  # fmt: skip
    results: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    copy_rate = 0.0
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():
        end = time.perf_counter() + args.seconds
        for case in cases(bench, contexts, batches):
            if time.perf_counter() > end:
                missing["what follows"] = "the time was up"
                break
            results += report(case, bench.samples(case), copy_rate)
            missing |= case.missing
            if not copy_rate:
                copy_rate = 1e9 * results[0]["gb_per_s"]
            written = {**facts, "load_after": os.getloadavg(), "missing": missing, "results": results}
            args.out.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
            del case
            if cuda:
                torch.cuda.empty_cache()
    args.out.write_text(json.dumps(written | {"missing": missing}, indent=1) + "\n", encoding="utf-8")
    for name, reason in missing.items():
        print(f"without {name}: {reason}")


if __name__ == "__main__":
    main()
