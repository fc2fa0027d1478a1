"""Parameters that lie behind one another in memory, so that one product does the work of several.

The parameters stay the model's own: the same objects under the same names with the same values, each a slice
of one tensor. Nothing is kept beside them. Where they already lie so is seen from their addresses; what moves
them apart (``model.to``, ``copy.deepcopy``) is mended by joining them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, pairwise

import torch
from torch import Tensor

from fastdllm_ext.huge_pages import on_huge_pages


@torch.no_grad()
def join(groups: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """For each group the tensor of which its members are slices along dimension 0, in order.

    All groups lie behind one another, in the order in which they are given and are to be read; what does not
    is copied there. All are contiguous, of one dtype and device; members differ in dimension 0 alone.
    """
    every = list(chain(*groups))
    if not _are_joined(every):
        first = every[0]
        whole = on_huge_pages(
            torch.empty(sum(p.numel() for p in every), dtype=first.dtype, device=first.device)
        )
        for p, place in zip(every, whole.split([p.numel() for p in every]), strict=True):
            p.data = place.view(p.shape).copy_(p)
    return [
        group[0].detach().as_strided((sum(len(p) for p in group), *group[0].shape[1:]), group[0].stride())
        for group in groups
    ]


def _are_joined(parameters: Sequence[Tensor]) -> bool:
    return all(
        a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
        and a.data_ptr() + a.nbytes == b.data_ptr()
        for a, b in pairwise(parameters)
    )


@torch.no_grad()
def part(groups: Sequence[Sequence[Tensor]]) -> None:
    """Undoes :func:`join`: where groups lie behind one another, each member gets memory of its own."""
    every = list(chain(*groups))
    if _are_joined(every):
        for p in every:
            p.data = p.detach().clone()
