"""Where an operation can run: plain PyTorch, the CPU's instruction sets, the CUDA kernels in the emulator of
tests/simt (``simt``), a CUDA device if there is one.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdllm_ext import _C, ops, reference

# Schedules that the emulator runs every operation under (emulator.cpp): two extreme ones, two random.
SCHEDULES = [int(x) for x in os.environ.get("FASTDLLM_SIMT_SCHEDULES", "0,1,7,2026").split(",")]

_emulated = Path(os.environ.get("FASTDLLM_SIMT_LIBRARY", Path(_C.__file__).with_name("_simt.so")))
emulator = ctypes.CDLL(str(_emulated)) if _emulated.exists() else None
if emulator:
    torch.ops.load_library(str(_emulated))
    emulator.simt_set_schedule.argtypes = [ctypes.c_uint64]


@dataclass(frozen=True)
class Backend:
    """Runs operations somewhere; tensors go in and come out on the CPU."""

    name: str

    @property
    def is_cuda(self) -> bool:
        """Whether it runs the CUDA kernels, on a device or emulated."""
        return self.name in ("simt", "cuda")

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        narrow = (torch.bfloat16, torch.float16) if self.is_cuda else (torch.bfloat16,)
        return (torch.float32, *narrow)

    def run(self, name: str, *args: Any) -> Any:
        """Calls the operation; tensors that it changes are changed in place on the CPU."""
        if self.name == "reference":
            return getattr(reference, name)(*args)
        if self.name == "simt":
            return _run_emulated(getattr(torch.ops.fastdllm_simt, name), args)
        if self.name == "cuda":
            return _run_on_copies(getattr(ops, name), args, lambda x: x.cuda())
        _C.set_cpu_isa(self.name)
        return getattr(ops, name)(*args)


def _run_on_copies(op: Callable, args: tuple, copy: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    copies = [copy(x) if isinstance(x, torch.Tensor) else x for x in args]
    out = op(*copies)
    for before, after in zip(args, copies, strict=True):
        if isinstance(before, torch.Tensor):
            before.copy_(after)
    if isinstance(out, tuple):
        return tuple(x.cpu() for x in out)
    return out.cpu() if isinstance(out, torch.Tensor) else out


def tensors(values: Iterable[Any]) -> list[torch.Tensor]:
    """All tensors among arguments and results, those in tuples too."""
    flat = [x for value in values for x in (value if isinstance(value, tuple) else (value,))]
    return [x for x in flat if isinstance(x, torch.Tensor)]


def _clone(x: torch.Tensor) -> torch.Tensor:
    """As clone(), but with the same strides."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x)


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


def _run_emulated(op: Callable, args: tuple) -> Any:
    """Under every schedule; where results differ by a bit, a barrier or a wait is missing."""
    assert emulator is not None
    found: list[tuple[int, list[torch.Tensor]]] = []
    for schedule in SCHEDULES:
        emulator.simt_set_schedule(schedule)
        results = list(args) if schedule == SCHEDULES[-1] else []
        if not results:
            results = [_clone(x) if isinstance(x, torch.Tensor) else x for x in args]
        out = op(*results)
        found.append((schedule, tensors((*results, out))))
    first, truth = found[0]
    for schedule, others in found[1:]:
        for a, b in zip(truth, others, strict=True):
            assert torch.equal(_bits(a), _bits(b)), f"schedules {first} and {schedule} differ: a race"
    return out


def _marks(name: str) -> list[pytest.MarkDecorator]:
    missing = pytest.mark.skipif(emulator is None, reason="built without FASTDLLM_SIMT; see `make test`")
    return {"cuda": [pytest.mark.cuda], "simt": [missing]}.get(name, [])


BACKENDS = [
    pytest.param(Backend(name), id=name, marks=_marks(name))
    for name in ("reference", *_C.cpu_isas(), "simt", "cuda")
]
COMPILED = BACKENDS[1:]


def opcheck(name: str, args: tuple) -> None:
    """Schema, fake version and compilation of an operation."""
    op = getattr(torch.ops.fastdllm_ext, name).default
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if any(isinstance(x, torch.Tensor) and x.dtype == torch.float8_e4m3fn for x in args):
        checks.remove("test_schema")  # which compares tensors as torch cannot compare these
    torch.library.opcheck(op, args, test_utils=checks)


def relative_error(out: torch.Tensor, truth: torch.Tensor) -> float:
    """‖out − truth‖ / ‖truth‖ in float64."""
    return float((out.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-30))


# Relative to the norm: a few float32 roundings over sums of up to thousands of terms stay under 1e-5;
# bfloat16 rounds inputs and probabilities to 2⁻⁹ each.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}

each_backend: Callable = pytest.mark.parametrize("backend", BACKENDS)
each_compiled: Callable = pytest.mark.parametrize("backend", COMPILED)
