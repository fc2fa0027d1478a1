"""What the model itself says of a row, without a cache: candidates and confidences from one whole forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdllm_ext import ops
from fastdllm_ext.checks import check_count
from fastdllm_ext.decoding import REMASKING
from fastdllm_ext.forward import evaluating
from fastdllm_ext.ops import Knob, Row, Rule
from fastdllm_ext.patching.registry import patched_family, unwrapped
from fastdllm_ext.whole import HEAD_ROWS, WholeRows

__all__ = ["Scores", "score_rows"]


class Scores(NamedTuple):
    """Of n positions of a row, on the CPU.

    Attributes:
        tokens: [n] int64, their candidates.
        confidence: [n] float32.
    """

    tokens: Tensor
    confidence: Tensor


@torch.no_grad()
def score_rows(
    model: nn.Module,
    rows: Sequence[Tensor],
    positions: Sequence[Tensor],
    batch_size: int,
    *,
    mask_id: int | None = None,
    remasking: str = "low_confidence",
    progress: Callable[..., Any] = iter,
) -> list[Scores]:
    """Candidate and confidence of positions of rows, as docs/decoding.md defines them at temperature 0.

    Each row takes one forward of all of it, which is what a step with ``cache="none"`` computes; ``unmask``,
    the operation that a decode scores with, reads the logits.

    Args:
        model: a patched model.
        rows: 1-D int64 each, masks among them.
        positions: 1-D int64, for each row: where to read. From 1 on in a family with a shift.
        batch_size: rows of a forward.
        mask_id: in place of the model's own.
        remasking: which confidence; not "random".
        progress: wraps an iterable of batches, as tqdm does.

    Raises:
        ValueError: NaN or infinite logits; a position outside of its row; a model that is not patched.
    """
    check_count("batch_size", batch_size)
    if remasking not in REMASKING or remasking == "random":
        raise ValueError(f"remasking={remasking!r}; takes one of {', '.join(REMASKING)}, but not random")
    rows, positions = [row.cpu() for row in rows], [where.cpu() for where in positions]
    first = int(patched_family(model).shift)
    for b, (row, where) in enumerate(zip(rows, positions, strict=True)):
        if len(where) and not first <= int(where.min()) <= int(where.max()) < len(row):
            raise ValueError(f"positions[{b}] lie outside of {first} to {len(row) - 1}")
    if not rows:
        return []
    found: list[Scores] = []
    with evaluating(unwrapped(model)):
        forward = WholeRows(model, max(map(len, rows)), min(batch_size, len(rows)))
        mask_id = forward.geometry.mask_id if mask_id is None else mask_id
        for begin in progress(range(0, len(rows), batch_size)):
            some = positions[begin : begin + batch_size]
            states = forward.hidden(rows[begin : begin + batch_size], some)
            parts = [_judge(forward.head(x), mask_id, remasking) for x in states.split(HEAD_ROWS)]
            tokens, confidence = (torch.cat(x).split(list(map(len, some))) for x in zip(*parts, strict=True))
            found += map(Scores, tokens, confidence)
    return found


def _judge(logits: Tensor, mask_id: int, remasking: str) -> tuple[Tensor, Tensor]:
    """[R, vocab] -> [R] candidates and [R] confidences.

    To ``unmask`` every position is a row of its own, whose one mask it fills whatever its confidence.
    """
    count, device = len(logits), logits.device
    tokens = torch.full((count, 1), mask_id, device=device)
    step_map = torch.full((count, 1), -1, dtype=torch.int32, device=device)
    confidence = torch.zeros((count, 1), device=device)
    state = torch.zeros((count, len(Row)), dtype=torch.int64, device=device)
    state[:, Row.RULE], state[:, Row.SCORE], state[:, Row.END] = Rule.QUOTA, REMASKING[remasking], 1
    knobs = torch.zeros((count, len(Knob)), device=device)
    knobs[:, Knob.SOFTMAX_TEMPERATURE] = 1.0
    ops.unmask(
        logits,
        torch.arange(count + 1, dtype=torch.int32, device=device),
        torch.zeros(count, dtype=torch.int64, device=device),
        tokens,
        step_map,
        confidence,
        state,
        knobs,
        torch.ones((count, 1), dtype=torch.int32, device=device),
        torch.zeros(0, dtype=torch.int64, device=device),
        mask_id,
    )
    if bool(state[:, Row.BAD_LOGITS].any()):
        raise ValueError("logits: NaN or infinite in a whole forward")
    return tokens[:, 0].cpu(), confidence[:, 0].cpu()
