"""``linear`` and ``linear_silu_mul`` with int8 weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from backends import Backend
from fastdllm_ext import ops, reference
from test_linear import LONG, MOST, SIZES, each_isa, on_cpu, threads

__all__ = ["threads"]  # a fixture

ROWS = [1, 2, 16, 17, 32, 33, 64, 65, MOST, MOST + 1, 2 * MOST + 3]
MOST_BYTES = 127 * 256 + 127  # the largest number of two bytes from -128 to 127, and of its sign
INT8: dict[str, Any] = {"low": -127, "high": 128, "dtype": torch.int8}


def make(rows: int, n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias and scales; behind the rows of x lies NaN, behind those of the weight 127."""
    x = torch.full((rows + 1, k + 3), torch.nan, dtype=dtype)
    x[:rows, :k] = torch.randn(rows, k) * 10 ** torch.empty(rows, 1).uniform_(-3, 3)
    weight = torch.full((n + 1, k + 5), 127, dtype=torch.int8)
    weight[:n, :k] = torch.randint(size=(n, k), **INT8)
    return x[:rows, :k], weight[:n, :k], torch.randn(n).to(dtype), torch.rand(n) / 100


def exact(x: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor) -> Tensor:
    return reference.linear(x.double(), weight.double() * scales.double()[:, None],
                            None if bias is None else bias.double(), compute=torch.float64)  # fmt: skip


def bound(x: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor) -> Tensor:
    """How far a result may lie from the exact one.

    The tile unit and vpdpbusd see x in steps of 1/32639 of the row's largest: half a step each, and the
    division and the product that round it, 3 * 2^-24 more. Others sum in float32: k roundings of at most the
    sum of all magnitudes. Then scale, unit and bias, a few roundings in float32 of what they make, one to the
    dtype.
    """
    largest = x.double().abs().amax(dim=1, keepdim=True)
    magnitudes = (weight.double().abs() * scales.double()[:, None]).T
    steps = largest * (0.5 / MOST_BYTES + 3 * 2**-24) * magnitudes.sum(0, keepdim=True)
    sums = x.shape[1] * 2**-24 * (x.double().abs() @ magnitudes)
    result = exact(x, weight, bias, scales).abs() + (0 if bias is None else bias.double().abs())
    return steps + sums + result * (torch.finfo(x.dtype).eps + 2**-21)


@each_isa
@pytest.mark.parametrize("n, k", [*SIZES, (96, 640), (40, 64), *LONG])
def test_linear(backend: Backend, n: int, k: int) -> None:
    for dtype in backend.dtypes:
        for rows in ROWS if k < 1000 else (1, 32, MOST + 1):
            x, weight, bias, scales = make(rows, n, k, dtype)
            for b in (bias, None):
                out = backend.run("linear", x, weight, b, scales)
                assert out.dtype == dtype
                assert out.shape == (rows, n)
                assert (
                    (out.double() - exact(x, weight, b, scales)).abs() <= bound(x, weight, b, scales)
                ).all()


def test_reference() -> None:
    x, weight, bias, scales = make(5, 7, 33, torch.float32)
    out = reference.linear(x, weight, bias, scales)
    assert ((out.double() - exact(x, weight, bias, scales)).abs() <= bound(x, weight, bias, scales)).all()


@each_isa
@pytest.mark.parametrize("n, k", [(1, 1), (15, 40), (33, 100), (200, 2500)])
def test_linear_silu_mul(backend: Backend, n: int, k: int) -> None:
    """The bits of linear, then silu_mul."""
    for dtype in backend.dtypes:
        for rows in (1, 32, 65, MOST + 1):
            x, weight, bias, scales = make(rows, 2 * n, k, dtype)
            for b in (bias, None):
                out = backend.run("linear_silu_mul", x, weight, b, scales)
                gate, up = backend.run("linear", x, weight, b, scales).chunk(2, dim=1)
                assert torch.equal(out, backend.run("silu_mul", gate, up))


@each_isa
def test_bits_depend_on_the_row_alone(backend: Backend, threads: None) -> None:
    """Not on the other rows, their number, threads, or where a row of x or of the weight begins."""
    for dtype in backend.dtypes:
        for n, k in ((75, 100), (1000, 5000)):
            x, weight, bias, scales = make(2 * MOST, n, k, dtype)
            torch.set_num_threads(1)
            together = backend.run("linear", x, weight, bias, scales)
            torch.set_num_threads(3)
            assert torch.equal(backend.run("linear", x, weight, bias, scales), together)
            for rows in (1, 17, 33, MOST + 1):
                few = torch.full((rows, k + 3), torch.inf, dtype=dtype)[:, 1 : k + 1]
                few[-1] = x[5]
                assert torch.equal(backend.run("linear", few, weight, bias, scales)[-1], together[5])
            part = backend.run("linear", x, weight[3:44], bias[3:44], scales[3:44])
            assert torch.equal(part, together[:, 3:44])


@each_isa
def test_the_largest_sums(backend: Backend) -> None:
    """All of one sign, at the most columns: what comes nearest to the end of 32 bits."""
    k = 1 << 16
    for byte in (127 * 257, -127 * 257, -126 * 256 - 128):  # low bytes of 127, -127, -128
        x = torch.full((1, k), float(byte))
        x[0, 0] = MOST_BYTES
        for w in (127, -127, -128):
            weight = torch.full((3, k), w, dtype=torch.int8)
            out = backend.run("linear", x, weight, None, torch.ones(3))
            truth = exact(x, weight, None, torch.ones(3))
            # Summed in float32 one by one, k roundings; of bytes exact.
            assert ((out.double() - truth).abs() <= truth.abs() * k * 2**-24).all()


def test_bytes_are_added_exactly() -> None:
    """Whole numbers of two bytes are what units of bytes see, and scales of one leave the sum."""
    names = {x.values[0].name for x in on_cpu} & {"avx512_bf16", "amx"}
    if not names:
        pytest.skip("a CPU without such units")
    x = torch.randint(-MOST_BYTES, MOST_BYTES + 1, (40, 300)).float()
    x[:, 7] = MOST_BYTES
    weight = torch.randint(size=(50, 300), **INT8)
    truth = x.long() @ weight.long().T
    for name in names:
        out = Backend(name).run("linear", x, weight, None, torch.ones(50))
        assert ((out.double() - truth).abs() <= truth.abs() * 2**-23).all()


def test_units_of_bytes_agree() -> None:
    """Bit for bit: whole numbers have no order of adding."""
    names = [x.values[0].name for x in on_cpu if x.values[0].name in ("avx512_bf16", "amx")]
    if len(names) < 2:
        pytest.skip("a CPU without a tile unit")
    for dtype in Backend("amx").dtypes:
        for rows, n, k in ((1, 3, 5), (33, 40, 301), (200, 70, 4100)):
            args = make(rows, n, k, dtype)
            a, b = (Backend(name).run("linear", *args) for name in names)
            assert torch.equal(a, b)


@each_isa
def test_nan_and_infinity_stay_in_their_row(backend: Backend) -> None:
    for dtype in backend.dtypes:
        x, weight, bias, scales = make(40, 20, 133, dtype)
        clean = backend.run("linear", x, weight, bias, scales)
        x[3, 132], x[4, 0], x[20, 64] = torch.nan, torch.inf, -torch.inf
        out = backend.run("linear", x, weight, bias, scales)
        bad = torch.tensor([3, 4, 20])
        assert not out[bad].isfinite().any()
        good = torch.ones(40, dtype=torch.bool).index_fill(0, bad, False)
        assert torch.equal(out[good], clean[good])


@each_isa
def test_rows_of_zeros_and_tiny_rows(backend: Backend) -> None:
    for dtype in backend.dtypes:
        _, weight, bias, scales = make(1, 20, 70, dtype)
        x = torch.zeros(3, 70, dtype=dtype)
        x[1] = 1e-30
        x[2] = 1e-44  # below what a float32 divides by; zero in bfloat16 products too
        out = backend.run("linear", x, weight, bias, scales)
        assert torch.equal(out, bias.expand(3, -1))


@each_isa
def test_shapes(backend: Backend) -> None:
    x, weight, scales = torch.randn(2, 3, 5, 8), torch.randint(size=(12, 8), **INT8), torch.rand(12)
    for view in (x, x[:, :, :1], x[1:, 2], x[0, 0, 0], x[:0]):
        out = backend.run("linear", view, weight, None, scales)
        assert out.shape == (*view.shape[:-1], 12)
        assert backend.run("linear_silu_mul", view, weight, None, scales).shape == (*view.shape[:-1], 6)
    assert backend.run("linear", x, weight[:0], None, scales[:0]).shape == (2, 3, 5, 0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"scales": None}, "weight has another dtype than the first argument"),
        ({"weight": torch.rand(6, 8)}, "weight has another dtype; with scales takes int8"),
        ({"weight": torch.ones(6, 8, dtype=torch.uint8)}, "with scales takes int8"),
        ({"scales": torch.rand(5)}, r"scales has shape \[5\]; takes \[6\]"),
        ({"scales": torch.rand(6).double()}, "scales has another dtype; takes float32"),
        ({"x": torch.rand(2, 8).half()}, "x is float16, which the CPU kernels do not take"),
        (
            {"x": torch.rand(1, 65537), "weight": torch.ones(6, 65537, dtype=torch.int8)},
            r"weight has shape \[6, 65537\]; as int8 takes rows of up to 65536",
        ),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    args = {"x": torch.rand(2, 8), "weight": torch.ones(6, 8, dtype=torch.int8), "bias": None,
            "scales": torch.rand(6)} | change  # fmt: skip
    for op in (ops.linear, ops.linear_silu_mul):
        with pytest.raises(RuntimeError, match=message):
            op(**args)


def test_opcheck() -> None:
    args = (torch.randn(3, 2, 8), torch.randint(size=(6, 8), **INT8), torch.randn(6), torch.rand(6))
    for op in (torch.ops.fastdllm_ext.linear.default, torch.ops.fastdllm_ext.linear_silu_mul.default):
        torch.library.opcheck(op, args)
