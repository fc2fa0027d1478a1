"""Evaluation: the backend `fastdllm` of lm-evaluation-harness, and what is measured beside its scores.

Importing this registers the backend where lm_eval is installed, and imports neither it nor a model.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdllm_ext.eval.harness import FastDLLM

__all__ = ["FastDLLM"]

NEEDS = 'evaluating needs lm_eval 0.4.13 or later: pip install "fastdllm_ext[eval]"'

# By name, so that the backend's module is imported when a run asks for it.
with contextlib.suppress(ImportError):
    # First its own, which lm_eval would leave out once another is known.
    import lm_eval.models  # noqa: F401
    from lm_eval.api.registry import model_registry

    model_registry.register("fastdllm", target="fastdllm_ext.eval.harness:FastDLLM")


def __getattr__(name: str) -> Any:
    if name != "FastDLLM":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fastdllm_ext.eval.harness import FastDLLM

    return FastDLLM
