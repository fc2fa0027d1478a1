"""Sizes of a model that its activations grow with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastdllm_ext.patching.family import Parts


@dataclass(frozen=True)
class Widths:
    """Elements of a token's residual stream, MLP, queries, and keys; bytes of an element."""

    hidden: int
    inner: int
    q: int
    kv: int
    size: int

    @staticmethod
    def of(parts: Parts) -> Widths:
        """From the modules, on any device; linear layers have ``out_features``."""
        layer: Any = parts.layers[0]
        weight = next(parts.norm.parameters())
        return Widths(
            weight.numel(),
            layer.gate.out_features,
            layer.q.out_features,
            layer.k.out_features,
            weight.element_size(),
        )
