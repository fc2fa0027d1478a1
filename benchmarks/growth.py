"""How does cost grow? A block step and a refresh against context, block length and batch.

    python benchmarks/growth.py --out benchmarks/results/growth-cpu.json

Generations of two blocks at each size, with dual cache, take turns; a step's time is the median over the
block steps of all generations, the device's work included. The exponent e of c * size^e is fitted by least
squares on logarithms: 0 is a cost that does not grow, 1 one in proportion. Block length and batch vary in
bfloat16 alone. The operations of a block step at the smallest and at the largest context, under torch's
profiler, tell what grows.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

import torch

import fastdllm_ext as fd
from common import (
    DTYPES,
    Results,
    Shape,
    dtypes_of,
    make_model,
    parser_for,
    random_prompts,
    shape_of,
    step_seconds,
    summary,
    watched_turns,
)
from phases import operations

STEPS = 8  # of each block
BLOCKS = 2


@dataclass(frozen=True)
class Point:
    """Sizes of a generation; ``context``: prompt and answer."""

    context: int
    block: int = 32
    batch: int = 1


def points(device: str, quick: bool) -> dict[str, list[Point]]:
    """By the size that varies."""
    if quick:
        return {
            "context": [Point(128), Point(256)],
            "block": [Point(128, 8), Point(128, 16)],
            "batch": [Point(128), Point(128, batch=2)],
        }
    cuda = device == "cuda"
    contexts = (512, 1024, 2048, 4096, 8192, 16384, 32768) if cuda else (512, 1024, 2048, 4096)
    batches = (1, 4, 16, 64) if cuda else (1, 2, 4, 8, 16)
    return {
        "context": [Point(n) for n in contexts],
        "block": [Point(1024, n) for n in (8, 16, 32, 64, 128)],
        "batch": [Point(512, batch=n) for n in batches],
    }


def exponent(sizes: list[int], seconds: list[float]) -> float:
    """Of the power law that fits best."""
    x, y = [math.log(n) for n in sizes], [math.log(s) for s in seconds]
    return statistics.linear_regression(x, y).slope


def generate(model: Any, shape: Shape, point: Point, device: str) -> None:
    """A generation of two blocks."""
    gen_length = BLOCKS * point.block
    prompts = random_prompts(shape, point.batch, point.context - gen_length, device)
    fd.generate(
        model, prompts, gen_length=gen_length, block_length=point.block, cache="dual", stop_on_eos=False,
        steps=BLOCKS * min(STEPS, point.block),
    )  # fmt: skip


def measure(
    model: Any, shape: Shape, dtype: str, varied: str, series: list[Point], args: Any
) -> list[dict[str, Any]]:
    """A row of results for each point of a series."""
    turns: dict[Point, list[Any]] = {point: [] for point in series}
    for point in series:
        generate(model, shape, point, args.device)
    for _ in range(args.repeats):
        for point in series:
            with watched_turns(args.device) as found:
                generate(model, shape, point, args.device)
            turns[point] += found
    rows = []
    for point in series:
        steps, refreshes = (step_seconds(turns[point], refresh=refresh) for refresh in (False, True))
        rows.append({
            "varied": varied, "model": shape.name, "dtype": dtype, "context": point.context,
            "block": point.block, "batch": point.batch, "block_step": summary(steps),
            "refresh": summary(refreshes),
        })  # fmt: skip
        print(
            f"{shape.name} {dtype}, {varied}: context {point.context}, block {point.block}, "
            f"batch {point.batch}: "
            f"step {1e3 * rows[-1]['block_step']['median_s']:.3f} ms, "
            f"refresh {1e3 * rows[-1]['refresh']['median_s']:.2f} ms",
            flush=True,
        )
    return rows


def block_step_operations(model: Any, shape: Shape, dtype: str, point: Point, device: str) -> dict[str, Any]:
    """Those of a block step by their own time, at one context."""
    tables, _ = operations(lambda: generate(model, shape, point, device), device, (shape.vocab, shape.hidden))
    found = next(table for table in tables if table["turn"] == "block_step")
    return {"dtype": dtype, "context": point.context} | found


def fits(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Exponents of every series of two points or more, and what its last point takes, over its first."""
    found = []
    for dtype, varied in dict.fromkeys((r["dtype"], r["varied"]) for r in rows):
        series = [r for r in rows if (r["dtype"], r["varied"]) == (dtype, varied)]
        sizes = [r[varied] for r in series]
        if len(sizes) < 2:
            continue
        for what in ("block_step", "refresh"):
            seconds = [r[what]["median_s"] for r in series]
            found.append({
                "dtype": dtype, "varied": varied, "what": what, "sizes": sizes,
                "exponent": exponent(sizes, seconds),
                "last_over_first": seconds[-1] / seconds[0],
            })  # fmt: skip
    return found


def main() -> None:
    """The command line."""
    args = parser_for(__doc__, repeats=3).parse_args()
    if args.quick:
        args.repeats = 2
    shape = shape_of(args)
    results = Results(
        args, "How does cost grow?", cache="dual", blocks=BLOCKS, steps_a_block=STEPS, repeats=args.repeats,
        order="interleaved", weights="random",
    )  # fmt: skip
    results.extra["operations"] = []
    for dtype in dtypes_of(args, "bfloat16", "float32"):
        model = make_model(shape, DTYPES[dtype], args.device)
        for varied, series in points(args.device, args.quick).items():
            if dtype == "float32" and varied != "context":
                continue  # as in bfloat16, and twice as slow
            if results.is_late:
                results.miss(f"{dtype}, {varied}", "the time was up")
                continue
            torch.manual_seed(0)
            rows = measure(model, shape, dtype, varied, series, args)
            if varied == "context":
                results.extra["operations"] += [
                    block_step_operations(model, shape, dtype, point, args.device)
                    for point in (series[0], series[-1])
                ]
            results.extra["fits"] = fits([*results.rows, *rows])
            results.add(*rows)
        del model
    for fit in results.extra["fits"]:
        print(
            f"{fit['dtype']} {fit['what']:<10} ~ {fit['varied']}^{fit['exponent']:.2f}, "
            f"{fit['sizes'][0]} -> {fit['sizes'][-1]}: {fit['last_over_first']:.2f}x"
        )


if __name__ == "__main__":
    main()
