"""Pictures of a sweep. Needs matplotlib (the extra ``[eval]``).

Caches differ in lightness and rules in the marker's shape, so that all can be told apart in grey.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

from fastdllm_ext.eval.summary import Row, select

SHADES = {"none": "#b5b5b5", "prefix": "#3f8fc4", "dual": "#6b2400"}
MARKERS = {"steps": "^", "threshold": "o", "factor": "s", "rule": "D"}
NAMES = {"steps": "fixed number a step", "threshold": "threshold", "factor": "factor", "rule": "other rules"}
LINES = {"none": ":", "prefix": "--", "dual": "-"}


def _room() -> ConstrainedLayoutEngine:
    """A layout that leaves a line below for the conditions."""
    return ConstrainedLayoutEngine(rect=(0, 0.035, 1, 0.965))


def _rule(row: Row) -> str:
    return next((name for name in MARKERS if name in row["setting"]), "threshold")


def _finish(figure: Any, facts: dict[str, Any], path: Path) -> None:
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    c = facts["conditions"]
    save(
        figure,
        f"{c['model_name']}, {c['task']} ({c['metric']}), {c['dtype']}, batch {c['batch_size']}, "
        f"{c['machine']}; bars: 95 % intervals over problems",
        path,
    )


def save(figure: Any, conditions: str, path: Path) -> None:
    """Writes a picture with a line below it that says what it holds for."""
    for axis in figure.axes:
        axis.tick_params(labelsize=8)
    figure.text(0.005, 0.005, conditions, fontsize=7, color="#555555")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _percent(triple: Sequence[float]) -> list[float]:
    return [100 * x for x in triple]


def _bars(triples: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[max(0.0, t[0] - t[1]) for t in triples], [max(0.0, t[2] - t[0]) for t in triples]]


def plot_tradeoff(facts: dict[str, Any], path: Path) -> None:
    """Accuracy against tokens per second; the settings that no other beats are numbered and named."""
    length = facts["conditions"]["gen_length"]
    rows = [row for row in facts["settings"] if row["setting"]["gen_length"] == length]
    figure, (axis, names) = plt.subplots(1, 2, figsize=(10.5, 5.6), width_ratios=(3, 1.25), layout=_room())
    for row in rows:
        speed, right = row["tokens_per_second"], _percent(row["accuracy"])
        shade = SHADES[row["setting"].get("cache", "dual")]
        axis.errorbar(
            speed[0], right[0], xerr=_bars([speed]), yerr=_bars([right]), fmt=MARKERS[_rule(row)],
            color=shade, markersize=5.5, markeredgecolor="black" if row["on_front"] else shade,
            elinewidth=0.5, ecolor="#cccccc", zorder=3 if row["on_front"] else 2,
        )  # fmt: skip
    front = sorted((row for row in rows if row["on_front"]), key=lambda row: row["tokens_per_second"][0])
    axis.plot(
        [row["tokens_per_second"][0] for row in front],
        [100 * row["accuracy"][0] for row in front],
        color="black", linewidth=0.8, zorder=1, drawstyle="steps-pre",
    )  # fmt: skip
    for number, row in enumerate(front, start=1):
        axis.annotate(
            str(number), (row["tokens_per_second"][0], 100 * row["accuracy"][0]), xytext=(0, 6),
            textcoords="offset points", fontsize=8, fontweight="bold", ha="center",
        )  # fmt: skip
    axis.set(xscale="log", xlabel="answer tokens per second, up to EOS (log scale)", ylabel="accuracy, %")
    axis.grid(alpha=0.25)
    keys = [Line2D([], [], color=shade, marker="o", ls="", label=f"cache {c}") for c, shade in SHADES.items()]
    seen = {_rule(row) for row in rows}
    keys += [
        Line2D([], [], color="#777777", marker=marker, ls="", label=NAMES[rule])
        for rule, marker in MARKERS.items()
        if rule in seen
    ]
    axis.legend(handles=keys, fontsize=7.5, loc="lower left", framealpha=0.9)
    names.axis("off")
    lines = [
        f"{n}  {row['label']}\n    {100 * row['accuracy'][0]:.1f} %, {row['tokens_per_second'][0]:,.0f} "
        f"tokens/s, {row['tokens_per_forward'][0]:.1f} a forward"
        for n, row in enumerate(front, start=1)
    ]
    title = "No other setting is faster and more accurate:\n\n"
    names.text(0, 1, title + "\n".join(lines), va="top", fontsize=7.5, transform=names.transAxes)
    figure.suptitle(f"Accuracy against speed, generation length {length}", fontsize=11, x=0.01, ha="left")
    _finish(figure, facts, path)


def plot_thresholds(facts: dict[str, Any], path: Path) -> None:
    """The paper's figure 5: accuracy, forwards, tokens per forward over thresholds; fixed numbers beside."""
    shape = facts["conditions"]
    lengths = {"gen_length": shape["gen_length"], "block_length": shape["block_length"]}
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.9), layout=_room())
    panels = (("accuracy", "accuracy, %", 100), ("nfe", "forwards a problem", 1),
              ("tokens_per_forward", "answer tokens a forward", 1))  # fmt: skip
    for axis, (key, words, scale) in zip(axes, panels, strict=True):
        for cache in SHADES:
            rows = select(facts["settings"], cache=cache, threshold=..., **lengths)
            rows.sort(key=lambda row: row["setting"]["threshold"])
            if rows:
                triples = [[scale * x for x in row[key]] for row in rows]
                axis.errorbar(
                    [row["setting"]["threshold"] for row in rows], [t[0] for t in triples],
                    yerr=_bars(triples), fmt="o" + LINES[cache], color=SHADES[cache], label=f"cache {cache}",
                    markersize=4, linewidth=1.2, elinewidth=0.6, capsize=2,
                )  # fmt: skip
        fixed = select(facts["settings"], cache="dual", steps=..., **lengths)
        heights = {row["label"].split(", ")[1]: scale * row[key][0] for row in fixed}
        _mark_heights(axis, heights, log=key == "nfe")
        axis.set(xlabel="threshold", ylabel=words)
        axis.grid(alpha=0.2)
    axes[1].yaxis.set_major_formatter("{x:g}")
    axes[1].yaxis.set_minor_formatter(NullFormatter())
    axes[0].legend(fontsize=7.5, loc="lower right")
    figure.suptitle(
        f"Thresholds, and (dotted) a fixed number of tokens a step with cache dual: generation length "
        f"{shape['gen_length']}, block length {shape['block_length']}",
        fontsize=10, x=0.01, ha="left",
    )  # fmt: skip
    _finish(figure, facts, path)


def _mark_heights(axis: Any, heights: dict[str, float], log: bool) -> None:
    """Dotted lines across, each with its name; names of lines that all but meet stand side by side."""
    if log:
        axis.set_yscale("log")
    place = math.log if log else float
    low, high = map(place, axis.get_ylim())
    groups: list[tuple[float, list[str]]] = []
    for name, height in sorted(heights.items(), key=lambda item: item[1]):
        axis.axhline(height, color="#999999", linewidth=0.7, linestyle=(0, (1, 2)))
        if groups and place(height) - place(groups[-1][0]) < 0.045 * (high - low):
            groups[-1][1].append(name)
        else:
            groups.append((height, [name]))
    for height, names in groups:
        axis.annotate(
            "; ".join(names), (0.0, height), xycoords=("axes fraction", "data"), xytext=(2, 1.5),
            textcoords="offset points", fontsize=7, color="#555555",
        )  # fmt: skip


def plot_blocks(facts: dict[str, Any], path: Path) -> None:
    """The paper's figure 4: accuracy and tokens per second over block lengths."""
    c = facts["conditions"]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.7), layout=_room())
    panels = (("accuracy", "accuracy, %", 100), ("tokens_per_second", "answer tokens per second", 1))
    for axis, (key, words, scale) in zip(axes, panels, strict=True):
        for cache in ("prefix", "dual"):
            rows = select(
                facts["settings"], cache=cache, threshold=0.9, gen_length=c["gen_length"], block_length=...
            )
            rows.sort(key=lambda row: row["setting"]["block_length"])
            if rows:
                triples = [[scale * x for x in row[key]] for row in rows]
                axis.errorbar(
                    [row["setting"]["block_length"] for row in rows], [t[0] for t in triples],
                    yerr=_bars(triples), fmt=("s" if cache == "prefix" else "o") + LINES[cache],
                    color=SHADES[cache], label=f"cache {cache}", markersize=4.5, elinewidth=0.6, capsize=2,
                )  # fmt: skip
                axis.set_xscale("log", base=2)
                axis.set_xticks(
                    [row["setting"]["block_length"] for row in rows],
                    [str(row["setting"]["block_length"]) for row in rows],
                )
        axis.set(xlabel="block length, tokens", ylabel=words)
        axis.grid(alpha=0.2)
        axis.minorticks_off()
    axes[0].legend(fontsize=8)
    figure.suptitle(
        f"Block lengths: threshold 0.9, generation length {c['gen_length']}", fontsize=10, x=0.01, ha="left"
    )
    _finish(figure, facts, path)


def plot_rules(facts: dict[str, Any], path: Path) -> None:
    """Accuracy against tokens per forward of every rule with the dual cache, each over its own range."""
    c = facts["conditions"]
    lengths = {"gen_length": c["gen_length"], "block_length": c["block_length"]}
    series: dict[str, list[Row]] = {}
    for rule in MARKERS:
        for row in select(facts["settings"], cache="dual", **{rule: ...}, **lengths):
            name = NAMES[rule] if rule != "rule" else str(row["setting"]["rule"]).partition(":")[0]
            series.setdefault(name, []).append(row)
    figure, axis = plt.subplots(figsize=(8.5, 5), layout=_room())
    greys = plt.get_cmap("viridis")
    for i, (name, rows) in enumerate(series.items()):
        rows.sort(key=lambda row: row["tokens_per_forward"][0])
        right = [_percent(row["accuracy"]) for row in rows]
        axis.errorbar(
            [row["tokens_per_forward"][0] for row in rows], [t[0] for t in right], yerr=_bars(right),
            fmt="^osDvPX*<>"[i % 10], ls=("-", "--", ":", "-.")[i % 4], label=name, linewidth=1.1,
            color=greys(0.85 * i / max(1, len(series) - 1)), markersize=5, elinewidth=0.6, capsize=2,
        )  # fmt: skip
    axis.set(xscale="log", xlabel="answer tokens a forward (log scale)", ylabel="accuracy, %")
    axis.grid(alpha=0.2)
    axis.legend(fontsize=8, loc="lower left")
    figure.suptitle(
        f"Rules at equal forwards: cache dual, generation length {c['gen_length']}, block length "
        f"{c['block_length']}",
        fontsize=10, x=0.01, ha="left",
    )  # fmt: skip
    _finish(figure, facts, path)
