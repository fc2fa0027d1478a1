"""Pictures of the analyses: similarity, drift, theorem. Needs matplotlib (the extra ``[eval]``).

All can be read in grey: maps rise in lightness, caches differ in lightness and marker, and what agrees is
hollow where what does not is filled.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D

from fastdllm_ext.eval.figures import SHADES, save

MARKERS = {"none": "^", "prefix": "s", "dual": "o"}
MAP = "cividis"
SIDES = {"inside": "inside the bound", "outside": "outside"}


def _open(rows: int, columns: int, size: tuple[float, float], widths: Sequence[float]) -> tuple[Any, Any]:
    """A figure with [rows, columns] axes, and room for a line below them."""
    figure: Any = plt.figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.2 / size[1], 1, 1 - 0.2 / size[1]))
    return figure, figure.subplots(rows, columns, width_ratios=widths, squeeze=False)


def plot_similarity(result: dict[str, Any], path: Path) -> None:
    """Maps of step by step similarity, the mean over layers, and how fast each layer's falls.

    Args:
        result: of ``similarity.measure``.
        path: PNG to write.
    """
    steps, blocks = result["steps"], result["blocks"]
    regions = {"prompt": "prompt", "last_block": "last block"}
    maps = {
        (kind, region): np.array(result[kind][region]) for kind in ("keys", "values") for region in regions
    }
    low = min(float(x.mean(0).min()) for x in maps.values())
    figure, axes = _open(2, 3, (9.6, 6.9), (1, 1, 1.15))
    shades = plt.get_cmap(MAP)
    starts = [i for i in range(1, len(steps)) if blocks[i] != blocks[i - 1]]
    shown: Any = None
    for line, kind in enumerate(("keys", "values")):
        for column, (region, words) in enumerate(regions.items()):
            axis = axes[line][column]
            shown = axis.imshow(
                maps[kind, region].mean(0), vmin=low, vmax=1, cmap=shades, origin="lower",
                interpolation="nearest",
            )  # fmt: skip
            for start in starts:  # white dashes over black, to be seen on every shade
                for draw in (axis.axhline, axis.axvline):
                    draw(start - 0.5, color="black", linewidth=0.5)
                    draw(start - 0.5, color="white", linewidth=0.5, linestyle=(0, (4, 4)))
            ticks = list(range(0, len(steps), max(1, len(steps) // 6)))
            axis.set_xticks(ticks, [str(steps[i]) for i in ticks])
            axis.set_yticks(ticks, [str(steps[i]) for i in ticks])
            least = float(maps[kind, region].mean(0).min())
            axis.set_title(f"{kind}, {words}'s positions (least: {least:.2f})", fontsize=9)
            axis.set(xlabel="denoising step", ylabel="denoising step")
        _plot_decay(axes[line][2], kind, {r: maps[kind, r] for r in regions}, steps, low)
    bar = figure.colorbar(shown, ax=axes[:, :2], location="bottom", fraction=0.035, pad=0.02, aspect=45)
    bar.set_label(
        f"cosine similarity, mean over layers (one scale for all four maps, {low:.2f} to 1)", fontsize=8
    )
    c = result["conditions"]
    _finish(
        figure, result, path, "Similarity of keys and values between denoising steps",
        f"cache none, {c['rule']}; means over prompts, heads and positions; dashed: a block begins",
    )  # fmt: skip


def plot_similarity_layers(result: dict[str, Any], path: Path) -> None:
    """The maps of single layers, eight of them at most, from the first to the last in even strides.

    Args:
        result: of ``similarity.measure``.
        path: PNG to write.
    """
    steps = result["steps"]
    maps = {
        f"{kind}, {region.replace('_', ' ')}": np.array(result[kind][region])
        for region in ("prompt", "last_block")
        for kind in ("keys", "values")
    }
    count = len(next(iter(maps.values())))
    layers = sorted({round(i * (count - 1) / max(1, min(8, count) - 1)) for i in range(min(8, count))})
    low = min(float(x.min()) for x in maps.values())
    figure, axes = _open(len(layers), len(maps), (7.6, 1.75 * len(layers) + 1.3), (1,) * len(maps))
    shown: Any = None
    ticks = [0, len(steps) - 1]
    for line, layer in enumerate(layers):
        for axis, (words, cosines) in zip(axes[line], maps.items(), strict=True):
            shown = axis.imshow(
                cosines[layer], vmin=low, vmax=1, cmap=plt.get_cmap(MAP), origin="lower",
                interpolation="nearest",
            )  # fmt: skip
            axis.set_xticks(ticks, [str(steps[i]) for i in ticks])
            axis.set_yticks(ticks, [str(steps[i]) for i in ticks])
            if line == 0:
                axis.set_title(words, fontsize=9)
            if line == len(layers) - 1:
                axis.set_xlabel("denoising step")
        axes[line][0].set_ylabel(f"layer {layer + 1}\ndenoising step")
    bar = figure.colorbar(shown, ax=axes, location="bottom", fraction=0.02, pad=0.015, aspect=45)
    bar.set_label(f"cosine similarity (one scale for all maps, {low:.2f} to 1)", fontsize=8)
    _finish(
        figure, result, path, f"Similarity of keys and values, layer by layer ({len(layers)} of {count})",
        f"cache none, {result['conditions']['rule']}; means over prompts, heads and positions",
    )  # fmt: skip


def _plot_decay(axis: Any, kind: str, by_region: dict[str, Any], steps: Sequence[int], low: float) -> None:
    """Similarity at a distance of steps: the mean over layers, and the range of the layers."""
    styles = {"prompt": ("#222222", "-", "o"), "last_block": ("#8a8a8a", "--", "s")}
    apart = np.array(steps) - steps[0]
    for region, cosines in by_region.items():
        colour, line, marker = styles[region]
        far = [np.diagonal(cosines, k, 1, 2).mean(-1) for k in range(len(steps))]  # [layers] of each distance
        mean, least, most = ([f(x) for x in far] for f in (np.mean, np.min, np.max))
        axis.fill_between(apart, least, most, color=colour, alpha=0.18, linewidth=0)
        axis.plot(
            apart, mean, color=colour, linestyle=line, marker=marker, markersize=2.8, linewidth=1.2,
            markevery=max(1, len(steps) // 10), label=region.replace("_", " "),
        )  # fmt: skip
    axis.set(xlabel="denoising steps apart", ylabel="cosine similarity")
    axis.set_title(f"{kind}: mean, and range of the layers", fontsize=9)
    axis.set_ylim(top=1 + 0.02 * (1 - min(low, axis.get_ylim()[0])))
    axis.grid(alpha=0.2)
    axis.legend(fontsize=8, loc="lower left")
    axis.spines[["top", "right"]].set_visible(False)


def plot_drift(result: dict[str, Any], path: Path) -> None:
    """Other tokens, other choices and other confidences than the uncached model's.

    Args:
        result: of ``drift.measure``.
        path: PNG to write.
    """
    figure, axes = _open(2, 3, (10.5, 6.2), (1, 1, 1))
    words = {
        "by_since_refresh": "block steps since the refresh (0: a refresh)",
        "by_block": "block of the answer, from 0",
    }
    for line, (key, xlabel) in enumerate(words.items()):
        parts = {
            cache: ([found["refreshes"]] if key == "by_since_refresh" and found["refreshes"] else [])
            + found[key]
            for cache, found in result["caches"].items()
        }
        edges = sorted({(g["from"], g["to"]) for groups in parts.values() for g in groups})
        for number, (cache, groups) in enumerate(parts.items()):
            if not groups:
                continue
            beside = 0.22 * (number - (len(parts) - 1) / 2)
            places = [edges.index((g["from"], g["to"])) + beside for g in groups]
            style = {"color": SHADES[cache], "fmt": MARKERS[cache], "label": f"cache {cache}"}
            for axis, name in zip(axes[line], ("other_token", "not_selected"), strict=False):
                _shares(axis, places, [g[name] for g in groups], style)
            _differences(axes[line][2], places, groups, style)
        for axis in axes[line]:
            axis.set_xticks(range(len(edges)), [f"{a}" if a == b else f"{a}–{b}" for a, b in edges])
            axis.set_xlim(-0.6, len(edges) - 0.4)
            axis.set_xlabel(xlabel)
            axis.grid(axis="y", alpha=0.2)
            axis.spines[["top", "right"]].set_visible(False)
        for axis in axes[line][:2]:
            axis.set_ylim(bottom=-0.03 * axis.get_ylim()[1])
        axes[line][0].set_ylabel("% of committed tokens")
        axes[line][1].set_ylabel("% of committed tokens")
        axes[line][2].set_ylabel("confidence, cached minus uncached")
        axes[line][2].axhline(0, color="#999999", linewidth=0.6)
        _near_zero(axes[line][2], [g for groups in parts.values() for g in groups])
    titles = ("the uncached model has another token", "it would not have filled the position",
              "difference of confidence")  # fmt: skip
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="upper right", ncols=len(labels), frameon=False)
    counts = "; ".join(
        f"{cache}: {sum(g['steps'] for g in found['by_block'])} of {found['steps']['block_step']} block steps"
        for cache, found in result["caches"].items()
    )
    _finish(
        figure, result, path, "What block steps commit, beside the uncached model on the same rows",
        f"{result['conditions']['rule']}; {counts}; bars: 95 %; right: median, middle half, 5 to 95 %",
    )  # fmt: skip


def _shares(
    axis: Any, places: Sequence[float], shares: Sequence[Sequence[float]], style: dict[str, Any]
) -> None:
    percent = [[100 * x for x in share] for share in shares]
    bars = [[max(0.0, v - low) for v, low, _ in percent], [max(0.0, high - v) for v, _, high in percent]]
    axis.errorbar(
        places, [v for v, _, _ in percent], yerr=bars, markersize=4.5, elinewidth=0.8, capsize=2, **style
    )


def _differences(
    axis: Any, places: Sequence[float], groups: Sequence[dict[str, Any]], style: dict[str, Any]
) -> None:
    found = [g["confidence_difference"]["quantiles"] for g in groups]
    colour = style["color"]
    axis.vlines(places, [q["0.05"] for q in found], [q["0.95"] for q in found], color=colour, linewidth=0.8)
    axis.vlines(places, [q["0.25"] for q in found], [q["0.75"] for q in found], color=colour, linewidth=3)
    axis.plot(
        places, [q["0.5"] for q in found], style["fmt"], color=colour, markersize=5.5,
        markeredgecolor="white", markeredgewidth=0.7,
    )  # fmt: skip


def _near_zero(axis: Any, groups: Sequence[dict[str, Any]]) -> None:
    """A scale that shows differences of all sizes where they are of many, and their signs."""
    sizes = [abs(x) for g in groups for x in g["confidence_difference"]["quantiles"].values()]
    largest = max(sizes, default=0.0)
    if largest == 0:
        axis.set_ylim(-0.01, 0.01)
    elif largest < 0.05:
        least = 10.0 ** np.floor(np.log10(max(largest * 1e-3, 1e-7)))
        axis.set_yscale("symlog", linthresh=least)
        axis.set_ylabel(f"confidence, cached minus uncached\n(log scale beyond ±{least:.0e})")


def plot_theorem(result: dict[str, Any], path: Path) -> None:
    """Each checked step by its size and ε, with the bound; and how many of each side agree.

    Args:
        result: of ``theorem.measure``.
        path: PNG to write.
    """
    caches = result["caches"]
    figure, axes = _open(len(caches), 2, (9.5, 0.9 + 3.3 * len(caches)), (1.7, 1))
    for (left, right), (cache, found) in zip(axes, caches.items(), strict=True):
        _plot_steps(left, found)
        _plot_agreement(right, found)
        inside = found["inside"]
        share = "none" if inside is None else f"{100 * inside[0]:.0f} % inside"
        sizes = [x["tokens"] for x in found["checked"]] or [0]
        left.set_title(
            f"cache {cache}: {found['parallel_steps']} parallel steps of {found['steps']}, {share}; "
            f"checked: n from {min(sizes)} to {max(sizes)}",
            fontsize=9,
        )
    _finish(
        figure, result, path, "Parallel commits beside the same positions filled one by one",
        f"{result['conditions']['rule']}; n tokens a step, ε = 1 − least confidence; bars: 95 % (Wilson)",
    )  # fmt: skip


FLOOR = 1e-6  # what (n + 1) ε of less is drawn at: float32 knows little less beside 1


def _plot_steps(axis: Any, found: dict[str, Any]) -> None:
    checked = found["checked"]
    differ = [x["tokens"] - x["agree"] for x in checked]
    products = [max((x["tokens"] + 1) * x["epsilon"], FLOOR) for x in checked]
    spread = np.random.default_rng(0).uniform(-0.3, 0.3, len(checked))  # or equal steps would hide each other
    least = min([*products, 0.01]) / 3
    axis.axvspan(least, 1, color="#eeeeee", linewidth=0)
    axis.axvline(1, color="black", linewidth=1)
    for agrees in (True, False):
        chosen = [i for i, count in enumerate(differ) if (count == 0) == agrees]
        axis.plot(
            [products[i] for i in chosen],
            [differ[i] + spread[i] for i in chosen],
            "o" if agrees else "X", color="#1f5f8b" if agrees else "black", markersize=5 if agrees else 7,
            markerfacecolor="none" if agrees else "black", markeredgewidth=0.9, zorder=3,
        )  # fmt: skip
    largest = max([*differ, 2])
    axis.set(
        xscale="log", xlim=(least, 3 * max([*products, 10])), ylim=(-0.6, largest + 0.8),
        xlabel=f"(n + 1) ε (log scale; what is less is drawn at {FLOOR:.0e})",
        ylabel="tokens that differ from one by one",
    )  # fmt: skip
    axis.set_yticks(range(0, largest + 1, max(1, largest // 6)))
    keys = [
        Line2D([], [], color="#1f5f8b", marker="o", ls="", markerfacecolor="none", label="all tokens agree"),
        Line2D([], [], color="black", marker="X", ls="", label="some differ"),
        Line2D([], [], color="black", linewidth=1, label="(n + 1) ε = 1; inside is grey"),
    ]
    axis.legend(handles=keys, fontsize=8, loc="upper left", framealpha=0.9)
    axis.spines[["top", "right"]].set_visible(False)


def _plot_agreement(axis: Any, found: dict[str, Any]) -> None:
    for place, side in enumerate(SIDES):
        group = found["groups"][side]
        if group["share"] is None:
            axis.text(place, 50, "no step", ha="center", fontsize=8)
            continue
        value, low, high = (100 * x for x in group["share"])
        axis.bar(
            place, value, width=0.55, color=("#9ecae1", "#d0d0d0")[place], edgecolor="black", linewidth=0.7
        )
        axis.errorbar(place, value, yerr=[[value - low], [max(0.0, high - value)]], color="black", capsize=4)
    counts = [found["groups"][side] for side in SIDES]
    axis.set_xticks(
        range(len(SIDES)),
        [
            f"{words}\n{g['agree']} of {g['checked']} steps\n{g['tokens_agree']} of {g['tokens']} tokens"
            for words, g in zip(SIDES.values(), counts, strict=True)
        ],
    )
    axis.set(ylim=(0, 105), xlim=(-0.6, len(SIDES) - 0.4), ylabel="steps that agree in every token, %")
    axis.spines[["top", "right"]].set_visible(False)


def _finish(figure: Any, result: dict[str, Any], path: Path, title: str, conditions: str) -> None:
    for axis in figure.axes:
        axis.xaxis.label.set_size(8)
        axis.yaxis.label.set_size(8)
    c = result["conditions"]
    figure.suptitle(f"{title}\n{conditions}", fontsize=9, x=0.01, ha="left")
    kept = "" if c["kv_cache_dtype"] == c["dtype"] else f", keys and values in {c['kv_cache_dtype']}"
    shortest, longest = c["prompt_tokens"]
    save(
        figure,
        f"{result['model']}, {c['dtype']}{kept}; {c['prompts']} prompts of {shortest} to {longest} "
        f"tokens, generation length {c['gen_length']}, block length {c['block_length']}",
        path,
    )


# Of each part of a report: the names of its pictures.
FIGURES = {
    "kv_similarity": {"kv_similarity": plot_similarity, "kv_similarity_layers": plot_similarity_layers},
    "drift": {"drift": plot_drift},
    "theorem": {"theorem": plot_theorem},
}
