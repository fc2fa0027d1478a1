"""Differences between versions of transformers, all in this file."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import transformers

_OLDEST, _NEWEST_MAJOR = (4, 46), 5  # what the tests run on, and pyproject.toml asks for


def _checked(version: str) -> tuple[int, int]:
    """(major, minor) of a version of transformers; ImportError below the oldest that is supported."""
    major, minor = (int(part) for part in version.split(".")[:2])
    supported = f"fastdllm_ext supports {'.'.join(map(str, _OLDEST))} to {_NEWEST_MAJOR}.x"
    if (major, minor) < _OLDEST:
        raise ImportError(f"transformers {version} is too old; {supported}")
    if major > _NEWEST_MAJOR:
        warnings.warn(f"transformers {version} has not been tried; {supported}", stacklevel=2)
    return major, minor


_VERSION = _checked(transformers.__version__)


def dtype_argument(dtype: torch.dtype | str) -> dict[str, Any]:
    """``from_pretrained``'s argument for the weights' dtype, named ``dtype`` since 4.56."""
    return {"dtype" if _VERSION >= (4, 56) else "torch_dtype": dtype}


def tied_weights(pairs: dict[str, str]) -> Any:
    """A model class's ``_tied_weights_keys`` from {tied: source}; before 5.0 a list of the tied ones."""
    return pairs if _VERSION >= (5, 0) else list(pairs)
