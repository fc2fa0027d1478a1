"""Is each operation near its floor? Seconds and GB/s of the four operations, beside torch and beside a copy.

    python benchmarks/ops.py --device cpu --out benchmarks/results/ops-cpu.json

Shapes are those of one block step of LLaDA-8B: 32 query rows, 32 heads of 128, 2,400 positions of context, a
vocabulary of 126,464. All candidates of a question run interleaved (A B A B ...); medians with quartiles.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import fastdllm_ext as fd
from fastdllm_ext import ops
from fastdllm_ext.ops import Row, Rule
from fastdllm_ext.rope import rope_table

HEADS, HEAD_DIM, QUERIES, CONTEXT, PAGE, VOCAB = 32, 128, 32, 2400, 32, 126464
COPIES = 4  # sets of pages and logits in rotation, so that they come from memory and not from a cache


def time_calls(calls: dict[str, Callable[[int], Any]], device: str, repeats: int) -> dict[str, list[float]]:
    """Seconds of every call, ``repeats`` times each, interleaved; the argument of a call is its turn."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-3, repeats):  # the first three turns warm up
        for name, call in calls.items():
            if device == "cuda":
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                call(turn)
                end.record()
                end.synchronize()
                seconds = begin.elapsed_time(end) / 1e3
            else:
                start = time.perf_counter()
                call(turn)
                seconds = time.perf_counter() - start
            if turn >= 0:
                samples[name].append(seconds)
    return samples


def attention(device: str, dtype: torch.dtype) -> tuple[dict[str, Callable[[int], Any]], int]:
    """Paged attention against torch's, on contiguous keys and values. Floor: K and V once."""
    blocks = -(-CONTEXT // PAGE)
    pages = torch.randn(COPIES, 2, blocks, HEADS, PAGE, HEAD_DIM, device=device).to(dtype)
    table = torch.randperm(blocks, device=device).to(torch.int32)[None]
    kv_lens = torch.tensor([CONTEXT], dtype=torch.int32, device=device)
    offsets = torch.tensor([0, QUERIES], dtype=torch.int32, device=device)
    q = torch.randn(QUERIES, HEADS, HEAD_DIM, device=device).to(dtype)
    dense = pages.transpose(3, 4).flatten(2, 3)[:, :, :CONTEXT].transpose(2, 3).contiguous()
    q_dense, scale = q.transpose(0, 1).contiguous(), HEAD_DIM**-0.5

    def ours(turn: int) -> Any:
        k, v = pages[turn % COPIES]
        return ops.paged_attention(q, k, v, table, kv_lens, offsets, QUERIES, scale)

    def sdpa(turn: int) -> Any:
        k, v = dense[turn % COPIES]
        return F.scaled_dot_product_attention(q_dense[None], k[None], v[None])

    def eager(turn: int) -> Any:
        k, v = dense[turn % COPIES]
        return torch.softmax(q_dense @ k.transpose(1, 2) * scale, dim=-1) @ v

    return {"paged_attention": ours, "torch sdpa": sdpa, "torch eager": eager}, dense[0].nbytes


def unmask(device: str, dtype: torch.dtype) -> tuple[dict[str, Callable[[int], Any]], int]:
    """Confidence and commit of a block against torch's softmax and argmax. Floor: the logits once."""
    logits = torch.randn(COPIES, QUERIES, VOCAB, device=device).to(dtype)
    cu_rows = torch.tensor([0, QUERIES], dtype=torch.int32, device=device)
    positions = torch.arange(QUERIES, device=device)
    tokens = torch.full((1, QUERIES), VOCAB - 1, device=device)
    step_map = torch.zeros((1, QUERIES), dtype=torch.int32, device=device)
    confidence = torch.zeros((1, QUERIES), device=device)
    rows = torch.zeros((1, len(Row)), dtype=torch.int64, device=device)
    rows[0, Row.RULE], rows[0, Row.END] = Rule.THRESHOLD, QUERIES
    knobs = torch.tensor([[0.9, 0.0]], device=device)
    eos = torch.tensor([1], device=device)

    def ours(turn: int) -> Any:
        x = logits[turn % COPIES]
        ops.unmask(x, cu_rows, positions, tokens, step_map, confidence, rows, knobs, eos, VOCAB - 1)

    def softmax_in(precision: torch.dtype) -> Callable[[int], Any]:
        def run(turn: int) -> Any:
            p = logits[turn % COPIES].to(precision).softmax(-1)
            return p.max(-1)

        return run

    calls = {
        "unmask": ours,
        "torch float32": softmax_in(torch.float32),
        "torch float64": softmax_in(torch.float64),
    }
    return calls, logits[0].nbytes


def rope(device: str, dtype: torch.dtype) -> tuple[dict[str, Callable[[int], Any]], int]:
    """RoPE and the write to pages, for one block. Floor: q, k, v in, q, k, v out."""
    q, k, v = (torch.randn(QUERIES, HEADS, HEAD_DIM, device=device).to(dtype) for _ in range(3))
    cos, sin = rope_table(4096, HEAD_DIM, 500000.0, torch.device(device))
    pages = torch.empty(2, 80, HEADS, PAGE, HEAD_DIM, device=device, dtype=dtype)
    at = torch.arange(CONTEXT - QUERIES, CONTEXT, device=device)

    def ours(turn: int) -> Any:
        return ops.rope_write_kv(q, k, v, cos, sin, at, at, pages[0], pages[1])

    return {"rope_write_kv": ours}, 6 * q.nbytes


def copy(device: str, dtype: torch.dtype) -> tuple[dict[str, Callable[[int], Any]], int]:
    """Copying 64 pages of one layer against one plain copy of as many bytes."""
    pages = torch.empty(2, 160, HEADS, PAGE, HEAD_DIM, device=device, dtype=dtype)
    src = torch.arange(64, device=device)
    a, b = pages[0, :128].clone(), pages[1, :128].clone()

    def plain(turn: int) -> Any:
        return a.copy_(b)

    return {
        "copy_pages": lambda turn: ops.copy_pages(pages, src, src + 64),
        "torch copy_": plain,
    }, 2 * a.nbytes


QUESTIONS = {"attention": attention, "unmask": unmask, "rope": rope, "copy": copy}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    results = []
    for question, make in QUESTIONS.items():
        for dtype in (torch.float32, torch.bfloat16):
            calls, floor_bytes = make(args.device, dtype)
            for name, samples in time_calls(calls, args.device, args.repeats).items():
                low, median, high = statistics.quantiles(samples, n=4)
                results.append(
                    {
                        "question": question,
                        "call": name,
                        "dtype": str(dtype).removeprefix("torch."),
                        "floor_bytes": floor_bytes,
                        "median_ms": median * 1e3,
                        "quartiles_ms": [low * 1e3, high * 1e3],
                        "gb_per_s": floor_bytes / median / 1e9,
                        "samples_s": samples,
                    }
                )
                print(
                    f"{question:<10} {results[-1]['dtype']:<9} {name:<16} {median * 1e3:9.3f} ms "
                    f"[{low * 1e3:.3f}, {high * 1e3:.3f}]  {results[-1]['gb_per_s']:8.1f} GB/s"
                )
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    facts = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "command": f"python benchmarks/ops.py --device {args.device} --repeats {args.repeats}",
        "environment": fd.collect_env(),
        "conditions": {
            "heads": HEADS, "head_dim": HEAD_DIM, "queries": QUERIES, "context": CONTEXT, "page_size": PAGE,
            "vocab": VOCAB, "batch": 1, "repeats": args.repeats, "order": "interleaved",
        },
        "results": results,
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
