"""The analyses' pictures: drawn from every kind of result, with text that can be read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdllm_ext.eval import drift, similarity, theorem
from test_eval_drift import SHAPE, some_prompts
from tiny import tiny_llada

pytest.importorskip("matplotlib")
from matplotlib.text import Text

from fastdllm_ext.eval import analysis_figures as figures


def draw(monkeypatch: pytest.MonkeyPatch, plot: Callable[..., None], result: Any, path: Path) -> list[Text]:
    """The texts of the picture that a function wrote."""
    drawn: list[Any] = []
    monkeypatch.setattr(figures.plt, "close", drawn.append)
    plot(result, path)
    (figure,) = drawn
    monkeypatch.undo()
    figures.plt.close(figure)
    assert path.read_bytes()[:4] == b"\x89PNG"
    return [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]


@pytest.mark.parametrize(
    "kind", ["similarity", "layers", "drift", "drift at a threshold", "no cache", "theorem", "no steps"]
)
def test_every_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str) -> None:
    """Also of results in which something is missing: no block step, no parallel step."""
    model, prompts = tiny_llada(5), some_prompts(3, 2)
    if kind in ("similarity", "layers"):
        plot, result = (
            figures.plot_similarity if kind == "similarity" else figures.plot_similarity_layers,
            similarity.measure(model, prompts, name="tiny model", gen_length=24, block_length=8),
        )
    elif kind in ("theorem", "no steps"):
        rule: dict[str, Any] = {"threshold": 0.2} if kind == "theorem" else {"steps": 24}
        plot, result = (
            figures.plot_theorem,
            theorem.measure(model, prompts, name="tiny model", caches=("none", "dual"), **SHAPE, **rule),
        )
    else:
        rule = {"threshold": 0.2} if kind == "drift at a threshold" else {"steps": 24}
        caches = ("none",) if kind == "no cache" else ("dual", "prefix")
        plot, result = (
            figures.plot_drift,
            drift.measure(model, prompts, name="tiny model", caches=caches, **SHAPE, **rule),
        )
    texts = draw(monkeypatch, plot, result, tmp_path / "picture.png")
    assert min(text.get_fontsize() for text in texts) >= 7
    words = " ".join(text.get_text() for text in texts)
    for part in (
        "tiny model",
        "float32",
        "block length 8",
        "generation length 24",
        result["conditions"]["rule"],
    ):
        assert part in words


def test_maps_rise_in_lightness() -> None:
    """So that they can be read in grey (ITU-R BT.601)."""
    shades = torch.tensor(figures.plt.get_cmap(figures.MAP)(torch.linspace(0, 1, 64).numpy())[:, :3])
    grey = shades @ torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    assert (grey.diff() > 0).all()
