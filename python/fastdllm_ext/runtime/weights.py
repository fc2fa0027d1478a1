"""Parameters that lie behind one another in memory, so that one product does the work of several.

The parameters stay the model's own: the same objects under the same names with the same values, each a slice
of one tensor. Nothing is kept beside them. Where they already lie so is seen from their addresses; what moves
them apart (``model.to``, ``copy.deepcopy``) is mended by joining them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


@torch.no_grad()
def join(parameters: Sequence[Tensor]) -> Tensor:
    """One tensor of which the parameters are slices along dimension 0, in order; they are copied if need be.

    They are contiguous, of one dtype and device, and differ in dimension 0 alone.
    """
    first, rows = parameters[0], sum(p.shape[0] for p in parameters)
    if not _are_joined(parameters):
        whole = torch.cat([p.detach() for p in parameters])
        for p, part in zip(parameters, whole.split([p.shape[0] for p in parameters]), strict=True):
            p.data = part
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride())


def _are_joined(parameters: Sequence[Tensor]) -> bool:
    return all(
        a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
        and a.data_ptr() + a.nbytes == b.data_ptr()
        for a, b in pairwise(parameters)
    )


@torch.no_grad()
def part(parameters: Sequence[Tensor]) -> None:
    """Undoes :func:`join`: each gets memory of its own."""
    if len(parameters) > 1 and _are_joined(parameters):
        for p in parameters:
            p.data = p.detach().clone()
