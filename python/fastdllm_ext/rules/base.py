"""What a selection rule is: parameters, what `unmask` commits by, and perhaps a function in plain torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastdllm_ext import ops
from fastdllm_ext.checks import check_count, check_number

__all__ = ["Candidates", "Filled", "Memory", "Rule", "TorchRule", "count", "first_best", "number", "rank"]


def number(default: float, allowed: str, low: float, high: float = math.inf) -> Any:
    """A parameter: a number in (low, high], described by ``allowed``."""
    return dataclasses.field(default=default, metadata={"check": (check_number, allowed, low, high)})


def count(default: int) -> Any:
    """A parameter: an int of 1 or more."""
    return dataclasses.field(default=default, metadata={"check": (check_count,)})


@dataclass(frozen=True)
class Rule:
    """How a step chooses the masked positions that it fills.

    A subclass is a frozen dataclass of parameters with their ranges: :func:`number`, :func:`count`. ``str``
    gives its short form, ``name:parameter=value:...``.

    Attributes:
        name: in :data:`fastdllm_ext.rules.RULES`, in strings and mappings.
        ranks_by: the confidence that ranks positions, in the words of ``remasking``.
        op: the rule of :func:`fastdllm_ext.ops.unmask` that commits.
        kept: bytes that it keeps for each row, position of a block and token.
        scratch: bytes for each candidate and token that exist for a moment beside float32 logits.
        verifies: steps also see each token of the block without itself, and may take tokens back.
    """

    name: ClassVar[str]
    ranks_by: ClassVar[str] = "low_confidence"
    op: ClassVar[ops.Rule]
    kept: ClassVar[int] = 0
    scratch: ClassVar[int] = 0
    verifies: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if "check" in field.metadata:
                check, *allowed = field.metadata["check"]
                check(f"{self.name}: {field.name}", getattr(self, field.name), *allowed)

    @property
    def value(self) -> float:
        """``ops.Knob.VALUE``."""
        return 0.0

    @classmethod
    def parameters(cls) -> list[str]:
        """Their names, in order."""
        return [field.name for field in dataclasses.fields(cls)]

    def to_dict(self) -> dict[str, Any]:
        """The mapping that :func:`fastdllm_ext.rules.parse` takes."""
        return {"name": self.name, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        return ":".join([self.name, *(f"{k}={v}" for k, v in dataclasses.asdict(self).items())])


class Memory:
    """What a rule keeps from step to step for each position of the rows' blocks; new with each block.

    Args:
        rows: of the decoder.
        length: positions of the longest block.
        device: of the tensors.
    """

    def __init__(self, rows: int, length: int, device: torch.device) -> None:
        self._shape, self._device = (rows, length), device
        self._kept: dict[str, tuple[Tensor, float]] = {}

    def grow(self, rows: int, length: int) -> None:
        """Makes it as large; what is there stays."""
        self._shape = (rows, length)
        for name, (kept, fill) in self._kept.items():
            larger = kept.new_full((*self._shape, *kept.shape[2:]), fill)
            larger[: kept.shape[0], : kept.shape[1]] = kept
            self._kept[name] = larger, fill

    def __call__(
        self, name: str, sizes: Sequence[int] = (), fill: float = 0.0, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """[rows, length, *sizes], ``fill`` where the rule has written nothing since the row's block began."""
        if name not in self._kept:
            shape = (*self._shape, *sizes)
            self._kept[name] = torch.full(shape, fill, dtype=dtype, device=self._device), fill
        return self._kept[name][0]

    def forget(self, row: int) -> None:
        """The row enters a block."""
        for kept, fill in self._kept.values():
            kept[row] = fill


@dataclass
class Candidates:
    """The masked positions that a step may fill, row by row, in order of position.

    Attributes:
        logits: [R, vocab], guided where there is guidance.
        rows: [R] int64, the row of each.
        positions: [R] int64, in its row.
        slots: [R] int64, in its block.
        mask_id: never a candidate.
        memory: what the rule keeps for each position: ``memory(...)[rows, slots]``.
        confidence: [R] float32, of the token that fills the position if it is chosen.
    """

    logits: Tensor
    rows: Tensor
    positions: Tensor
    slots: Tensor
    mask_id: int
    memory: Memory
    confidence: Tensor


@dataclass
class Filled:
    """The positions of the rows' blocks that a step has seen without their own tokens, row by row.

    Attributes:
        rows: [V] int64, the row of each.
        positions: [V] int64, in its row.
        confidence: [V] float32, the probability of the token that stands there, by what stands around it
            before the step; infinite where none stands there, or one that was given.
    """

    rows: Tensor
    positions: Tensor
    confidence: Tensor


@dataclass(frozen=True)
class TorchRule(Rule):
    """A rule of which a part is plain torch, around `unmask`; its steps run without CUDA graphs.

    Work on the device alone: nothing is read by the host, and no position depends on those of other rows.
    """

    op: ClassVar[ops.Rule] = ops.Rule.THRESHOLD

    @property
    def value(self) -> float:
        """Every candidate is committed; what :meth:`chosen` leaves out is taken back."""
        return -math.inf

    def fused(self, step: Candidates) -> Tensor:
        """[R, vocab] logits in place of the model's; ``step.confidence`` is not there yet."""
        return step.logits

    def chosen(self, step: Candidates) -> Tensor | None:
        """[R] bool: what the step fills; in a row where that is nothing, the most confident position.

        None: all that `unmask` committed.
        """
        return None

    def revoked(self, step: Candidates, chosen: Tensor, filled: Filled) -> Tensor:
        """[V] bool: what the step takes back, of a rule that ``verifies``; chosen [R] is what it fills.

        That every block comes to its end is the rule's business.
        """
        raise NotImplementedError


def rank(score: Tensor, group: Tensor) -> Tensor:
    """[R] int64: how many of its group come before each by falling score, the first of equals before others.

    group [R] rises.
    """
    order = score.argsort(descending=True, stable=True)
    order = order[group[order].argsort(stable=True)]
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return place - torch.searchsorted(group, group)


def first_best(score: Tensor, group: Tensor, groups: int) -> Tensor:
    """[R] bool: of each group, the largest score, and the first of equal ones. group [R] in [0, groups)."""
    best = score.new_full((groups,), -math.inf).scatter_reduce(0, group, score, "amax")
    index = torch.arange(len(score), device=score.device)
    contenders = torch.where(score == best[group], index, len(score))
    return index == index.new_full((groups,), len(score)).scatter_reduce(0, group, contenders, "amin")[group]
