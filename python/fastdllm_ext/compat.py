"""Differences between versions of transformers, all in this file."""

from __future__ import annotations

from typing import Any

import torch
import transformers

_VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])


def dtype_argument(dtype: torch.dtype | str) -> dict[str, Any]:
    """``from_pretrained``'s argument for the weights' dtype, named ``dtype`` since 4.56."""
    return {"dtype" if _VERSION >= (4, 56) else "torch_dtype": dtype}
