"""Drafts that are taken back (WINO, "wide in, narrow out", arXiv 2507.18578)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastdllm_ext.rules.base import Candidates, Filled, TorchRule, number, rank


@dataclass(frozen=True)
class Wino(TorchRule):
    """Fills every c >= draft, and makes masks again of the block's tokens that do not hold: p < verify.

    p is the probability of a token of the block where the same forward sees a mask in its place. Of n masks,
    a step fills min(max(0.7 n, 5), 20) at most, the most confident. It takes back only if it fills more than
    one: those of the smallest p, and fewer than the step before has filled. So a block of n masks takes n
    steps at most: with a_i filled in step i and r_i <= a_(i-1) - 1 taken back, what stands after T steps is
    a_1 + ... + a_T - (r_2 + ... + r_T) >= a_T + T - 1.

    Costs, in each step of a block but the first, a query (with a shift two) for each position of the block,
    which attends to all keys, and its logits; as many pages, copied in every layer; and CUDA graphs. A row
    ends at an EOS only when the block that holds it is full.

    Attributes:
        draft: of confidence, above 0 and at most 1.
        verify: of p, above 0 and at most 1.
    """

    name: ClassVar[str] = "wino"
    scratch: ClassVar[int] = 8  # of the shadows: logits over temperature, and the terms of their sum
    verifies: ClassVar[bool] = True
    draft: float = number(0.6, "above 0 and at most 1", 0, 1)
    verify: float = number(0.9, "above 0 and at most 1", 0, 1)

    def chosen(self, step: Candidates) -> Tensor:
        """Confident, and not too many."""
        masks = torch.zeros_like(self._filled(step)).index_add_(0, step.rows, torch.ones_like(step.rows))
        most = (masks * 7 // 10).clamp(5, 20)[step.rows]
        return (step.confidence >= self.draft) & (rank(step.confidence, step.rows) < most)

    def revoked(self, step: Candidates, chosen: Tensor, filled: Filled) -> Tensor:
        """Doubtful, and fewer than the step before has filled."""
        before = self._filled(step)
        now = torch.zeros_like(before).index_add_(0, step.rows, chosen.long())
        most = torch.where(now > 1, before - 1, 0)[filled.rows]
        doubtful = (filled.confidence < self.verify) & (rank(-filled.confidence, filled.rows) < most)
        before.copy_(now)
        return doubtful

    def _filled(self, step: Candidates) -> Tensor:
        """[rows] int64: how many positions the row's last step has filled."""
        return step.memory("filled", dtype=torch.int64)[:, 0]
