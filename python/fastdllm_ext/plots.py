"""Pictures of results. Needs matplotlib (the extra ``[plot]``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle

COLOURS = {"none": "#8c8c8c", "prefix": "#2a7ab9", "dual": "#d95f0e"}


def plot_denoising(
    title: str, tokens: list[str], steps: list[int], confidence: list[float], path: Path
) -> None:
    """An answer as it emerges: a line a step, what the step committed coloured by confidence.

    Args:
        title: above the picture.
        tokens: text of each position.
        steps: the step that committed each position.
        confidence: of each position, 0 to 1.
        path: PNG to write.
    """
    signs = [token.replace("\n", "⏎") for token in tokens]
    widths = [max(1, len(sign)) for sign in signs]
    places = [sum(widths[:i]) for i in range(len(widths))]
    total, order = sum(widths), sorted(set(steps))
    figure, axis = plt.subplots(figsize=(0.105 * total + 0.9, 0.24 * len(order) + 0.75), layout="constrained")
    shades = plt.get_cmap("RdYlGn")
    for line, now in enumerate(order):
        for place, width, sign, step, sure in zip(places, widths, signs, steps, confidence, strict=True):
            if step == now:
                axis.add_patch(Rectangle((place, line - 0.45), width, 0.9, color=shades(0.15 + 0.7 * sure)))
            text, colour = (sign, "black") if step <= now else ("·" * width, "#bbbbbb")
            axis.text(
                place + width / 2, line, text, ha="center", va="center", family="monospace", fontsize=7.5,
                color=colour,
            )  # fmt: skip
    axis.set(xlim=(0, total), ylim=(len(order) - 0.4, -0.6), xticks=[], ylabel="forward")
    axis.set_yticks(range(len(order)), [str(step + 1) for step in order], fontsize=7)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_title(title, fontsize=9, loc="left")
    bar = figure.colorbar(
        ScalarMappable(norm=Normalize(0, 1), cmap=shades), ax=axis, fraction=0.012, pad=0.005
    )
    bar.set_label("confidence", fontsize=7)
    bar.ax.tick_params(labelsize=6)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_demo(facts: dict[str, Any], path: Path) -> None:
    """Speed and accuracy of each method of ``fastdllm-ext demo``, side by side."""
    results = facts["results"]
    labels = ["unpatched, one a step" if r["method"] == "unpatched" else r["method"] for r in results]
    colours = ["#333333" if r["method"] == "unpatched" else COLOURS[r["cache"]] for r in results]
    places = list(range(len(results)))[::-1]
    figure, (speed, accuracy) = plt.subplots(
        1, 2, figsize=(10, 0.34 * len(results) + 1.5), width_ratios=(3, 2), sharey=True, layout="constrained"
    )
    rates = [r["tokens_per_second"] for r in results]
    speed.barh(places, rates, color=colours)
    for place, result in zip(places, results, strict=True):
        speed.text(
            result["tokens_per_second"] + max(rates) * 0.01,
            place,
            f"{result['tokens_per_second']:,.0f}  ({result['speedup']:.1f}x, {result['nfe']:.1f} forwards)",
            va="center",
            fontsize=8,
        )
    speed.set(xlabel="tokens/s up to EOS", xlim=(0, max(rates) * 1.35))
    speed.set_yticks(places, labels, fontsize=8)
    shares = [100 * r["accuracy"] for r in results]
    prompts = facts["conditions"]["prompts"]
    errors = [100 * (r["accuracy"] * (1 - r["accuracy"]) / prompts) ** 0.5 for r in results]
    accuracy.errorbar(shares, places, xerr=errors, fmt="none", ecolor="#bbbbbb", capsize=2)
    accuracy.scatter(shares, places, color=colours, zorder=3, s=22)
    accuracy.set(xlabel="exact match, % (± one standard error)", xlim=(min([*shares, 90]) - 8, 102))
    accuracy.grid(axis="x", alpha=0.3)
    for axis in (speed, accuracy):
        axis.spines[["top", "right"]].set_visible(False)
    environment = facts["environment"]
    figure.suptitle(
        f"fastdllm_ext demo: {prompts} held-out prompts, one at a time, float32, "
        f"{environment['threads']} threads of {environment['cpu']}",
        fontsize=9,
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)
