"""Pictures of results. Needs matplotlib (the extra ``[plot]``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"none": "#8c8c8c", "prefix": "#2a7ab9", "dual": "#d95f0e"}


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
            f"{result['tokens_per_second']:,.0f}  ({result['speedup']:.1f}x, {result['nfe']:.0f} forwards)",
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
        f"{environment['cpu_count']} threads of {environment['cpu']}",
        fontsize=9,
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)
