"""The rules that have arguments of their own: ``steps``, ``threshold`` and ``factor`` (arXiv 2505.22618)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastdllm_ext import ops
from fastdllm_ext.rules.base import Rule


@dataclass(frozen=True)
class Quota(Rule):
    """As many positions as the schedule says."""

    name: ClassVar[str] = "steps"
    op: ClassVar[ops.Rule] = ops.Rule.QUOTA
    steps: int


@dataclass(frozen=True)
class Threshold(Rule):
    """Every confidence that reaches the threshold."""

    name: ClassVar[str] = "threshold"
    op: ClassVar[ops.Rule] = ops.Rule.THRESHOLD
    threshold: float

    @property
    def value(self) -> float:
        """The threshold."""
        return self.threshold


@dataclass(frozen=True)
class Factor(Rule):
    """The longest prefix with (n + 1)(1 - c_n) <= factor."""

    name: ClassVar[str] = "factor"
    op: ClassVar[ops.Rule] = ops.Rule.FACTOR
    factor: float

    @property
    def value(self) -> float:
        """The factor."""
        return self.factor
