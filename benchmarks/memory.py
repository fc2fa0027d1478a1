"""Does a generation take the memory that fd.memory_needed says? Its peak, against the formula.

    python benchmarks/memory.py --out benchmarks/results/memory-cpu.json

CPU: each generation in a process of its own; the high-water mark of its resident set, over what the process
held before, weights included. So whatever the allocator keeps and libraries allocate counts as well. CUDA:
the most that torch's allocator gave out, over what was given out before.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import fastdllm_ext as fd
from common import (
    BLOCK,
    DTYPES,
    ROOT,
    SHAPES,
    Results,
    dtypes_of,
    make_model,
    parser_for,
    random_prompts,
    shape_of,
)

RUNTIMES = ("fused", "modules")
CONTEXTS = (512, 2048, 8192, 32768)


def resident() -> int:
    """Bytes of the process that are in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def high_water() -> int:
    """The most there ever were, or since :func:`lower_high_water`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def lower_high_water() -> None:
    """To what is resident now, where the kernel does that."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def give_back() -> None:
    """What the allocator keeps, to the system."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def measure(shape_name: str, dtype: str, runtime: str, context: int, device: str) -> dict[str, Any]:
    """Peak of one generation in this process, and the formula's terms."""
    shape = SHAPES[shape_name]
    model = fd.patch(make_model(shape, DTYPES[dtype], device), runtime=runtime)
    config = fd.GenerationConfig(
        gen_length=BLOCK, block_length=BLOCK, steps=2, cache="dual", stop_on_eos=False
    )
    # Joins weights, loads libraries, makes the tables of rotary angles.
    fd.generate(model, random_prompts(shape, 1, 8, device), config=config)
    prompts = random_prompts(shape, 1, context - BLOCK, device)
    needed = fd.memory_needed(model, [context], config)
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        fd.generate(model, prompts, config=config)
        torch.cuda.synchronize()
        peak, is_bound = torch.cuda.max_memory_allocated() - before, False
    else:
        give_back()
        lower_high_water()
        before, mark = resident(), high_water()
        fd.generate(model, prompts, config=config)
        peak = high_water() - before
        is_bound = high_water() == mark and mark > before  # an earlier peak hides this one
    return {
        "model": shape_name, "dtype": dtype, "runtime": runtime, "context": context, "batch": 1,
        "gen_length": BLOCK, "block_length": BLOCK, "cache": "dual", "before_bytes": before,
        "peak_bytes": peak, "needed": needed, "peak_over_needed": peak / needed["total"],
        "is_upper_bound": is_bound,
    }  # fmt: skip


def in_child(*arguments: str) -> dict[str, Any]:
    """:func:`measure` in a fresh process."""
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "memory.py"),
        "--out",
        os.devnull,
        "--child",
        *arguments,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """The command line."""
    parser = parser_for(__doc__, repeats=1)
    parser.add_argument("--contexts", type=int, nargs="+", default=list(CONTEXTS))
    parser.add_argument(
        "--child", nargs=4, metavar=("SHAPE", "DTYPE", "RUNTIME", "CONTEXT"), help="one alone"
    )
    args = parser.parse_args()
    if args.child:
        shape_name, dtype, runtime, context = args.child
        print(json.dumps(measure(shape_name, dtype, runtime, int(context), args.device)))
        return
    shape = shape_of(args)
    contexts = [64] if args.quick else args.contexts
    results = Results(
        args, "Does a generation take the memory that fd.memory_needed says?", block_length=BLOCK,
        measured="max_memory_allocated" if args.device == "cuda" else "high-water mark of the resident set",
    )  # fmt: skip
    for dtype in dtypes_of(args, "bfloat16"):
        for context in contexts:
            for runtime in RUNTIMES:
                for _ in range(args.repeats):
                    name = f"{dtype}, {runtime}, context {context}"
                    if results.is_late:
                        results.miss(name, "the time was up")
                        continue
                    try:
                        if args.device == "cuda":
                            row = measure(shape.name, dtype, runtime, context, "cuda")
                        else:
                            row = in_child(shape.name, dtype, runtime, str(context))
                    except RuntimeError as error:
                        results.miss(name, str(error))
                        continue
                    results.add(row)
                    print(
                        f"{shape.name} {name}: peak {row['peak_bytes'] / 2**20:.1f} MiB, "
                        f"needed {row['needed']['total'] / 2**20:.1f} MiB, {row['peak_over_needed']:.2f}x"
                        f"{' at most' if row['is_upper_bound'] else ''}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
