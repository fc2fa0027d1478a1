"""Small arguments of every operation, for tests that go over all of them."""

from __future__ import annotations

from typing import Any

import torch

import test_paged_attention
import test_rope_write_kv
import test_unmask
from fastdllm_ext import ops

NAMES = [name for name in ops.__all__ if name.islower()]
# Those that have a CUDA kernel of ours.
LAUNCHED = [name for name in NAMES if name not in ("linear", "linear_silu_mul")]


def arguments(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """Shapes are the same each time, numbers are not."""
    if name == "rope_write_kv":
        args = test_rope_write_kv.make(9, dtype=dtype)
        args[-2:] = [x.zero_() for x in args[-2:]]  # so that results can be compared
        return tuple(args)
    if name == "paged_attention":
        return test_paged_attention.Case.make([32, 5, 1], [200, 64, 33], dtype=dtype).args
    if name == "unmask":
        batch = test_unmask.Batch([8, 0, 3], dtype=dtype, temperature=0.5, top_p=0.9, rank_temperature=0.5)
        return batch.args
    if name == "copy_pages":
        return torch.randn(3, 9, 2, 16, 8).to(dtype), torch.tensor([0, 8, 0]), torch.tensor([4, 1, 5])
    x, y, weight = torch.randn(5, 200).to(dtype), torch.randn(5, 200).to(dtype), torch.rand(200).to(dtype)
    if name.startswith("linear"):
        return x, torch.randn(48, 200).to(dtype), torch.randn(48).to(dtype)
    return {
        "rms_norm": (x, weight, 1e-5),
        "add_rms_norm": (x, y, weight, 1e-5),
        "silu_mul": (x, y),
        "quantize_fp8": (x,),
    }[name]
