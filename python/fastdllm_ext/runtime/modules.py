"""A forward through the model's own modules: whatever they are, their hooks and adapters run."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fastdllm_ext.forward import Attention
from fastdllm_ext.patching.family import Family, Parts
from fastdllm_ext.runtime.widths import Widths


class Modules:
    """See ``Runtime``."""

    def __init__(self, family: Family, parts: Parts) -> None:
        self.parts = parts

    def hidden(self, input_ids: Tensor, attend: Attention) -> Tensor:
        """[T] int64 -> [W, hidden] after the final norm."""
        x = self.parts.embedding(input_ids[None])
        for i, layer in enumerate(self.parts.layers):
            x = x.to(attend.cache.devices[i])
            n = layer.attn_norm(x)
            x = x + layer.o(
                attend.read(i, attend.write(i, layer.q(n)[0], layer.k(n)[0], layer.v(n)[0]))[None]
            )
            n = layer.mlp_norm(x)
            # A refresh needs the most memory here: two tensors of this width at a time. What is written in
            # place is no module's output, which a hook may hold.
            inner = F.silu(layer.gate(n))
            inner *= layer.up(n)
            x = x + layer.down(inner)
            del inner  # or it would be a third, in the next layer
        hidden = self.parts.norm(x)[0]
        return hidden[attend.layout.wanted.to(hidden.device)]

    def head(self, hidden: Tensor) -> Tensor:
        """[R, hidden] -> [R, vocab]."""
        head = self.parts.head
        return F.linear(hidden, head.weight) if isinstance(head, nn.Embedding) else head(hidden)

    @staticmethod
    def activation_bytes(widths: Widths, tokens: int) -> int:
        """At the peak of a forward."""
        w = widths
        return tokens * max(
            (2 * w.hidden + 2 * w.inner) * w.size,  # x, its norm, silu(gate), up
            (2 * w.hidden + 2 * w.q + 2 * w.kv) * w.size,  # x, its norm, q, k, v, q rotated
            # x, the norm before; within a norm two in float32, and their mean squares
            2 * w.hidden * (w.size + 4) + 8,
        )
