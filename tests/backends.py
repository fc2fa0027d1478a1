"""Where an operation can run: plain PyTorch, the CPU's instruction sets, a CUDA device if there is one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fastdllm_ext import _C, ops, reference


@dataclass(frozen=True)
class Backend:
    """Runs operations somewhere; tensors go in and come out on the CPU."""

    name: str

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        narrow = (torch.bfloat16, torch.float16) if self.name == "cuda" else (torch.bfloat16,)
        return (torch.float32, *narrow)

    def run(self, name: str, *args: Any) -> Any:
        """Calls the operation; tensors that it changes are changed in place on the CPU."""
        if self.name == "reference":
            return getattr(reference, name)(*args)
        if self.name != "cuda":
            _C.set_cpu_isa(self.name)
            return getattr(ops, name)(*args)
        moved = [x.cuda() if isinstance(x, torch.Tensor) else x for x in args]
        out = getattr(ops, name)(*moved)
        for before, after in zip(args, moved, strict=True):
            if isinstance(before, torch.Tensor):
                before.copy_(after)
        return out.cpu() if isinstance(out, torch.Tensor) else out


BACKENDS = [
    pytest.param(Backend(name), id=name, marks=[pytest.mark.cuda] if name == "cuda" else [])
    for name in ("reference", *_C.cpu_isas(), "cuda")
]
COMPILED = BACKENDS[1:]


def relative_error(out: torch.Tensor, truth: torch.Tensor) -> float:
    """‖out − truth‖ / ‖truth‖ in float64."""
    return float((out.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-30))


# Relative to the norm: a few float32 roundings over sums of up to thousands of terms stay under 1e-5;
# bfloat16 rounds inputs and probabilities to 2⁻⁹ each.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}

each_backend: Callable = pytest.mark.parametrize("backend", BACKENDS)
each_compiled: Callable = pytest.mark.parametrize("backend", COMPILED)
