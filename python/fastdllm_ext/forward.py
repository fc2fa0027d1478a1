"""One ragged forward through a model's own modules, attending over pages.

Rows of any length go through the modules as one long row without padding; only attention knows where
one ends and the next begins.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdllm_ext import ops
from fastdllm_ext.cache import PagedKVCache
from fastdllm_ext.patching.family import Geometry, Parts
from fastdllm_ext.rope import rope_table, table_length


@dataclass(frozen=True)
class Layout:
    """T query tokens of B sequences, and where their keys lie (see ``ops``)."""

    positions: Tensor  # [T] int64
    slots: Tensor  # [T] int64
    block_table: Tensor  # [B, max_blocks] int32
    kv_lens: Tensor  # [B] int32
    cu_seqlens_q: Tensor  # [B + 1] int32
    max_seqlen_q: int

    def to(self, device: torch.device) -> Layout:
        """The same on another device."""
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "max_seqlen_q"}
        return replace(self, **moved)


def whole_rows(cache: PagedKVCache, sequences: Sequence[int], lengths: Sequence[int]) -> Layout:
    """The layout of a forward over all of new sequences: every position is computed and attended to."""
    layout = Layout(
        positions=torch.cat([torch.arange(length) for length in lengths]),
        slots=torch.cat([cache.slots(s, 0, length) for s, length in zip(sequences, lengths, strict=True)]),
        block_table=cache.block_table(sequences),
        kv_lens=torch.tensor(lengths, dtype=torch.int32),
        cu_seqlens_q=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        max_seqlen_q=max(lengths),
    )
    return layout.to(cache.devices[0])


class Attention:
    """The attention of a generation: RoPE, write to pages, attend over pages, on each layer's device.

    Args:
        geometry: of the model.
        cache: the pages.
        length: positions of the longest row.

    Attributes:
        tables: cosines and sines on each device.
    """

    def __init__(self, geometry: Geometry, cache: PagedKVCache, length: int) -> None:
        self.head_dim = geometry.head_dim
        self.cache = cache
        rounded = cache.dtype if geometry.rounded_rope else torch.float32
        self.tables = {
            device: rope_table(table_length(length), geometry.head_dim, geometry.rope_theta, device, rounded)
            for device in set(cache.devices)
        }
        self._layouts: dict[torch.device, Layout] = {}

    def attend_over(self, layout: Layout) -> None:
        """Where queries and keys of the following calls lie."""
        self._layouts = {device: layout.to(device) for device in self.tables}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, heads * head_dim], k and v [T, kv_heads * head_dim] -> [T, heads * head_dim]."""
        device = self.cache.devices[layer]
        at, (cos, sin) = self._layouts[device], self.tables[device]
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k, v))
        k_pages, v_pages = self.cache.layer(layer)
        q = ops.rope_write_kv(q, k, v, cos, sin, at.positions, at.slots, k_pages, v_pages)
        out = ops.paged_attention(
            q,
            k_pages,
            v_pages,
            at.block_table,
            at.kv_lens,
            at.cu_seqlens_q,
            at.max_seqlen_q,
            self.head_dim**-0.5,
        )
        return out.flatten(-2)


def hidden_states(parts: Parts, input_ids: Tensor, attend: Attention) -> Tensor:
    """[T] int64 -> [T, hidden] after the final norm."""
    x = parts.embedding(input_ids[None])
    for i, layer in enumerate(parts.layers):
        x = x.to(attend.cache.devices[i])
        n = layer.attn_norm(x)
        x = x + layer.o(attend(i, layer.q(n)[0], layer.k(n)[0], layer.v(n)[0])[None])
        n = layer.mlp_norm(x)
        # A refresh needs the most memory here: two tensors of this width at a time. What is written in place
        # is no module's output, which a hook may hold.
        inner = F.silu(layer.gate(n))
        inner *= layer.up(n)
        x = x + layer.down(inner)
        del inner  # or it would be a third, in the next layer
    return parts.norm(x)[0]


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: accelerate's execution device where it has one, else its weights'."""
    hook: Any = getattr(module, "_hf_hook", None)
    for candidate in getattr(hook, "hooks", [hook]):
        execution = getattr(candidate, "execution_device", None)
        if execution is not None:
            return torch.device("cuda", execution) if isinstance(execution, int) else torch.device(execution)
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


def place_of_keys(parts: Parts) -> tuple[torch.dtype, list[torch.device]]:
    """The dtype of keys and values, which is the activations', and their device in each layer."""
    dtype = next(parts.norm.parameters()).dtype  # norms are never quantised
    return dtype, [device_of(layer.q) for layer in parts.layers]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it, the model is in evaluation mode and computes in its own dtype; after it, all is as it was.

    Autocast would hand the operations queries of another dtype than the pages that hold the keys.
    """
    training = [module for module in model.modules() if module.training]
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True
