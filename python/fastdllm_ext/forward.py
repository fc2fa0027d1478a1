"""What a ragged forward over pages needs, whichever runtime computes it.

Rows of any length are one long row without padding; only attention knows where one ends and the next begins.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdllm_ext import ops
from fastdllm_ext.cache import FP8, PagedKVCache
from fastdllm_ext.patching.family import Geometry, Parts
from fastdllm_ext.patching.registry import Options
from fastdllm_ext.rope import rope_table, table_length
from fastdllm_ext.shards import group_of


@dataclass(frozen=True)
class Runs:
    """Tokens of B sequences laid end to end: sequence b has [offsets[b], offsets[b + 1])."""

    offsets: tuple[int, ...]
    cu: Tensor  # the offsets, [B + 1] int32

    @staticmethod
    def of(lengths: Iterable[int]) -> Runs:
        """From the lengths of the runs."""
        offsets = (0, *accumulate(lengths))
        return Runs(offsets, torch.tensor(offsets, dtype=torch.int32))

    @property
    def longest(self) -> int:
        """Tokens of the longest run."""
        return max((b - a for a, b in pairwise(self.offsets)), default=0)

    def to(self, device: torch.device) -> Runs:
        """The same on another device."""
        return replace(self, cu=self.cu.to(device))


@dataclass(frozen=True)
class Private:
    """Pages that hold what others hold, but for some keys and values of their own.

    Attributes:
        sources, copies: [pairs] int64, pages.
        pages, offsets: [n] int64, places in the copies whose keys and values are their own.
    """

    sources: Tensor
    copies: Tensor
    pages: Tensor
    offsets: Tensor

    def to(self, device: torch.device) -> Private:
        """The same on another device."""
        return Private(*(getattr(self, f.name).to(device) for f in fields(self)))


@dataclass(frozen=True)
class Layout:
    """T query tokens of B sequences, where their keys lie, and which of their outputs are wanted.

    Attributes:
        positions: [T] int64, of each query in its sequence.
        slots: [T] int64, where each query's key and value are written (see ``ops``).
        block_table: [B, max_blocks] int32.
        kv_lens: [B] int32, keys that each sequence attends to.
        queries: the T of them.
        wanted: [W] int64, queries whose hidden states come out, sequence by sequence.
        outputs: the W of them.
        is_fresh: all keys that are attended to are those of the queries.
        private: pages to be filled in each layer before they are read, if there are any.
    """

    positions: Tensor
    slots: Tensor
    block_table: Tensor
    kv_lens: Tensor
    queries: Runs
    wanted: Tensor
    outputs: Runs
    is_fresh: bool
    private: Private | None = None

    def to(self, device: torch.device) -> Layout:
        """The same on another device."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return Layout(
            **{name: part.to(device) if hasattr(part, "to") else part for name, part in parts.items()}
        )


def whole_rows(
    cache: PagedKVCache, sequences: Sequence[int], lengths: Sequence[int], wanted: Sequence[Tensor]
) -> Layout:
    """The layout of a forward over all of new sequences: every position is computed and attended to.

    ``wanted`` holds positions of each sequence.
    """
    queries = Runs.of(lengths)
    layout = Layout(
        positions=torch.cat([torch.arange(length) for length in lengths]),
        slots=torch.cat([cache.slots(s, 0, length) for s, length in zip(sequences, lengths, strict=True)]),
        block_table=cache.block_table(sequences),
        kv_lens=torch.tensor(lengths, dtype=torch.int32),
        queries=queries,
        wanted=torch.cat([where + offset for where, offset in zip(wanted, queries.offsets, strict=False)]),
        outputs=Runs.of(map(len, wanted)),
        is_fresh=True,
    )
    return layout.to(cache.devices[0])


class Attention:
    """The attention of a generation: RoPE, write to pages, attend over pages, on each layer's device.

    Args:
        geometry: of the model.
        cache: the pages.
        length: positions of the longest row.
        dtype: of the activations.

    Attributes:
        tables: cosines and sines on each device.
        layout: where queries and keys of the following calls lie.
    """

    layout: Layout

    def __init__(self, geometry: Geometry, cache: PagedKVCache, length: int, dtype: torch.dtype) -> None:
        self.head_dim = geometry.head_dim
        self.cache = cache
        rounded = dtype if geometry.rounded_rope else torch.float32
        self.tables = {
            device: rope_table(table_length(length), geometry.head_dim, geometry.rope_theta, device, rounded)
            for device in set(cache.devices)
        }

    def attend_over(self, layout: Layout) -> None:
        """Sets the layout."""
        self.layout = layout
        self._layouts = {device: layout.to(device) for device in self.tables}

    def write(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rows: slice = slice(None)) -> Tensor:
        """Stores the keys and values of some queries, after RoPE.

        q [t, heads * head_dim], k and v [t, kv_heads * head_dim] -> q after RoPE, [t, heads, head_dim].
        """
        device = self.cache.devices[layer]
        at, (cos, sin) = self._layouts[device], self.tables[device]
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k, v))
        pages, scales = self.cache.layer(layer), self.cache.scales(layer)
        return ops.rope_write_kv(q, k, v, cos, sin, at.positions[rows], at.slots[rows], *pages, *scales)

    def read(self, layer: int, q: Tensor, wanted: bool = False) -> Tensor:
        """What all queries, or those that are wanted, find. q as :meth:`write` returned it.

        [T or W, heads, head_dim] -> [T or W, heads * head_dim].
        """
        at = self._layouts[self.cache.devices[layer]]
        if at.private is not None:
            self._fill(layer, at.private)
        runs = at.outputs if wanted else at.queries
        pages, scales, scale = self.cache.layer(layer), self.cache.scales(layer), self.head_dim**-0.5
        if at.is_fresh and q.is_cuda:
            return library_attention(q, *pages, at.block_table, at.queries, runs, scale, *scales).flatten(-2)
        out = ops.paged_attention(
            q, *pages, at.block_table, at.kv_lens, runs.cu, runs.longest, scale, *scales
        )
        return out.flatten(-2)

    def _fill(self, layer: int, private: Private) -> None:
        """Copies pages around the keys and values that queries have written into the copies."""
        for pages in (*self.cache.layer(layer), *self.cache.scales(layer)):
            if pages is not None:
                numbers = pages.view(torch.uint8) if pages.dtype == FP8 else pages
                own = numbers[private.pages, :, private.offsets]
                ops.copy_pages(pages[None], private.sources, private.copies)
                numbers[private.pages, :, private.offsets] = own


def library_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    keys: Runs,
    queries: Runs,
    scale: float,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """Attention of sequences from their first key on, one after the other, by torch's fastest kernel.

    As ``ops.paged_attention``, but that what fp8 stands for is rounded to q's dtype. Where a sequence has
    many queries, arithmetic bounds it, not bytes.
    """

    def numbers(x: Tensor, scales: Tensor | None, pages: Tensor) -> Tensor:
        if scales is None:
            return x[pages]
        return (x.view(torch.uint8)[pages].view(x.dtype).float() * scales[pages, :, :, None]).to(q.dtype)

    stored = ((k_pages, k_scales), (v_pages, v_scales))
    out = torch.empty_like(q)
    for b, ((begin, end), (first, last)) in enumerate(
        zip(pairwise(queries.offsets), pairwise(keys.offsets), strict=True)
    ):
        pages = block_table[b, : -(-(last - first) // k_pages.shape[2])]
        k, v = (numbers(*x, pages).transpose(0, 1).flatten(1, 2)[None, :, : last - first] for x in stored)
        found = F.scaled_dot_product_attention(
            q[None, begin:end].transpose(1, 2), k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        out[begin:end] = found[0].transpose(0, 1)
    return out


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


def dtype_of(parts: Parts) -> torch.dtype:
    """The activations' dtype."""
    return next(parts.norm.parameters()).dtype  # norms are never quantised


def place_of_keys(
    geometry: Geometry, parts: Parts, options: Options
) -> tuple[tuple[int, int, int], torch.dtype, list[torch.device]]:
    """(layers, heads, head_dim) of the keys and values that are here, their dtype, and their devices.

    The dtype is the activations' where a patch asks for no other.
    """
    group = group_of(parts)
    heads = geometry.num_kv_heads // (1 if group is None else group.size)
    dtype = FP8 if options.kv_cache_dtype == "fp8" else dtype_of(parts)
    places = [device_of(layer.q) for layer in parts.layers]
    return (geometry.num_layers, heads, geometry.head_dim), dtype, places


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
