"""Pictures of the performance page, readable in grey. Needs matplotlib (the extra ``[plot]``)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from common import conditions_line

Facts = dict[str, Any]
BLACK = "#303030"
CACHES = {"dual": "#e8935a", "prefix": "#8ab4d8", "none": "#d5d5d5"}
IMPLEMENTATIONS = {
    "fused": "",
    "modules": "//",
    "": "...",
}  # hatches by runtime; published has none
PHASES = {"refresh": "#8ab4d8", "block_steps": "#e8935a", "selection": "#ffffff", "host": "#707070"}
MARKERS = ("o", "s", "^", "D", "v", "x")


def draw(found: dict[tuple[str, str], Facts], folder: Path) -> Iterator[Path]:
    """A picture of each file of results that has one; yields where it lies."""
    makers = {"end_to_end": end_to_end, "phases": phases, "growth": growth, "memory": memory}
    folder.mkdir(parents=True, exist_ok=True)
    plt.rcParams.update({"font.size": 8, "hatch.linewidth": 0.5})
    for (question, device), facts in found.items():
        if question in makers and facts["results"]:
            path = folder / f"performance-{question}-{device}.png"
            figure = makers[question](facts)
            figure.savefig(path, dpi=150)
            plt.close(figure)
            yield path


def end_to_end(facts: Facts) -> Any:
    """Speed over the uncached loop, a panel for each dtype."""
    rows = [
        r for r in facts["results"] if r["implementation"] != "plain loop" and not r["stops_at_eos"]
        and r["tokens_per_step"] > 1
    ]  # fmt: skip
    kinds = list(dict.fromkeys(_kind(r) for r in sorted(rows, key=_rank)))
    dtypes = list(dict.fromkeys(r["dtype"] for r in rows))
    cases = list(dict.fromkeys((r["batch"], r["prompt"], r["gen_length"]) for r in rows))
    height = 0.17 * len(rows) / len(dtypes) + 0.3 * len(cases) + 1.6
    figure, axes = plt.subplots(
        1, len(dtypes), figsize=(5 * len(dtypes) + 1, height), squeeze=False, layout="constrained",
    )  # fmt: skip
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        place, ticks = 0.0, []
        for case in cases:
            shown = [
                r for r in rows if r["dtype"] == dtype and (r["batch"], r["prompt"], r["gen_length"]) == case
            ]
            if not shown:
                continue
            begin = place
            for row in sorted(shown, key=_rank):
                axis.barh(
                    place, row["speedup_over_loop"], 0.9, color=CACHES[row["cache"]],
                    hatch=IMPLEMENTATIONS[row["runtime"]], edgecolor="black", linewidth=0.6, label=_kind(row),
                )  # fmt: skip
                axis.text(
                    row["speedup_over_loop"],
                    place,
                    f" {row['speedup_over_loop']:.1f}",
                    va="center",
                    fontsize=7,
                )
                place += 1
            ticks.append(((begin + place - 1) / 2, f"batch {case[0]}\nprompt {case[1]}\ngen {case[2]}"))
            place += 0.8
        axis.set_yticks([t for t, _ in ticks], [text for _, text in ticks], fontsize=7)
        axis.margins(x=0.12, y=0.01)
        axis.set(xlabel="times the speed of the uncached loop, one token a step")
        axis.set_title(dtype, fontsize=9, loc="left")
        axis.invert_yaxis()
    by_label = {
        label: handle
        for axis in axes[0]
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    shown_kinds = [kind for kind in kinds if kind in by_label]
    figure.legend(
        [by_label[kind] for kind in shown_kinds], shown_kinds, loc="outside lower center", fontsize=7, ncols=3
    )
    rate = rows[0]["tokens_per_step"] if rows else 0
    return _finish(figure, facts, f"Speed over the uncached loop, {rate:g} tokens a step, block 32")


def _kind(row: dict[str, Any]) -> str:
    return f"{row['implementation']} {row['runtime']}".strip() + f", {row['cache']}"


def _rank(row: dict[str, Any]) -> tuple[int, ...]:
    return (
        ("dual", "prefix", "none").index(row["cache"]),
        ("fused", "modules", "").index(row["runtime"]),
    )


def phases(facts: Facts) -> Any:
    """Seconds of each phase, a bar for each cache mode and dtype."""
    rows = facts["results"]
    figure, axis = plt.subplots(figsize=(8, 0.4 * len(rows) + 1.5), layout="constrained")
    hatches = ("", "//", "...", "")
    for place, row in enumerate(rows):
        left = 0.0
        for (name, colour), hatch in zip(PHASES.items(), hatches, strict=True):
            width = row["shares"][name] * row["total"]["median_s"]
            axis.barh(
                place, width, 0.7, left=left, color=colour, hatch=hatch, edgecolor="black", linewidth=0.6,
                label=name.replace("_", " ") if place == 0 else None,
            )  # fmt: skip
            left += width
        axis.text(left, place, f" {row['total']['median_s']:.2f} s", va="center", fontsize=7)
    axis.set_yticks(range(len(rows)), [f"{r['dtype']}, {r['cache']}" for r in rows], fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.1)
    axis.set(xlabel="seconds of a generation")
    axis.legend(fontsize=8)
    row = rows[0]
    return _finish(
        figure,
        facts,
        f"Phases: prompt {row['prompt']}, gen {row['gen_length']}, {row['tokens_per_step']:g} tokens a step",
    )


def growth(facts: Facts) -> Any:
    """Milliseconds against each size, on logarithmic axes."""
    rows = facts["results"]
    varied = list(dict.fromkeys(r["varied"] for r in rows))
    figure, axes = plt.subplots(
        1, len(varied), figsize=(3.6 * len(varied) + 0.6, 3.9), squeeze=False, layout="constrained"
    )
    labels = {"context": "context, positions", "block": "block length, positions", "batch": "batch, rows"}
    for axis, name in zip(axes[0], varied, strict=True):
        series = [r for r in rows if r["varied"] == name]
        for i, dtype in enumerate(dict.fromkeys(r["dtype"] for r in rows)):
            mine = [r for r in series if r["dtype"] == dtype]
            for j, what in enumerate(("refresh", "block_step")):
                axis.plot(
                    [r[name] for r in mine], [1e3 * r[what]["median_s"] for r in mine],
                    marker=MARKERS[2 * i + j], markersize=5, color=BLACK, linestyle=("--", "-")[j],
                    markerfacecolor="white" if i else BLACK, linewidth=1,
                    label=f"{what.replace('_', ' ')}, {dtype}" if mine else None,
                )  # fmt: skip
        sizes = sorted({r[name] for r in series})
        axis.set(xscale="log", yscale="log", xlabel=labels[name], ylabel="milliseconds")
        axis.set_xticks(sizes, [f"{n:,}" for n in sizes], fontsize=7)
        axis.minorticks_off()
        axis.yaxis.set_major_formatter("{x:,g}")
        fixed = {k: series[0][k] for k in ("context", "block", "batch") if k != name}
        axis.set_title(", ".join(f"{k} {v}" for k, v in fixed.items()), fontsize=8, loc="left")
        axis.grid(alpha=0.3)
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", fontsize=7, ncols=4)
    return _finish(figure, facts, "Dual cache: one block step and one refresh")


def memory(facts: Facts) -> Any:
    """Peak and formula against context."""
    rows = facts["results"]
    figure, axis = plt.subplots(figsize=(6, 4.2), layout="constrained")
    for i, (runtime, dtype) in enumerate(dict.fromkeys((r["runtime"], r["dtype"]) for r in rows)):
        mine = [r for r in rows if (r["runtime"], r["dtype"]) == (runtime, dtype)]
        contexts = [r["context"] for r in mine]
        style: dict[str, Any] = {"marker": MARKERS[i % 6], "markersize": 5, "color": BLACK, "linewidth": 1}
        axis.plot(
            contexts, [r["peak_bytes"] / 2**20 for r in mine], label=f"{runtime}, {dtype}: measured", **style
        )
        axis.plot(
            contexts, [r["needed"]["total"] / 2**20 for r in mine], linestyle="--", markerfacecolor="white",
            label=f"{runtime}, {dtype}: memory_needed", **style,
        )  # fmt: skip
    sizes = sorted({r["context"] for r in rows})
    axis.set(xscale="log", yscale="log", xlabel="context, positions", ylabel="MiB over what was there before")
    axis.set_xticks(sizes, [f"{n:,}" for n in sizes], fontsize=8)
    axis.minorticks_off()
    axis.yaxis.set_major_formatter("{x:,g}")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return _finish(figure, facts, f"Peak memory of a generation, batch 1, block {rows[0]['block_length']}")


def _finish(figure: Any, facts: Facts, title: str) -> Any:
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    models = ", ".join(dict.fromkeys(r["model"] for r in facts["results"] if r.get("model")))
    line = conditions_line(facts).replace("; ", "\n", 1)
    figure.suptitle(f"{title}; shape {models}, random weights\n{line}", fontsize=8, x=0.01, ha="left")
    return figure
