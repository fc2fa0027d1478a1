"""Stability from step to step (KLASS, arXiv 2511.05664)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastdllm_ext.rules.base import Candidates, TorchRule, count, number


@dataclass(frozen=True)
class Klass(TorchRule):
    """Fills what is confident and has stopped moving: c >= threshold, and the last KL divergences small.

    KL(p_t || p_(t-1)) <= kl in each of the last ``history`` steps, p_t being the softmax of a position's
    logits in step t of its block. A position's first step in a block has nothing to compare with, so that it
    takes history + 1 steps at least. A step that finds nothing stable fills the most confident.

    Costs a copy of the block's log p (rows · block · vocabulary · 4 bytes: 16 MB a row of LLaDA at 32), some
    eight passes over the candidates' logits in float32, and CUDA graphs.

    Attributes:
        threshold: of confidence, above 0 and at most 1.
        kl: in nats, above 0.
        history: how many steps have to be stable.
    """

    name: ClassVar[str] = "klass"
    kept: ClassVar[int] = 4
    scratch: ClassVar[int] = 17  # log p, p, two of the sum's terms, and where p is not 0
    threshold: float = number(0.9, "above 0 and at most 1", 0, 1)
    kl: float = number(0.01, "above 0", 0)
    history: int = count(2)

    def chosen(self, step: Candidates) -> Tensor:
        """Confident and stable."""
        at = step.rows, step.slots
        log_p = step.logits.float().log_softmax(-1)
        before = step.memory("log_p", log_p.shape[1:], fill=-math.inf)  # so that the first KL is infinite
        stable = step.memory("stable")  # for how many steps
        p = log_p.exp()
        kl = torch.where(p > 0, p * (log_p - before[at]), 0).sum(-1)
        steps = torch.where(kl <= self.kl, stable[at] + 1, 0)
        before[at], stable[at] = log_p, steps
        return (steps >= self.history) & (step.confidence >= self.threshold)
