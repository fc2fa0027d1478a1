"""Where does the time go? Phases of a generation, and what a step and a refresh do within theirs.

    python benchmarks/phases.py --out benchmarks/results/phases-cpu.json

For each cache mode: seconds of refresh, block steps, selection, and of the host between them, as the timings
of a generation have them (CUDA: by events). The head is part of refresh and block steps; its share is that
of its product in a run under torch's profiler, which also gives the operations of a step and of a refresh by
their own time. On CUDA that run takes its steps one by one (FASTDLLM_GRAPHS=eager): in a graph they have no
names.

A block step is held against its floor, the bytes that it must move over the bandwidth measured in the same
run; a refresh against the rate of a large matrix product.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import fastdllm_ext as fd
from common import (
    BLOCK,
    DTYPES,
    Results,
    Shape,
    Turn,
    bandwidth,
    dtypes_of,
    make_model,
    matmul_ceiling,
    parser_for,
    random_prompts,
    shape_of,
    step_seconds,
    steps_for,
    summary,
    timed,
    watched_turns,
)

CACHES = ("none", "prefix", "dual")
PHASES = ("refresh", "block_steps", "selection")


def generation(model: Any, prompts: torch.Tensor, gen_length: int, cache: str, rate: float) -> Any:
    """One with a fixed schedule that nothing ends early."""
    steps = steps_for(gen_length, rate)
    return fd.generate(
        model, prompts, gen_length=gen_length, block_length=BLOCK, steps=steps, cache=cache, stop_on_eos=False
    )


@contextmanager
def steps_one_by_one() -> Iterator[None]:
    """Within it no step is part of a graph."""
    before = os.environ.get("FASTDLLM_GRAPHS")
    os.environ["FASTDLLM_GRAPHS"] = "eager"
    try:
        yield
    finally:
        if before is None:
            del os.environ["FASTDLLM_GRAPHS"]
        else:
            os.environ["FASTDLLM_GRAPHS"] = before


def operations(run: Any, device: str, head: tuple[int, int]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(operations by their own time, for refresh and block step; the head's share of each).

    An operation belongs to the turn in which it was called. ``other`` is the turn's time outside of
    operations: Python, and the launches.
    """
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with steps_one_by_one(), watched_turns(device, name="turn"):
        run()
        with profile(activities=activities, record_shapes=True) as recorded:
            run()
    events = [e for e in recorded.events() if e.device_type == torch.autograd.DeviceType.CPU]
    turns = sorted(
        (e.time_range.start, e.time_range.end, e.name.removeprefix("turn."))
        for e in events
        if e.name.startswith("turn.")
    )
    own: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(lambda: [0.0, 0]))
    heads: dict[str, float] = defaultdict(float)
    at = 0
    for event in sorted(events, key=lambda e: e.time_range.start):
        while at < len(turns) and event.time_range.start > turns[at][1]:
            at += 1
        if at == len(turns) or event.time_range.start < turns[at][0]:
            continue
        name = "other" if event.name.startswith("turn.") else event.name
        on_cuda = device == "cuda" and name != "other"
        seconds = (event.self_device_time_total if on_cuda else event.self_cpu_time_total) / 1e6
        found = own[turns[at][2]][name]
        found[0] += seconds
        found[1] += 1
        if list(head) in [
            list(shape) for shape in event.input_shapes or () if isinstance(shape, (list, tuple))
        ]:
            heads[turns[at][2]] += seconds
    rows: list[dict[str, Any]] = []
    shares: dict[str, Any] = {}
    for turn, by_name in own.items():
        count = sum(name == turn for _, _, name in turns)
        total = sum(seconds for seconds, _ in by_name.values())
        ranked = sorted(by_name.items(), key=lambda item: -item[1][0])[:10]
        rows.append({
            "turn": turn,
            "turns": count,
            "seconds_a_turn": total / count,
            "operations": [
                {"name": name, "seconds": s / count, "share": s / total, "calls": calls / count}
                for name, (s, calls) in ranked
            ],
        })  # fmt: skip
        shares[turn] = heads[turn] / total
    return rows, shares


def measure(
    model: Any,
    shape: Shape,
    dtype: str,
    cache: str,
    case: tuple[int, int],
    ceilings: dict[str, Any],
    args: Any,
) -> dict[str, Any]:
    """A row of results."""
    device, (prompt, gen_length) = args.device, case
    prompts = random_prompts(shape, 1, prompt, device)

    def run() -> Any:
        return generation(model, prompts, gen_length, cache, args.tokens_per_step)

    run()
    turns: list[Turn] = []
    if device == "cuda":  # apart from the totals: it waits for the device after every turn
        with watched_turns(device) as turns:
            for _ in range(args.repeats):
                run()
    totals: list[float] = []
    phases: dict[str, list[float]] = {name: [] for name in (*PHASES, "host")}
    for _ in range(args.repeats):
        with watched_turns(device) if device == "cpu" else nullcontext([]) as found_turns:
            seconds, output = timed(run, device)
        turns += found_turns
        found = {name: getattr(output.timings, name) for name in PHASES}
        totals.append(seconds)
        for name, value in {**found, "host": seconds - sum(found.values())}.items():
            phases[name].append(value)
    table, head_shares = operations(run, device, (shape.vocab, shape.hidden))

    shares = {
        name: statistics.median(x / t for x, t in zip(v, totals, strict=True)) for name, v in phases.items()
    }
    head = shares["refresh"] * head_shares.get("refresh", 0) + shares["block_steps"] * head_shares.get(
        "block_step", 0
    )
    context, size = prompt + gen_length, DTYPES[dtype].itemsize
    row: dict[str, Any] = {
        "model": shape.name, "dtype": dtype, "batch": 1, "cache": cache, "runtime": "auto",
        "prompt": prompt, "gen_length": gen_length, "block_length": BLOCK,
        "tokens_per_step": args.tokens_per_step, "nfe": int(output.nfe[0]),
        "total": summary(totals), "phases_s": phases, "shares": shares | {"head": head},
        "head_shares": head_shares, "operations": table,
    }  # fmt: skip
    refreshes, steps = step_seconds(turns, refresh=True), step_seconds(turns, refresh=False)
    if refreshes:
        flop = shape.refresh_flop(1, BLOCK, context)
        rate = flop / statistics.median(refreshes)
        ceiling = ceilings["matmul"]["flop_per_s"]
        row["refresh"] = summary(refreshes) | {
            "flop": flop, "flop_per_s": rate, "of_matmul": rate / ceiling
        }  # fmt: skip
    if steps:
        parts = shape.block_step_bytes(1, BLOCK, context, size)
        floor = sum(parts.values()) / ceilings["bandwidth"]["bytes_per_s"]
        row["block_step"] = summary(steps) | {"bytes": parts, "floor_s": floor}
        if cache == "dual":
            row["block_step"]["times_floor"] = row["block_step"]["median_s"] / floor
    show(row)
    return row


def show(row: dict[str, Any]) -> None:
    """Prints a row of results."""
    line = [f"{row['model']} {row['dtype']} {row['cache']:<6} {row['total']['median_s']:8.3f} s"]
    line += [f"{name} {100 * share:.1f}%" for name, share in row["shares"].items()]
    if "block_step" in row:
        line.append(f"step {1e3 * row['block_step']['median_s']:.2f} ms")
        if "times_floor" in row["block_step"]:
            line.append(f"{row['block_step']['times_floor']:.2f} x its floor")
    if "refresh" in row:
        of_matmul = 100 * row["refresh"]["of_matmul"]
        line.append(f"refresh {1e3 * row['refresh']['median_s']:.2f} ms, {of_matmul:.0f}% of matmul")
    print("  ".join(line))
    for part in row["operations"]:
        print(f"  {part['turn']}, {1e3 * part['seconds_a_turn']:.2f} ms under the profiler:")
        for op in part["operations"]:
            milliseconds, share = 1e3 * op["seconds"], 100 * op["share"]
            print(f"    {op['name']:<44} {milliseconds:8.3f} ms {share:5.1f}% {op['calls']:6.1f} calls")
    sys.stdout.flush()


def main() -> None:
    """The command line."""
    parser = parser_for(__doc__, repeats=3)
    parser.add_argument("--prompt", type=int, help="tokens; default 512; on CUDA 2272")
    parser.add_argument("--gen-length", type=int, help="default 128")
    parser.add_argument("--tokens-per-step", type=float, help="default: 4; on CUDA 3.2, 10 steps a block")
    args = parser.parse_args()
    cuda = args.device == "cuda"
    args.tokens_per_step = args.tokens_per_step or (3.2 if cuda else 4)
    case = (args.prompt or (2272 if cuda else 512), args.gen_length or 128)
    if args.quick:
        args.repeats, case = 2, (min(case[0], 64), min(case[1], 64)) if not cuda else case
    shape = shape_of(args)
    results = Results(
        args, "Where does the time go?", block_length=BLOCK, repeats=args.repeats, weights="random",
        floor="bytes of layer weights, head, keys and values, logits, over the bandwidth",
    )  # fmt: skip
    results.extra["bandwidth"] = bandwidth(args.device, 5 if args.quick else 15)
    results.extra["matmul"] = {}
    for dtype in dtypes_of(args, "bfloat16", "float32"):
        matmul = matmul_ceiling(DTYPES[dtype], args.device, 5 if args.quick else 11)
        results.extra["matmul"][dtype] = matmul
        ceilings = {"bandwidth": results.extra["bandwidth"], "matmul": matmul}
        print(
            f"{dtype}: {ceilings['bandwidth']['bytes_per_s'] / 1e9:.1f} GB/s, "
            f"matmul {matmul['flop_per_s'] / 1e12:.2f} TFLOP/s"
        )
        model = make_model(shape, DTYPES[dtype], args.device)
        for cache in reversed(CACHES):
            if results.is_late:
                results.miss(f"{dtype}, {cache}", "the time was up")
                continue
            torch.manual_seed(0)
            results.add(measure(model, shape, dtype, cache, case, ceilings, args))
        del model


if __name__ == "__main__":
    main()
