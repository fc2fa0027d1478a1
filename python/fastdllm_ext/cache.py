"""Paged storage of keys and values: a fixed pool of pages, and a block table for each sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdllm_ext import ops
from fastdllm_ext._C import OutOfPages, PagePool
from fastdllm_ext.huge_pages import on_huge_pages

__all__ = ["CacheStats", "OutOfPages", "PagePool", "PagedKVCache"]

PAGE_SIZES = (16, 32, 64)
PAGE_SIZE = 32  # where nothing is said
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class CacheStats:
    """Pages of a cache: all, free, used, used by more than one sequence, most ever used at once."""

    num_pages: int
    num_free: int
    num_used: int
    num_shared: int
    peak_used: int


class PagedKVCache:
    """Keys (after RoPE) and values of many sequences, in pages.

    Args:
        num_layers, num_kv_heads, head_dim: of the model.
        num_pages: pages in the pool; see :meth:`pages_for`.
        page_size: positions a page holds: 16, 32 or 64.
        dtype: of keys and values; torch.float8_e4m3fn keeps a scale of each head's vector beside them.
        device: of keys and values; or one for each layer.

    Attributes:
        storage: [layers, 2, num_pages, num_kv_heads, page_size, head_dim] of each device's layers; keys at
            0, values at 1.
        scale_storage: [layers, 2, num_pages, num_kv_heads, page_size] float32 likewise where the dtype is
            float8_e4m3fn; else empty.
        geometry: (num_layers, num_kv_heads, head_dim).
        dtype, devices: of keys and values, the latter of each layer.

    A sequence is a number handed out by :meth:`add`; it holds its pages until :meth:`free`.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        num_pages: int,
        page_size: int = PAGE_SIZE,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | Sequence[torch.device | str] = "cpu",
    ) -> None:
        if page_size not in PAGE_SIZES:
            raise ValueError(f"page_size={page_size}; takes one of {PAGE_SIZES}")
        devices = [device] * num_layers if isinstance(device, (str, torch.device)) else list(device)
        if len(devices) != num_layers:
            raise ValueError(
                f"device holds {len(devices)} for {num_layers} layers; takes one, or one for each"
            )
        self.geometry = (num_layers, num_kv_heads, head_dim)
        self.page_size = page_size
        self.dtype = dtype
        self.pool = PagePool(num_pages)
        self.storage: list[Tensor] = []
        self.scale_storage: list[Tensor] = []
        self._layers: list[Tensor] = [torch.empty(0)] * num_layers  # [2, pages, heads, page size, head_dim]
        self._scales: list[Tensor | tuple[None, None]] = [(None, None)] * num_layers
        for place in dict.fromkeys(map(torch.device, devices)):
            here = [i for i, other in enumerate(devices) if torch.device(other) == place]
            shape = (len(here), 2, num_pages, num_kv_heads, page_size)
            self.storage.append(on_huge_pages(torch.empty((*shape, head_dim), dtype=dtype, device=place)))
            for i, pages in zip(here, self.storage[-1], strict=True):
                self._layers[i] = pages
            if dtype == FP8:
                self.scale_storage.append(on_huge_pages(torch.empty(shape, device=place)))
                for i, scales in zip(here, self.scale_storage[-1], strict=True):
                    self._scales[i] = scales
        self.devices = [pages.device for pages in self._layers]
        self._pages: dict[int, list[int]] = {}
        self._next = 0

    @staticmethod
    def pages_for(lengths: Sequence[int], page_size: int = PAGE_SIZE) -> int:
        """Pages that sequences of these lengths need together."""
        return sum(-(-length // page_size) for length in lengths)

    @staticmethod
    def page_bytes(
        num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, page_size: int = PAGE_SIZE
    ) -> int:
        """Bytes of a page in all layers: keys, values and their scales."""
        vector = head_dim * dtype.itemsize + (torch.float32.itemsize if dtype == FP8 else 0)
        return 2 * num_layers * num_kv_heads * page_size * vector

    @property
    def stats(self) -> CacheStats:
        """Pages in use now."""
        pool = self.pool
        return CacheStats(pool.num_pages, pool.num_free, pool.num_used, pool.num_shared, pool.peak_used)

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Key pages and value pages of a layer, each [num_pages, num_kv_heads, page_size, head_dim]."""
        return self._layers[index][0], self._layers[index][1]

    def scales(self, index: int) -> tuple[Tensor | None, Tensor | None]:
        """Scales of a layer's keys and values, [num_pages, num_kv_heads, page_size] each; None without."""
        return self._scales[index][0], self._scales[index][1]

    def add(self, lengths: Sequence[int]) -> list[int]:
        """One new sequence for each length, all or none.

        Raises:
            OutOfPages: (a ValueError) says how many pages were needed and how many are free.
        """
        if any(length < 1 for length in lengths):
            raise ValueError(f"lengths={list(lengths)}; takes 1 or more each")
        counts = [self.pages_for([length], self.page_size) for length in lengths]
        pages = self.pool.allocate(sum(counts))
        sequences = []
        for count in counts:
            sequences.append(self._next)
            self._pages[self._next], pages = pages[:count], pages[count:]
            self._next += 1
        return sequences

    def fork(self, sequence: int) -> int:
        """A new sequence with the same contents; pages are shared until one of the two is written."""
        pages = self._owned(sequence)
        self.pool.fork(pages)
        self._pages[self._next] = list(pages)
        self._next += 1
        return self._next - 1

    def branch(self, sequence: int, shared: int, length: int) -> int:
        """A new sequence of ``length`` positions that shares the pages of another's first ``shared`` ones.

        Args:
            shared: positions, whole pages of them.

        Raises:
            OutOfPages: there are too few for the others.
        """
        pages = self._owned(sequence)
        count = shared // self.page_size
        if shared % self.page_size or not 0 <= count <= len(pages) or length < max(shared, 1):
            raise ValueError(
                f"shared={shared}: takes whole pages of {self.page_size}, {len(pages)} at most, in {length}"
            )
        own = self.pool.allocate(self.pages_for([length], self.page_size) - count)
        self.pool.fork(pages[:count])
        self._pages[self._next] = pages[:count] + own
        self._next += 1
        return self._next - 1

    def free(self, sequence: int) -> None:
        """Gives the sequence's pages back."""
        self.pool.free(self._owned(sequence))
        del self._pages[sequence]

    def prepare_write(self, sequence: int, begin: int, end: int) -> None:
        """Makes the pages of positions [begin, end) the sequence's own: copies those that are shared.

        Raises:
            OutOfPages: there are too few for all copies; those that were made hold what they should.
        """
        pages = self._owned(sequence)
        moved = []
        try:
            for i in range(begin // self.page_size, -(-end // self.page_size)):
                own = self.pool.make_private(pages[i])
                if own != pages[i]:
                    moved.append((pages[i], own))
                    pages[i] = own
        finally:
            for storage in (*self.storage, *self.scale_storage) if moved else ():
                source, destination = torch.tensor(moved, device=storage.device).T.contiguous()
                ops.copy_pages(storage.flatten(0, 1), source, destination)

    def block_table(self, sequences: Sequence[int]) -> Tensor:
        """Pages of the sequences, [B, longest] int32 on the first layer's device, short rows ending in 0."""
        rows = [self._owned(sequence) for sequence in sequences]
        longest = max(map(len, rows), default=0)
        table = [row + [0] * (longest - len(row)) for row in rows]
        return torch.tensor(table, dtype=torch.int32, device=self.devices[0]).view(len(rows), longest)

    def slots(self, sequence: int, begin: int, end: int) -> Tensor:
        """Slots of positions [begin, end): ``page * page_size + offset``, int64 on the CPU."""
        pages = torch.tensor(self._owned(sequence))
        positions = torch.arange(begin, end)
        return pages[positions // self.page_size] * self.page_size + positions % self.page_size

    def _owned(self, sequence: int) -> list[int]:
        try:
            return self._pages[sequence]
        except KeyError:
            raise ValueError(f"sequence={sequence} is not in this cache (freed twice?)") from None
