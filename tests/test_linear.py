from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from backends import COMPILED, TOLERANCE, Backend, relative_error
from fastdllm_ext import _C, ops, reference

# The emulator has no kernel for these; on CUDA they are torch's.
on_cpu: list[Any] = [x for x in COMPILED if not x.values[0].is_cuda]
each_isa: Callable = pytest.mark.parametrize("backend", on_cpu)
each_place: Callable = pytest.mark.parametrize(
    "backend", [pytest.param(Backend("reference"), id="reference"), *on_cpu, COMPILED[-1]]
)

FEW_ROWS = {getattr(torch, name): rows for name, rows in _C.FEW_ROWS.items()}
MOST = max(FEW_ROWS.values())
ROWS = [1, 2, 8, 16, 17, 31, 32, 33, 64, 65, MOST, MOST + 1]
# n and k: one, odd, below and above a tile, a band, an item, a part of k that is multiplied at a time.
SIZES = [(1, 1), (5, 2), (16, 32), (17, 33), (31, 31), (32, 64), (33, 100), (47, 95), (96, 256), (100, 513)]
LONG = [(40, 2048), (70, 4100), (300, 9001)]


@pytest.fixture
def threads() -> Iterator[None]:
    """The number of threads is put back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make(rows: int, n: int, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, weight and bias with NaN behind their rows and behind the last."""

    def guarded(rows: int, columns: int, gap: int) -> torch.Tensor:
        wide = torch.full((rows + 1, columns + gap), torch.nan, dtype=dtype)
        wide[:rows, :columns] = torch.randn(rows, columns).to(dtype)
        return wide[:rows, :columns]

    return guarded(rows, k, 3), guarded(n, k, 5), guarded(1, n, 7)[0]


def assert_linear(backend: Backend, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    out = backend.run("linear", x, weight, bias)
    truth = reference.linear(x.double(), weight.double(), None if bias is None else bias.double(),
                             compute=torch.float64)  # fmt: skip
    assert out.dtype == x.dtype
    assert out.is_contiguous()
    assert out.shape == truth.shape
    assert relative_error(out, truth) < TOLERANCE[x.dtype]


@each_place
@pytest.mark.parametrize("n, k", SIZES)
def test_linear(backend: Backend, n: int, k: int) -> None:
    for dtype in backend.dtypes:
        for rows in ROWS:
            x, weight, bias = make(rows, n, k, dtype)
            assert_linear(backend, x, weight, bias)
            assert_linear(backend, x, weight, None)


@each_place
@pytest.mark.parametrize("n, k", LONG)
def test_long_rows(backend: Backend, n: int, k: int) -> None:
    """float32 sums one product after the other: the error grows with the root of k, to 2e-6 at 9,001."""
    for dtype in backend.dtypes:
        for rows in (1, 32, 40, 64, MOST):
            assert_linear(backend, *make(rows, n, k, dtype))


@each_isa
@pytest.mark.parametrize("n, k", [(1, 1), (15, 40), (16, 32), (33, 100), (48, 64), (200, 2500)])
def test_linear_silu_mul(backend: Backend, n: int, k: int) -> None:
    """The bits of linear, then silu_mul."""
    for dtype in backend.dtypes:
        for rows in ROWS:
            x, weight, bias = make(rows, 2 * n, k, dtype)
            for b in (bias, None):
                out = backend.run("linear_silu_mul", x, weight, b)
                gate, up = backend.run("linear", x, weight, b).chunk(2, dim=1)
                assert out.is_contiguous()
                assert torch.equal(out, backend.run("silu_mul", gate, up))


@each_place
def test_like_torch(backend: Backend) -> None:
    """Rounded where torch rounds: bits differ only where the order of the sum flips a rounding."""
    x, weight = torch.randn(32, 512).bfloat16(), torch.randn(320, 512).bfloat16()
    bias = (100 * torch.randn(320)).bfloat16()
    for b in (bias, None):
        out = backend.run("linear", x, weight, b)
        assert (out != F.linear(x, weight, b)).double().mean() < 2e-3


@each_isa
def test_rows_of_a_fused_weight(backend: Backend) -> None:
    for dtype in backend.dtypes:
        fused, bias = torch.randn(100, 70).to(dtype), torch.randn(100).to(dtype)
        x = torch.randn(9, 70).to(dtype)
        whole = backend.run("linear", x, fused, bias)
        for begin, end in ((0, 40), (3, 44), (40, 100), (99, 100)):
            part = backend.run("linear", x, fused[begin:end], bias[begin:end])
            assert torch.equal(part, whole[:, begin:end])
        every_other = backend.run("linear", x, fused[::2], bias[::2].contiguous())
        assert torch.equal(every_other, whole[:, ::2])
        columns = backend.run("linear", x[:, 1:34], fused[:, 1:34], bias)
        contiguous = (x[:, 1:34].contiguous(), fused[:, 1:34].contiguous(), bias)
        assert torch.equal(columns, backend.run("linear", *contiguous))


@each_isa
def test_shapes(backend: Backend) -> None:
    """Leading dimensions are rows; no rows or no columns, no work."""
    x, weight = torch.randn(2, 3, 5, 8), torch.randn(12, 8)
    for view in (x, x[:, :, :1], x[:1, :1, ::2], x[1:, 2], x[0, 0, 0], x[:0], x[:, 1:2, 3]):
        torch.testing.assert_close(backend.run("linear", view, weight, None), F.linear(view, weight))
        assert backend.run("linear_silu_mul", view, weight, None).shape == (*view.shape[:-1], 6)
    assert backend.run("linear", x, weight[:0], None).shape == (2, 3, 5, 0)
    assert backend.run("linear_silu_mul", x, weight[:0], None).shape == (2, 3, 5, 0)


@each_isa
def test_bits_depend_on_the_row_alone(backend: Backend) -> None:
    """Not on the other rows, not on how many there are, nor on where a row begins."""
    for dtype in backend.dtypes:
        for k in (100, 5000):
            x, weight, bias = make(FEW_ROWS[dtype], 75, k, dtype)
            together = backend.run("linear", x, weight, bias)
            for rows in (1, 2, 15, 16, 17, 32, 33, 64):
                few = torch.full((rows, k + 3), torch.inf, dtype=dtype)[:, 1 : k + 1]
                few[-1] = x[5]
                assert torch.equal(backend.run("linear", few, weight, bias)[-1], together[5])


@each_isa
def test_bits_do_not_depend_on_threads(backend: Backend, threads: None) -> None:
    for dtype in backend.dtypes:
        for n, k in ((1000, 700), (2000, 5000)):
            x, weight, bias = make(32, n, k, dtype)
            found = []
            for count in (1, 2, 3, 2):
                torch.set_num_threads(count)
                found.append([backend.run(name, x, weight, bias) for name in ("linear", "linear_silu_mul")])
            for other in found[1:]:
                assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@each_isa
def test_nan_and_infinity_stay_in_their_row_and_column(backend: Backend) -> None:
    for dtype in backend.dtypes:
        for k in (33, 3000):
            x, weight, bias = make(20, 40, k, dtype)
            clean = backend.run("linear", x, weight, bias)
            x[3, k - 1], x[4, 0], weight[39, 7], weight[17, k - 1] = (
                torch.nan,
                torch.inf,
                torch.nan,
                -torch.inf,
            )
            out = backend.run("linear", x, weight, bias)
            assert out[3].isnan().all()
            assert out[:, 39].isnan().all()
            touched = torch.zeros(20, 40, dtype=torch.bool)
            touched[3:5] = touched[:, 39] = touched[:, 17] = True
            assert torch.equal(out.isfinite(), ~touched)
            assert torch.equal(out[~touched], clean[~touched])
            truth = x.double() @ weight.double().T + bias.double()
            assert torch.equal(out.isinf(), truth.isinf())
            assert torch.equal(out[out.isinf()].double(), truth[out.isinf()])


def test_float16_goes_to_torch() -> None:
    x, weight = torch.randn(4, 16).half(), torch.randn(8, 16).half()
    assert torch.equal(ops.linear(x, weight), F.linear(x, weight))


@pytest.mark.parametrize(
    "args, message",
    [
        ((torch.rand(2, 8), torch.rand(6, 7)), r"weight has shape \[6, 7\]; takes \[\*, 8\]"),
        ((torch.rand(2, 8), torch.rand(8)), r"weight has shape \[8\]; takes \[\*, 8\]"),
        ((torch.rand(2, 8), torch.rand(6, 8).bfloat16()), "weight has another dtype"),
        ((torch.rand(2, 8), torch.rand(8, 6).T), "weight has strided columns"),
        ((torch.rand(2, 8), torch.rand(6, 8), torch.rand(5)), r"bias has shape \[5\]; takes \[6\]"),
        ((torch.rand(2, 8), torch.rand(6, 8), torch.rand(6).double()), "bias has another dtype"),
        ((torch.rand(2, 8), torch.rand(6, 8), torch.rand(12)[::2]), "bias is not contiguous"),
        ((torch.rand(2, 8).int(), torch.rand(6, 8).int()), "x has an unsupported dtype"),
        ((torch.rand(8, 2).T, torch.rand(6, 8)), "x has strided columns"),
        ((torch.rand(2, 3, 9, 8)[:, :, ::2], torch.rand(6, 8)), "x has unevenly spaced rows"),
        ((torch.rand(2, 0), torch.rand(6, 0)), r"x has shape \[2, 0\]; takes rows of 1"),
        ((torch.tensor(1.0), torch.rand(6, 1)), r"x is a scalar; takes \[\.\.\., k\]"),
    ],
)
def test_bad_arguments(args: tuple[Any, ...], message: str) -> None:
    for name in ("linear", "linear_silu_mul"):
        with pytest.raises(RuntimeError, match=f"{name}: .*{message}"):
            Backend("portable").run(name, *args)


def test_halves_must_be_equal() -> None:
    with pytest.raises(RuntimeError, match="linear_silu_mul: weight has 7 rows; takes those of the gate and"):
        ops.linear_silu_mul(torch.rand(2, 8), torch.rand(7, 8))
    with pytest.raises(RuntimeError, match="linear_silu_mul: x is float16, which the CPU"):
        ops.linear_silu_mul(torch.rand(2, 8).half(), torch.rand(6, 8).half())


def test_opcheck() -> None:
    x, weight, bias = torch.randn(3, 2, 8), torch.randn(6, 8), torch.randn(6)
    for op in (torch.ops.fastdllm_ext.linear.default, torch.ops.fastdllm_ext.linear_silu_mul.default):
        torch.library.opcheck(op, (x, weight, bias))
        torch.library.opcheck(op, (x, weight, None))
        torch.library.opcheck(op, (torch.randn(MOST + 1, 8), weight, bias))
