"""Fréchet's bound over the whole prefix (Fast-dLLM++, arXiv 2606.02955)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastdllm_ext import ops
from fastdllm_ext.rules.base import Rule, number


@dataclass(frozen=True)
class Frechet(Rule):
    """Fills the longest prefix of n with Σ (1 - c_i) + (1 - c_n) <= factor, the sum over all n.

    By Fréchet and Hoeffding, all n tokens hold together with at least 1 - Σ (1 - c_i); another choice, which
    differs in one of them, with at most 1 - c_n. Below a factor of 1 the first is more, so that the most
    probable tokens are the most probable together: what ``factor`` says of n equal confidences. The paper's
    margin is 1 - factor. Costs what ``factor`` costs: `unmask` adds the confidences up.

    Attributes:
        factor: above 0; the more, the more tokens a step.
    """

    name: ClassVar[str] = "frechet"
    op: ClassVar[ops.Rule] = ops.Rule.FRECHET
    factor: float = number(0.75, "above 0", 0)

    @property
    def value(self) -> float:
        """The factor."""
        return self.factor
