"""Large pages of virtual memory for what is read from end to end: keys and values, weights."""

from __future__ import annotations

from torch import Tensor

from fastdllm_ext import _C


def on_huge_pages(x: Tensor) -> Tensor:
    """The same tensor, fresh and unwritten, with large pages of virtual memory where the CPU has them.

    A core finds its way through small ones at some 20 GB/s, where memory would give more.
    """
    if x.device.type == "cpu":
        _C.advise_huge_pages(x.data_ptr(), x.nbytes)
    return x
