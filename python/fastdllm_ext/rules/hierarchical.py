"""Divide and conquer (hierarchical decoding of dInfer, arXiv 2510.08666)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastdllm_ext.rules.base import Candidates, TorchRule, first_best, number


@dataclass(frozen=True)
class Hierarchical(TorchRule):
    """Fills every c >= threshold, and of each run of masks the most confident one if its c >= low.

    A run is an unbroken one of a row's masks in the block; so each step splits the runs, and what it fills
    lies apart. Costs a few operations on one number a candidate, and CUDA graphs.

    Attributes:
        threshold: of confidence, above 0 and at most 1.
        low: what the best of a run has to reach, above 0 and at most 1.
    """

    name: ClassVar[str] = "hierarchical"
    threshold: float = number(0.9, "above 0 and at most 1", 0, 1)
    low: float = number(0.4, "above 0 and at most 1", 0, 1)

    def chosen(self, step: Candidates) -> Tensor:
        """Confident, or the best of their run."""
        begins = torch.ones_like(step.rows, dtype=torch.bool)
        begins[1:] = (step.rows.diff() != 0) | (step.positions.diff() != 1)
        run = begins.cumsum(0) - 1
        best = first_best(step.confidence, run, len(run))
        return (step.confidence >= self.threshold) | (best & (step.confidence >= self.low))
