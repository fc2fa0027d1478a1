"""How a forward is computed: through the model's own modules, or through fused operations on its weights."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from fastdllm_ext.forward import Attention
from fastdllm_ext.patching.family import Family, Parts
from fastdllm_ext.runtime.fused import Fused, part_weights, why_not_fused
from fastdllm_ext.runtime.modules import Modules
from fastdllm_ext.runtime.widths import Widths

__all__ = [
    "RUNTIMES",
    "Fused",
    "Modules",
    "Runtime",
    "Widths",
    "choose_runtime",
    "part_weights",
]

RUNTIMES = ("auto", "fused", "modules")


class Runtime(Protocol):
    """Computes forwards of one model."""

    def __init__(self, family: Family, parts: Parts) -> None: ...

    def hidden(self, input_ids: Tensor, attend: Attention) -> Tensor:
        """[T] int64 -> [W, hidden] after the final norm, of the queries that the layout wants."""

    def head(self, hidden: Tensor) -> Tensor:
        """[R, hidden] -> [R, vocab], which is the caller's to change."""

    @staticmethod
    def activation_bytes(widths: Widths, tokens: int) -> int:
        """What a forward over all positions of its rows allocates at its peak, weights and pages apart."""


def choose_runtime(choice: str, family: Family, parts: Parts) -> type[Runtime]:
    """The runtime for a generation.

    ``auto`` takes the fused one where the model is one that it knows, as it is now: with a hook on a module,
    an adapter or a quantisation it is not.

    Raises:
        ValueError: ``fused``, and the model is not; the message says what stands in the way.
    """
    if choice == "modules":
        return Modules
    reason = why_not_fused(family, parts)
    if reason is None:
        return Fused
    if choice == "fused":
        raise ValueError(f"runtime='fused': {reason}; takes a model without, or runtime='auto'")
    return Modules
