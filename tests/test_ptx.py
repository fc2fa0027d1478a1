"""The wrappers of csrc/cuda/ptx.h against the PTX manual's own words: fragments, matrices, copies, barriers.

The emulator is what the kernels are tested with, so it is tested here; a device answers the same questions.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch

from backends import SCHEDULES, emulator
from fastdllm_ext import _C

_built_for_cuda = Path(_C.__file__).with_name("_ptx_probe.so")


class Probe:
    """Calls a probe of tests/ptx_probe.cu; tensors are changed in place."""

    def __init__(self, name: str) -> None:
        self.on_device = name == "cuda"
        if self.on_device and not _built_for_cuda.exists():
            pytest.skip("built without FASTDLLM_PTX_PROBE")
        self.library = ctypes.CDLL(str(_built_for_cuda)) if self.on_device else emulator

    def __call__(self, name: str, *args: Any) -> None:
        function = getattr(self.library, f"probe_{name}")
        function.restype = ctypes.c_char_p
        if self.on_device:
            torch.cuda.synchronize()
        moved = [x.cuda() if self.on_device and isinstance(x, torch.Tensor) else x for x in args]
        error = function(
            *(
                ctypes.c_void_p(x.data_ptr()) if isinstance(x, torch.Tensor) else ctypes.c_int32(x)
                for x in moved
            )
        )
        assert error is None, error.decode()
        for before, after in zip(args, moved, strict=True):
            if isinstance(before, torch.Tensor):
                before.copy_(after)


@pytest.fixture(
    params=[
        *(
            pytest.param(
                ("simt", schedule),
                id=f"simt-{schedule}",
                marks=pytest.mark.skipif(emulator is None, reason="built without FASTDLLM_SIMT"),
            )
            for schedule in SCHEDULES
        ),
        pytest.param(("cuda", 0), id="cuda", marks=pytest.mark.cuda),
    ]
)
def probe(request: pytest.FixtureRequest) -> Probe:
    name, schedule = request.param
    if emulator:
        emulator.simt_set_schedule(schedule)
    return Probe(name)


def words(x: torch.Tensor) -> torch.Tensor:
    """Pairs of 16-bit elements as 32-bit registers, the first in the low half."""
    return x.contiguous().view(torch.int32)


LANES = [(lane, lane // 4, lane % 4) for lane in range(32)]  # "groupID" and "threadID_in_group"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mma_fragments(probe: Probe, dtype: torch.dtype) -> None:
    """PTX manual, "Matrix fragments for mma.m16n8k16": rows and columns of a0..a7, b0..b3, c0..c3."""
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8)
    own_a, own_b, own_c = (
        torch.empty(32, 8, dtype=dtype),
        torch.empty(32, 4, dtype=dtype),
        torch.empty(32, 4),
    )
    for lane, group, thread in LANES:
        for i in range(8):
            row = group if i in (0, 1, 4, 5) else group + 8
            column = thread * 2 + (i & 1) + (0 if i < 4 else 8)
            own_a[lane, i] = a[row, column]
        for i in range(4):
            own_b[lane, i] = b[thread * 2 + (i & 1) + (0 if i < 2 else 8), group]
            own_c[lane, i] = c[group if i < 2 else group + 8, thread * 2 + (i & 1)]
    probe("mma", int(dtype == torch.bfloat16), words(own_a), words(own_b), own_c)
    truth = a.double() @ b.double() + c.double()
    for lane, group, thread in LANES:
        for i in range(4):
            wanted = truth[group if i < 2 else group + 8, thread * 2 + (i & 1)]
            assert abs(own_c[lane, i] - wanted) < 1e-5, "float32 sums of 17 terms of order 1"


@pytest.mark.parametrize("transposed", [0, 1])
def test_ldmatrix(probe: Probe, transposed: int) -> None:
    """Lanes 8 i to 8 i + 7 address the rows of matrix i; each lane gets two elements of row lane / 4."""
    image = torch.randint(-32768, 32767, (64, 8), dtype=torch.int16)
    rows = torch.randperm(64)[:32].to(torch.int32)
    out = torch.zeros(32, 4, dtype=torch.int32)
    probe("ldmatrix", transposed, image, rows, out)
    found = out.view(torch.int16).view(32, 4, 2)
    for lane, group, thread in LANES:
        for i in range(4):
            matrix = image[rows[8 * i : 8 * i + 8].long()]
            if transposed:
                matrix = matrix.T
            assert torch.equal(found[lane, i], matrix[group, 2 * thread : 2 * thread + 2])


def test_cp_async(probe: Probe) -> None:
    """A wait makes the thread's own copies of older groups visible; an ignored source gives zeros."""
    image = torch.randint(1, 255, (64, 16), dtype=torch.uint8)
    valid = torch.randint(0, 2, (64,), dtype=torch.int32)
    out = torch.zeros_like(image)
    probe("copies", image, valid, out)
    assert torch.equal(out, image * valid[:, None].to(torch.uint8))


def test_bulk_copies_and_barrier_phases(probe: Probe) -> None:
    if probe.on_device and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("bulk copies need compute capability 9.0")
    image = torch.randint(0, 255, (5, 64, 16), dtype=torch.uint8)
    out = torch.zeros_like(image)
    probe("bulk", image, 5, out)
    assert torch.equal(out[:, :48], image[:, :48])


def test_elementwise(probe: Probe) -> None:
    x = torch.cat(
        [torch.randn(1000) * 30, torch.tensor([0.0, -0.0, 1.0, -200.0, 1e-30, 70000.0, 1.00390625, -2.5])]
    )
    x = torch.cat([x, torch.tensor([torch.inf, -torch.inf, torch.nan, -torch.nan])])
    powers, halves = torch.zeros_like(x), torch.zeros(len(x) // 2, dtype=torch.int32)
    brains = halves.clone()
    abc = torch.randn(3, 64).mul(2.0 ** torch.randint(-130, 60, (3, 64))).bfloat16()
    abc[2, ::4] = -(abc[0].double() * abc[1].double()).bfloat16()[::4]  # so that little is left
    abc[2, 1::4] = -0.0
    sums = torch.zeros(32, dtype=torch.int32)
    probe("elementwise", x, len(x), powers, halves, brains, words(abc), sums)
    wanted = (abc[0].double() * abc[1].double() + abc[2].double()).bfloat16()
    assert torch.equal(sums.view(torch.int16), wanted.view(torch.int16)), "rounded once, denormals kept"
    truth = torch.exp2(x.double())
    truth[truth < 2.0**-126] = 0
    finite = truth < 2.0**127
    assert ((powers - truth).abs()[finite] <= truth[finite] * 2**-22).all(), "two ulp"
    assert torch.equal(powers.isnan(), x.isnan())
    for found, dtype in ((halves, torch.float16), (brains, torch.bfloat16)):
        got, wanted = found.view(dtype), x.to(dtype)
        assert torch.equal(got.isnan(), wanted.isnan())
        assert torch.equal(got.nan_to_num(), wanted.nan_to_num())


@pytest.mark.skipif(emulator is None, reason="built without FASTDLLM_SIMT")
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "mistake, message",
    [
        ("missing_thread", "deadlock"),
        ("diverged_collective", "different collectives"),
        ("unaligned_copy", "whole 16 bytes"),
        ("copy_outside", "outside of shared memory"),
        ("write_behind", "behind the shared memory"),
        ("forgotten_wait", "asynchronous copies"),
        ("barrier_never_comes", "deadlock"),
    ],
)
def test_the_emulator_finds(mistake: str, message: str, schedule: int) -> None:
    assert emulator is not None
    emulator.simt_set_schedule(schedule)
    function = getattr(emulator, f"mistake_{mistake}")
    function.restype = ctypes.c_char_p
    error = function()
    assert error is not None
    assert message in error.decode()


@pytest.mark.skipif(emulator is None, reason="built without FASTDLLM_SIMT")
def test_the_emulator_shows_a_missing_barrier() -> None:
    assert emulator is not None
    found = set()
    for schedule in SCHEDULES:
        emulator.simt_set_schedule(schedule)
        out = torch.zeros(128)
        emulator.mistake_missing_barrier(ctypes.c_void_p(out.data_ptr()))
        found.add(tuple(out.nan_to_num(-1).tolist()))
    assert found != {tuple(float((i + 33) % 128) for i in range(128))}
    assert len(found) > 1, "schedules differ"
