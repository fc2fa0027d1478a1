"""Rotary angles, computed on demand and shared by models and patches."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def table_length(length: int) -> int:
    """Positions of the table for a row of this length: few different tables, for they are kept."""
    return 1 << max(length - 1, 1023).bit_length()


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # what is cached must also serve a later training step
def rope_table(
    length: int,
    head_dim: int,
    theta: float,
    device: torch.device,
    rounded: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, each [length, head_dim / 2] float32, rounded to a dtype.

    Kept outside of any module: a non-persistent buffer would come back uninitialised from
    ``from_pretrained`` on transformers 5.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), 1.0 / theta**exponent)
    return angles.cos().to(rounded).float(), angles.sin().to(rounded).float()
