"""A bound on entropies (EB-Sampler, arXiv 2505.24857)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastdllm_ext import ops
from fastdllm_ext.rules.base import Rule, number


@dataclass(frozen=True)
class EntropyBound(Rule):
    """Fills the longest prefix, by rising entropy H, with H_1 + ... + H_(n-1) <= bound.

    What n tokens tell of each other is at most the sum of their entropies without the largest: that much is
    lost if they are drawn at once. DiffusionGemma's sampler accepts by the same rule. The stored confidence
    is -H. Costs what remasking="entropy" costs: `unmask` adds the entropies up.

    Attributes:
        bound: in nats, above 0; the more, the more tokens a step.
    """

    name: ClassVar[str] = "entropy_bound"
    ranks_by: ClassVar[str] = "entropy"
    op: ClassVar[ops.Rule] = ops.Rule.ENTROPY_BOUND
    bound: float = number(0.1, "above 0", 0)

    @property
    def value(self) -> float:
        """The bound."""
        return self.bound
