"""How a forward is computed: through the model's own modules, or through fused operations on its weights."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from fastdllm_ext.forward import Attention
from fastdllm_ext.patching.family import Family, Parts
from fastdllm_ext.patching.registry import Options
from fastdllm_ext.runtime.fused import Fused, part_weights, why_not_fused, why_not_quantized
from fastdllm_ext.runtime.modules import Modules
from fastdllm_ext.runtime.products import forget_quantized
from fastdllm_ext.runtime.widths import Widths

__all__ = [
    "Fused",
    "Modules",
    "Runtime",
    "Widths",
    "choose_runtime",
    "forget_quantized",
    "make_runtime",
    "part_weights",
]


class Runtime(Protocol):
    """Computes forwards of one model."""

    def hidden(self, input_ids: Tensor, attend: Attention) -> Tensor:
        """[T] int64 -> [W, hidden] after the final norm, of the queries that the layout wants."""

    def head(self, hidden: Tensor) -> Tensor:
        """[R, hidden] -> [R, vocab], which is the caller's to change."""

    @staticmethod
    def activation_bytes(widths: Widths, tokens: int) -> int:
        """What a forward over all positions of its rows allocates at its peak, weights and pages apart."""


def choose_runtime(options: Options, family: Family, parts: Parts) -> type[Fused] | type[Modules]:
    """The runtime for a generation.

    ``auto`` takes the fused one where the model is one that it knows, as it is now: with a hook on a module,
    an adapter or a quantisation of its own it is not.

    Raises:
        ValueError: ``fused`` or a quantisation, and the model is not one; the message says what stands in the
            way. A quantisation, and ``modules``.
    """
    quantized = options.quantization != "none"
    if options.runtime == "modules":
        if quantized:
            raise ValueError(
                f"quantization={options.quantization!r} with runtime='modules'; takes 'fused' or 'auto'"
            )
        return Modules
    reason = why_not_fused(family, parts)
    if reason is None and quantized:
        reason = why_not_quantized(options.quantization, parts)
    if reason is None:
        return Fused
    if quantized:
        raise ValueError(f"quantization={options.quantization!r}: {reason}; or quantization='none'")
    if options.runtime == "fused":
        raise ValueError(f"runtime='fused': {reason}; takes a model without, or runtime='auto'")
    return Modules


def make_runtime(options: Options, family: Family, parts: Parts) -> Runtime:
    """As :func:`choose_runtime`, for a model whose weights are at hand."""
    chosen = choose_runtime(options, family, parts)
    return Fused(family, parts, options.quantization) if chosen is Fused else Modules(family, parts)
