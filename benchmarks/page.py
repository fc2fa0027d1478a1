"""What have the benchmarks found? docs/performance.md and its pictures, from the files of results alone.

    python benchmarks/page.py --results benchmarks/results --out docs/performance.md --images docs/images

Takes ``end_to_end``, ``phases``, ``growth``, ``memory``, ``precision`` and ``ops``, each ``-cpu.json`` and
``-cuda.json``, as far as they are there. Pictures need matplotlib; without it the page has none that are new.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import ROOT, conditions_line

QUESTIONS = ("end_to_end", "phases", "growth", "memory", "precision", "ops")
DEVICES = {"cpu": "CPU", "cuda": "GPU"}
Facts = dict[str, Any]
Found = dict[tuple[str, str], Facts]  # by question and device
Row = dict[str, Any]
MIB = 2**20


def load(folder: Path) -> Found:
    """The files of results that are in a folder."""
    return {
        (question, device): json.loads(path.read_text(encoding="utf-8"))
        for question in QUESTIONS
        for device in DEVICES
        for path in [folder / f"{question}-{device}.json"]
        if path.exists()
    }


def select(facts: Facts | None, **wanted: Any) -> list[Row]:
    """Rows of results with these values."""
    rows: list[Row] = [] if facts is None else facts["results"]
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


# ---------------------------------------------------------------------------------------------------------
# Targets
# ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A bound, and what was measured: the worst of the cases that it is about. Nothing measured is None."""

    device: str
    what: str
    bound: float
    is_least: bool  # the measure must reach the bound; else it must not exceed it
    measured: float | None
    case: str
    question: str

    @property
    def verdict(self) -> str:
        """As the page says it."""
        if self.measured is None:
            return f"not measured: no {DEVICES[self.device]} result yet"
        met = self.measured >= self.bound if self.is_least else self.measured <= self.bound
        return "met" if met else "missed"


def worst(cases: Iterable[tuple[float, str]], is_least: bool) -> tuple[float | None, str]:
    """The measure farthest from its bound, and its case."""
    found = sorted(cases, reverse=not is_least)
    return found[0] if found else (None, "")


def against_published(facts: Facts | None, dtype: str) -> Iterator[tuple[float, str]]:
    """Seconds of the published dual cache over those of ours, 128 tokens in 32 steps."""
    for ours in select(
        facts, implementation="fastdllm_ext", cache="dual", runtime="fused", dtype=dtype, batch=1,
        gen_length=128, steps=32, stops_at_eos=False,
    ):  # fmt: skip
        case = {name: ours[name] for name in ("prompt", "gen_length", "steps", "batch", "dtype")}
        for theirs in select(facts, implementation="published", cache="dual", **case):
            yield theirs["median_s"] / ours["median_s"], f"prompt {ours['prompt']}"


def growth_ratio(facts: Facts | None) -> Iterator[tuple[float, str]]:
    """A block step at a context of 4,096 over one at 512, bfloat16."""
    by_context = {
        r["context"]: r["block_step"]["median_s"] for r in select(facts, varied="context", dtype="bfloat16")
    }
    if {512, 4096} <= set(by_context):
        yield by_context[4096] / by_context[512], "batch 1, block 32"


def fast_dual(facts: Facts | None, **wanted: Any) -> list[Row]:
    """Our dual cache with several tokens a step, fused."""
    rows = select(
        facts, implementation="fastdllm_ext", cache="dual", runtime="fused", model="llada-8b", **wanted
    )
    return [row for row in rows if row["tokens_per_step"] > 1]


def batch_gain(facts: Facts | None) -> Iterator[tuple[float, str]]:
    """Tokens a second at batch 16 over those at batch 1, by case."""
    for many in fast_dual(facts, batch=16):
        case = {name: many[name] for name in ("prompt", "gen_length", "dtype", "stops_at_eos")}
        for one in fast_dual(facts, batch=1, **case):
            gain = many["tokens_per_second"] / one["tokens_per_second"]
            yield gain, f"prompt {many['prompt']}, gen {many['gen_length']}"


def targets(found: Found) -> list[Target]:
    """All of them, with what was measured."""
    ends = {device: found.get(("end_to_end", device)) for device in DEVICES}
    phases = [
        row for row in select(found.get(("phases", "cuda")), cache="dual", model="llada-8b", dtype="bfloat16")
    ]

    def shot(rows: list[Row]) -> list[tuple[float, str]]:
        return [
            (r["speedup_over_loop"], f"prompt {r['prompt']}, gen 1024, {r['tokens']} tokens, NFE {r['nfe']}")
            for r in rows
        ]

    floors = [
        (r["block_step"]["times_floor"], f"context {r['prompt'] + r['gen_length']}")
        for r in phases
        if "times_floor" in r.get("block_step", {})
    ]
    refreshes = [
        (r["refresh"]["of_matmul"], f"context {r['prompt'] + r['gen_length']}")
        for r in phases
        if "refresh" in r
    ]
    published = {dtype: list(against_published(ends["cpu"], dtype)) for dtype in ("bfloat16", "float32")}
    steps = list(growth_ratio(found.get(("growth", "cpu"))))
    long, batches = {"gen_length": 1024, "batch": 1}, list(batch_gain(ends["cuda"]))
    whole, stopped = (shot(fast_dual(ends["cuda"], stops_at_eos=eos, **long)) for eos in (False, True))
    cpu_case = "128 tokens, 32 steps, dual cache: times the speed of the published one"
    list_of: list[tuple[str, str, str, float, bool, list[tuple[float, str]]]] = [
        ("cpu", "end_to_end", f"{cpu_case}, bfloat16", 3.0, True, published["bfloat16"]),
        ("cpu", "end_to_end", f"{cpu_case}, float32", 1.7, True, published["float32"]),
        ("cpu", "growth", "block step at context 4,096 over one at 512, bfloat16", 1.6, False, steps),
        ("cuda", "phases", "block step of LLaDA-8B over its bytes floor", 1.35, False, floors),
        ("cuda", "phases", "refresh of LLaDA-8B: share of a matrix product's rate", 0.6, True, refreshes),
        (
            "cuda",
            "end_to_end",
            "8-shot, gen 1,024: times the uncached loop's speed",
            27.6,
            True,
            whole,
        ),
        ("cuda", "end_to_end", "the same, EOS after about 230 tokens", 100.0, True, stopped),
        ("cuda", "end_to_end", "tokens/s at batch 16 over batch 1", 8.0, True, batches),
    ]
    return [
        Target(device, what, bound, is_least, *worst(cases, is_least), question)
        for device, question, what, bound, is_least, cases in list_of
    ]


# ---------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Three figures; thousands whole."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def table(columns: dict[str, Callable[[Row], str]], rows: list[Row]) -> str:
    """Markdown."""
    lines = [
        list(columns),
        ["---"] * len(columns),
        *([text(row) for text in columns.values()] for row in rows),
    ]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def spread(row: Row, scale: float = 1.0) -> str:
    """Median, quartiles and number of samples."""
    low, high = row["quartiles_s"]
    samples = len(row["samples_s"])
    if samples < 3:
        return f"{number(scale * row['median_s'])} (n {samples})"
    return f"{number(scale * row['median_s'])} [{number(scale * low)}, {number(scale * high)}] (n {samples})"


def prose(text: str) -> str:
    """A paragraph of lines of 118 characters at most."""
    return textwrap.fill(" ".join(text.split()), 118, break_long_words=False, break_on_hyphens=False)


class Page:
    """The page as Markdown, section by section.

    Args:
        found: results.
        results: the folder that they lie in.
        out: where the page is going to lie.
        images: the folder of its pictures.
    """

    def __init__(self, found: Found, results: Path, out: Path, images: Path) -> None:
        self.found = found
        self._results = Path(os.path.relpath(results, out.parent)).as_posix()
        self._images = Path(os.path.relpath(images, out.parent)).as_posix()

    def render(self) -> str:
        """All of it."""
        sections: list[Callable[[], Iterator[str]]] = [
            self.head, self.targets, self.gain, self.published, self.same_tokens, self.phases, self.growth,
            self.memory, self.precision, self.operations,
        ]  # fmt: skip
        return "\n\n".join(part for section in sections for part in section()) + "\n"

    def _unmeasured(self, question: str) -> Iterator[str]:
        lacking = [DEVICES[device] for device in DEVICES if (question, device) not in self.found]
        if lacking:
            yield f"Not measured: no {' and no '.join(lacking)} result yet."

    def head(self) -> Iterator[str]:
        """What this is."""
        yield "# Performance"
        yield prose("""
            Written by `make bench-page` from the files in `benchmarks/results`; no number here is typed.
            `make bench` measures on the machine at hand and writes a page like this one to `build/bench`;
            `benchmarks/run_gpu.sh` measures on a GPU. Speeds are ratios within one run, whose candidates
            took turns; a time is the median, with the quartiles in brackets and the number n of samples.
            Weights are random, so schedules are fixed: so many tokens a step.
        """)

    def targets(self) -> Iterator[str]:
        """Bounds against measures."""
        rows = [vars(t) | {"verdict": t.verdict} for t in targets(self.found)]
        yield "## Targets"
        yield table(
            {
                "on": lambda t: DEVICES[t["device"]],
                "what": lambda t: t["what"],
                "target": lambda t: ("≥ " if t["is_least"] else "≤ ") + f"{t['bound']:g}",
                "measured": lambda t: "–" if t["measured"] is None else number(t["measured"]),
                "worst case": lambda t: t["case"] or "–",
                "": lambda t: t["verdict"],
                "file": lambda t: (
                    "–" if t["measured"] is None else self._link(t["question"], t["device"])
                ),
            },
            rows,
        )  # fmt: skip

    def gain(self) -> Iterator[str]:
        """End to end."""
        yield "## What does a user gain?"
        yield prose("""
            Against the uncached loop as it is published, on the unpatched model: a forward over the whole
            row for every token, no stop at the end, rows of a batch one after the other. Its time is
            extrapolated: all of its forwards do the same work, of which n were measured.
        """)
        yield from self._unmeasured("end_to_end")
        for device, facts in self._with("end_to_end"):
            yield from self._conditions("end_to_end", device, facts)
            yield self._image("end_to_end", device, "Speed over the uncached loop")
            yield table(
                {
                    "dtype": lambda r: r["dtype"],
                    "batch": lambda r: str(r["batch"]),
                    "prompt": lambda r: str(r["prompt"]),
                    "gen": lambda r: str(r["gen_length"]),
                    "implementation": _implementation,
                    "cache": lambda r: r["cache"],
                    "tokens a step": lambda r: f"{r['tokens_per_step']:g}",
                    "NFE": lambda r: str(r["nfe"]),
                    "seconds": lambda r: (
                        spread(r) + (", extrapolated" if r["extrapolated_from_steps"] else "")
                    ),
                    "tokens/s": lambda r: number(r["tokens_per_second"]),
                    "speed-up": lambda r: f"{number(r['speedup_over_loop'])}x",
                },
                facts["results"],
            )  # fmt: skip

    def published(self) -> Iterator[str]:
        """Ours over theirs."""
        yield "## Against the published implementation"
        yield prose("""
            NVlabs/Fast-dLLM's code for LLaDA with the same weights (the same memory), prompt and schedule,
            in turns with ours. Its seconds over ours; and the share of tokens that are equal.
        """)
        yield from self._unmeasured("end_to_end")
        for device, facts in self._with("end_to_end"):
            rows = []
            for theirs in select(facts, implementation="published"):
                case = {n: theirs[n] for n in ("cache", "prompt", "gen_length", "batch", "dtype", "steps")}
                for ours in select(facts, implementation="fastdllm_ext", stops_at_eos=False, **case):
                    equal = [s for name, s in ours["tokens_equal"].items() if name.startswith("published")]
                    rows.append(
                        ours | {"ratio": theirs["median_s"] / ours["median_s"], "equal": equal[0]}
                        | {"theirs": theirs}
                    )  # fmt: skip
            if not rows:
                why = "; ".join(w for n, w in facts["missing"].items() if n.startswith("published"))
                yield f"Not measured on the {DEVICES[device]}: {why or 'no row of it'}."
                continue
            yield from self._conditions("end_to_end", device, facts)
            digests = ", ".join(f"{n} {d}" for n, d in facts.get("reference", {}).get("sha256", {}).items())
            yield f"The published files, by the beginning of their SHA-256: {digests}."
            yield table(
                {
                    "dtype": lambda r: r["dtype"],
                    "prompt": lambda r: str(r["prompt"]),
                    "gen": lambda r: str(r["gen_length"]),
                    "cache": lambda r: r["cache"],
                    "steps": lambda r: str(r["steps"]),
                    "ours": lambda r: r["runtime"],
                    "published, s": lambda r: spread(r["theirs"]),
                    "ours, s": lambda r: spread(r),
                    "ratio": lambda r: f"{number(r['ratio'])}x",
                    "equal tokens": lambda r: f"{100 * r['equal']:.1f}%",
                },
                sorted(rows, key=_case),
            )  # fmt: skip

    def same_tokens(self) -> Iterator[str]:
        """Least share of equal tokens between implementations."""
        yield "## Are the tokens the same?"
        yield prose("""
            The runtimes, and the published code, add in different orders, and so round differently.
            Confidences of random weights lie close together: where two are nearly equal, another position
            or token is filled, and all that follow see it. In float32 that takes a tie in six digits or so;
            in bfloat16 it is common. Shares of equal tokens, over all cases with the same settings:
        """)
        yield from self._unmeasured("end_to_end")
        for device, facts in self._with("end_to_end"):
            shares: dict[tuple[str, str, str], list[float]] = {}
            for row in facts["results"]:
                for name, share in row["tokens_equal"].items():
                    pair = tuple(sorted((_implementation(row), name.split(",")[0])))
                    shares.setdefault((row["dtype"], *pair), []).append(share)
            rows = [{"dtype": d, "a": a, "b": b, "shares": s} for (d, a, b), s in sorted(shares.items())]
            if rows:
                yield from self._conditions("end_to_end", device, facts)
                yield table(
                    {
                        "dtype": lambda r: r["dtype"],
                        "between": lambda r: f"{r['a']} and {r['b']}",
                        "least share": lambda r: f"{100 * min(r['shares']):.1f}%",
                        "median share": lambda r: f"{100 * statistics.median(r['shares']):.1f}%",
                    },
                    rows,
                )

    def phases(self) -> Iterator[str]:
        """Shares, floors, operations."""
        yield "## Where does the time go?"
        yield prose("""
            The head is within refresh and block steps, by its share under torch's profiler. A block step's
            floor is the bytes of layer weights, head, keys and values, and logits over the bandwidth
            measured in the same run; a refresh is held against a large matrix product. Below: the
            operations of one turn by their own time, under the profiler, ten at most; `other` is Python
            between them.
        """)
        yield from self._unmeasured("phases")
        for device, facts in self._with("phases"):
            yield from self._conditions("phases", device, facts)
            ceilings = ", ".join(
                f"{d} {m['flop_per_s'] / 1e12:.2f} TFLOP/s" for d, m in facts["matmul"].items()
            )
            yield (
                f"Measured in this run: {facts['bandwidth']['bytes_per_s'] / 1e9:.1f} GB/s; matrix product "
                f"{ceilings}."
            )
            yield self._image("phases", device, "Phases of a generation")

            def share(name: str) -> Callable[[Row], str]:
                return lambda r: f"{100 * r['shares'][name]:.1f}%"

            yield table(
                {
                    "dtype": lambda r: r["dtype"],
                    "cache": lambda r: r["cache"],
                    "prompt, gen": lambda r: f"{r['prompt']}, {r['gen_length']}",
                    "seconds": lambda r: spread(r["total"]),
                    "refresh": share("refresh"),
                    "block steps": share("block_steps"),
                    "selection": share("selection"),
                    "host": share("host"),
                    "(head)": share("head"),
                    "block step, ms": lambda r: spread(r["block_step"], 1e3) if "block_step" in r else "–",
                    "over its floor": lambda r: _floor(r),
                    "refresh, ms": lambda r: spread(r["refresh"], 1e3) if "refresh" in r else "–",
                    "of matmul": lambda r: (
                        f"{100 * r['refresh']['of_matmul']:.0f}%" if "refresh" in r else "–"
                    ),
                },
                facts["results"],
            )  # fmt: skip
            for row in select(facts, cache="dual"):
                for turn in row["operations"]:
                    name = {"refresh": "refresh", "block_step": "block step"}[turn["turn"]]
                    milliseconds = number(1e3 * turn["seconds_a_turn"])
                    yield f"A {name}, dual cache, {row['dtype']}: {milliseconds} ms under the profiler"
                    yield table(
                        {
                            "operation": lambda o: f"`{o['name']}`",
                            "ms": lambda o: f"{1e3 * o['seconds']:.3f}",
                            "share": lambda o: f"{100 * o['share']:.1f}%",
                            "calls": lambda o: f"{o['calls']:.1f}",
                        },
                        turn["operations"],
                    )

    def growth(self) -> Iterator[str]:
        """Series and fits."""
        yield "## How does cost grow?"
        yield prose("""
            Dual cache. The exponent e is that of the best c · size^e: 0 does not grow, 1 grows in
            proportion.
        """)
        yield from self._unmeasured("growth")
        for device, facts in self._with("growth"):
            yield from self._conditions("growth", device, facts)
            yield self._image("growth", device, "A block step and a refresh as they grow")
            yield table(
                {
                    "dtype": lambda f: f["dtype"],
                    "what": lambda f: f["what"].replace("_", " "),
                    "with": lambda f: f["varied"],
                    "from, to": lambda f: f"{f['sizes'][0]}, {f['sizes'][-1]}",
                    "exponent": lambda f: f"{f['exponent']:.2f}",
                    "last over first": lambda f: f"{number(f['last_over_first'])}x",
                },
                facts.get("fits", []),
            )
            yield from self._what_grows(facts)
            yield table(
                {
                    "dtype": lambda r: r["dtype"],
                    "varied": lambda r: r["varied"],
                    "context": lambda r: str(r["context"]),
                    "block": lambda r: str(r["block"]),
                    "batch": lambda r: str(r["batch"]),
                    "block step, ms": lambda r: spread(r["block_step"], 1e3),
                    "refresh, ms": lambda r: spread(r["refresh"], 1e3),
                },
                facts["results"],
            )

    def _what_grows(self, facts: Facts) -> Iterator[str]:
        """Operations of a block step at the smallest and at the largest context."""
        found = facts.get("operations", [])
        for dtype in dict.fromkeys(entry["dtype"] for entry in found):
            small, large = [
                {operation["name"]: operation["seconds"] for operation in entry["operations"]}
                for entry in found
                if entry["dtype"] == dtype
            ]
            contexts = [entry["context"] for entry in found if entry["dtype"] == dtype]
            yield f"Operations of a block step under the profiler, {dtype}, ms:"
            yield table(
                {
                    "operation": lambda r: f"`{r[0]}`" if r[0] != "other" else r[0],
                    f"context {contexts[0]}": lambda r: number(1e3 * r[1]) if r[1] is not None else "–",
                    f"context {contexts[1]}": lambda r: number(1e3 * r[2]),
                },
                [(name, small.get(name), seconds) for name, seconds in large.items()],
            )

    def memory(self) -> Iterator[str]:
        """Peak and formula."""
        yield "## Does a generation take the memory that it says?"
        yield prose("""
            The peak of a generation over what was there before it, against `fd.memory_needed`
            ([memory.md](memory.md)). The high-water mark of a process counts what libraries and the
            allocator hold as well, some tens of MiB.
        """)
        yield from self._unmeasured("memory")
        for device, facts in self._with("memory"):
            yield from self._conditions("memory", device, facts)
            yield self._image("memory", device, "Peak memory")
            yield table(
                {
                    "dtype": lambda r: r["dtype"],
                    "runtime": lambda r: r["runtime"],
                    "context": lambda r: f"{r['context']:,}",
                    "peak, MiB": lambda r: (
                        ("at most " if r["is_upper_bound"] else "") + number(r["peak_bytes"] / MIB)
                    ),
                    "memory_needed, MiB": lambda r: number(r["needed"]["total"] / MIB),
                    "pages": lambda r: number(r["needed"]["pages"] / MIB),
                    "activations": lambda r: number(r["needed"]["activations"] / MIB),
                    "peak over needed": lambda r: f"{r['peak_over_needed']:.2f}",
                },
                facts["results"],
            )  # fmt: skip

    def precision(self) -> Iterator[str]:
        """Options of fewer bits: what they gain, and what they cost."""
        yield "## What do fewer bits gain, and what do they cost?"
        yield prose("""
            `fd.patch(model, quantization=..., kv_cache_dtype=...)`. Speed: 128 tokens, 4 a step, dual cache,
            one row, random weights, over the same model without an option. Accuracy: answers of the demo
            model to held-out prompts, and the share of answers that are, token for token, those without an
            option. fp8 products run on a CPU to measure their accuracy alone.
        """)
        yield from self._unmeasured("precision")
        for device, facts in self._with("precision"):
            yield from self._conditions("precision", device, facts)
            options: dict[str, Callable[[Row], str]] = {
                "dtype": lambda r: r["dtype"],
                "weights": lambda r: _option(r["quantization"]),
                "keys and values": lambda r: _option(r["kv_cache_dtype"]),
            }
            yield table(
                options
                | {
                    "prompt": lambda r: str(r["prompt"]),
                    "seconds": lambda r: spread(r["total"]),
                    "speed": lambda r: f"{number(r['speedup'])}x",
                    "block step, ms": lambda r: spread(r["block_step"], 1e3),
                    "refresh, ms": lambda r: spread(r["refresh"], 1e3),
                },
                select(facts, question="speed"),
            )
            yield table(
                options
                | {
                    "rule": lambda r: r["rule"],
                    "right": lambda r: f"{100 * r['accuracy']:.1f}% of {r['prompts']}",
                    "NFE": lambda r: f"{r['nfe']:.1f}",
                    "same answers": lambda r: f"{100 * r['rows_equal']:.1f}%",
                },
                select(facts, question="accuracy"),
            )

    def operations(self) -> Iterator[str]:
        """The operations alone."""
        yield "## Is each operation near its floor?"
        yield prose("""
            One block step's shapes, 32 queries a row. GB/s: the bytes that must move once, over the time;
            beside a copy's rate in the same run. Times ours: the call's time over that of the first of its
            case.
        """)
        yield from self._unmeasured("ops")
        for device, facts in self._with("ops"):
            yield from self._conditions("ops", device, facts)
            yield table(
                {
                    "dtype": lambda r: r["dtype"],
                    "shape": lambda r: f"{r['model'] or '–'}, batch {r['batch']}",
                    "context": lambda r: str(r["context"]) if r["context"] else "–",
                    "call": lambda r: r["call"],
                    "ms": lambda r: (
                        f"{r['median_ms']:.3f} [{r['quartiles_ms'][0]:.3f}, {r['quartiles_ms'][1]:.3f}] "
                        f"(n {len(r['samples_s'])})"
                    ),
                    "GB/s": lambda r: f"{r['gb_per_s']:,.1f}",
                    "of copy": lambda r: f"{r['of_copy']:.2f}",
                    "times ours": lambda r: f"{number(r['times_ours'])}x",
                },
                facts["results"],
            )

    def _with(self, question: str) -> Iterator[tuple[str, Facts]]:
        for device in DEVICES:
            if (question, device) in self.found:
                yield device, self.found[question, device]

    def _conditions(self, question: str, device: str, facts: Facts) -> Iterator[str]:
        rows = facts["results"]
        models = ", ".join(dict.fromkeys(r["model"] for r in rows if r.get("model")))
        settings = ", ".join(
            f"{name.replace('_', ' ')} {value}"
            for name, value in facts.get("conditions", {}).items()
            if isinstance(value, (int, float, str)) and not name.endswith("bytes") and name != "ratios"
        )
        yield prose(
            f"**{DEVICES[device]}**, {self._link(question, device)}: {conditions_line(facts)}. "
            f"Shape {models or '–'}; {settings}. `{facts['command']}`"
        )
        if facts["missing"]:
            left_out = "; ".join(f"{name}: {why}" for name, why in facts["missing"].items())
            yield prose(f"Without {left_out}.")

    def _link(self, question: str, device: str) -> str:
        name = f"{question}-{device}.json"
        return f"[{name}]({self._results}/{name})"

    def _image(self, question: str, device: str, text: str) -> str:
        return f"![{text}]({self._images}/performance-{question}-{device}.png)"


def _option(name: str) -> str:
    return {"none": "–", "auto": "–"}.get(name, name)


def _implementation(row: Row) -> str:
    return f"{row['implementation']} {row['runtime']}".strip() + (
        ", stops at EOS" if row["stops_at_eos"] else ""
    )


def _case(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("dtype", "prompt", "gen_length", "cache", "runtime"))


def _floor(row: Row) -> str:
    step = row.get("block_step", {})
    return f"{step['times_floor']:.2f}x" if "times_floor" in step else "–"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/performance.md")
    parser.add_argument("--images", type=Path, default=ROOT / "docs/images")
    args = parser.parse_args()
    found = load(args.results)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(Page(found, args.results, args.out, args.images).render(), encoding="utf-8")
    print(f"{args.out} from {', '.join(f'{q}-{d}.json' for q, d in found) or 'no results'}")
    try:
        import figures
    except ImportError:
        print("no pictures: matplotlib is not installed")
        return
    for path in figures.draw(found, args.images):
        print(path)


if __name__ == "__main__":
    main()
