"""Shadows: filled positions as the model sees them without their own tokens, in the forward of a step.

The shadow of position i is a sequence of its own, of one query: a mask at i; where logits are shifted it has
a second, the token at i - 1, whose output they are. It attends to what its row attends to, but that the keys
and values of its queries stand in place of the row's. Its pages are the row's; those that its queries lie in
are copies of its own, which each layer fills (`Attention.read`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdllm_ext.cache import PAGE_SIZE
from fastdllm_ext.decoding import GenerationConfig
from fastdllm_ext.forward import Private


def pages_of_shadows(config: GenerationConfig, answer: int, shift: bool, page_size: int = PAGE_SIZE) -> int:
    """How many pages of its own a row of ``answer`` positions needs, at most, for the shadows of a block."""
    if not config.selection.verifies:
        return 0
    block = min(config.block_length, answer)
    return block + int(shift) * -(-block // page_size)  # some queries i - 1 lie in the page before that of i


@dataclass(frozen=True)
class Shadows:
    """Those of one row, n of k queries each.

    Attributes:
        positions: [n, k] int64, of the queries.
        slots: [n, k] int64, of their keys and values.
        tables: [n, pages] int32, of the pages they attend to.
        sources, copies: [pairs] int64, pages of the row, and what stands for them.
    """

    positions: Tensor
    slots: Tensor
    tables: Tensor
    sources: Tensor
    copies: Tensor

    @staticmethod
    def of(positions: tuple[int, int], shift: bool, table: Tensor, own: Tensor, page_size: int) -> Shadows:
        """The shadows of positions.

        Args:
            positions: [begin, end) that are hidden.
            shift: the logits of i are output i - 1.
            table: [pages], those of the row.
            own: pages to take, as many as :func:`pages_of_shadows` says.
            page_size: positions a page holds.
        """
        queries = torch.arange(*positions)[:, None] + torch.arange(-int(shift), 1)
        index = queries // page_size
        new = torch.ones_like(index, dtype=torch.bool)  # the first query of its shadow in that page
        new[:, 1:] = index.diff() != 0
        pages = own[(new.flatten().cumsum(0) - 1).view_as(index)]
        return Shadows(
            positions=queries,
            slots=pages.long() * page_size + queries % page_size,
            tables=table.repeat(len(queries), 1).scatter(1, index, pages),
            sources=table[index][new].long(),
            copies=pages[new].long(),
        )


def private_pages(shadows: Sequence[Shadows], page_size: int) -> Private | None:
    """Theirs, for a layout; None where there are none."""
    if not any(len(shadow.copies) for shadow in shadows):
        return None
    slots = torch.cat([shadow.slots.flatten() for shadow in shadows])
    return Private(
        sources=torch.cat([shadow.sources for shadow in shadows]),
        copies=torch.cat([shadow.copies for shadow in shadows]),
        pages=slots // page_size,
        offsets=slots % page_size,
    )
