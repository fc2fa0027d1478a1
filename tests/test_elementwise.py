from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from backends import TOLERANCE, Backend, each_backend, each_compiled, relative_error
from fastdllm_ext import reference

EPS = 1e-5
# One vector, odd, one pass of a block's registers less and more, longer than the registers hold.
SIZES = [1, 8, 33, 64, 1000, 3584, 4100, 8192, 8200, 13000]


def with_guards(rows: int, columns: int, dtype: torch.dtype, spread: float = 1.0) -> torch.Tensor:
    """[rows, columns] random, as a view: NaN behind every row and behind the last. Rows stay on 16 bytes."""
    wide = torch.full((rows + 1, columns + 16 - columns % 8), torch.nan, dtype=dtype)
    wide[:rows, :columns] = (torch.randn(rows, columns) * spread).to(dtype)
    return wide[:rows, :columns]


def weights(size: int, dtype: torch.dtype) -> torch.Tensor:
    guarded = torch.full((size + 8,), torch.nan, dtype=dtype)
    guarded[:size] = 1 + 0.3 * torch.randn(size)
    return guarded[:size]


def steps_apart(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """How many numbers of the dtype lie between, where both have the same sign; rounding changes no sign."""
    kind = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return (a.contiguous().view(kind).long() - b.contiguous().view(kind).long()).abs()


def assert_nearly_the_same_bits(out: torch.Tensor, truth: torch.Tensor, most: int) -> None:
    """In 16 bits: float32 sums differ in their last bits, which flips few roundings, each by one step."""
    apart = steps_apart(out, truth)
    assert int(apart.max()) <= most
    assert (apart > 0).double().mean() <= 2e-3 + 1 / apart.numel()


@each_backend
@pytest.mark.parametrize("hidden", SIZES)
def test_rms_norm(backend: Backend, hidden: int) -> None:
    for dtype in backend.dtypes:
        x, weight = with_guards(3, hidden, dtype), weights(hidden, dtype)
        out = backend.run("rms_norm", x, weight, EPS)
        truth = reference.rms_norm(x, weight, EPS)
        assert out.dtype == dtype
        assert out.is_contiguous()
        if dtype == torch.float32:
            assert relative_error(out, reference.rms_norm(x, weight, EPS, compute=torch.float64)) < 3e-7
        else:  # a step of the normalised value can be two of the product
            assert_nearly_the_same_bits(out, truth, 2)


@each_backend
@pytest.mark.parametrize("hidden", SIZES)
def test_add_rms_norm(backend: Backend, hidden: int) -> None:
    for dtype in backend.dtypes:
        x, weight = with_guards(3, hidden, dtype), weights(hidden, dtype)
        residual = torch.randn(3, hidden).to(dtype)
        wanted = residual + x
        out = backend.run("add_rms_norm", x, residual, weight, EPS)
        assert torch.equal(residual, wanted)
        assert torch.equal(out, backend.run("rms_norm", wanted, weight, EPS))


@each_backend
@pytest.mark.parametrize("columns", [1, 8, 33, 1000, 2048, 2049, 12288])
def test_silu_mul(backend: Backend, columns: int) -> None:
    for dtype in backend.dtypes:
        gate, up = with_guards(3, columns, dtype, spread=3), with_guards(3, columns, dtype)
        out = backend.run("silu_mul", gate, up)
        assert out.dtype == dtype
        assert out.is_contiguous()
        if dtype == torch.float32:
            assert relative_error(out, F.silu(gate.double()) * up.double()) < 3e-7
        else:
            assert_nearly_the_same_bits(out, F.silu(gate) * up, 2)


@each_backend
def test_silu_of_extreme_values(backend: Backend) -> None:
    x = torch.tensor(
        [0.0, -0.0, 88.0, -88.0, 1e4, -1e4, 3e38, -3e38, torch.inf, -torch.inf, torch.nan, -30.0]
    )
    for dtype in (torch.float32, torch.bfloat16):
        gate = x.to(dtype)
        out = backend.run("silu_mul", gate, torch.ones_like(gate))
        wanted = F.silu(gate.double()).to(dtype)
        torch.testing.assert_close(out, wanted, rtol=TOLERANCE[dtype], atol=1e-34, equal_nan=True)


@each_backend
def test_eps_keeps_small_rows_small(backend: Backend) -> None:
    x, weight = torch.tensor([[0.0] * 16, [1e-3] * 16, [1e-20] * 16]), torch.full((16,), 2.0)
    out = backend.run("rms_norm", x, weight, 1e-6)
    torch.testing.assert_close(out[:, 0], torch.tensor([0.0, 2.0 * 0.5**0.5, 2e-17]))
    assert backend.run("rms_norm", torch.full((1, 16), torch.nan), weight, 1e-6).isnan().all()


@each_compiled
def test_halves_of_one_fused_matrix(backend: Backend) -> None:
    for dtype in backend.dtypes:
        for columns in (16, 20):  # the second half begins on 16 bytes, and does not
            fused = torch.randn(5, 2 * columns).to(dtype)
            gate, up = fused.chunk(2, dim=1)
            out = backend.run("silu_mul", gate, up)
            assert torch.equal(out, backend.run("silu_mul", gate.contiguous(), up.contiguous()))


@each_compiled
@pytest.mark.parametrize("hidden", [24, 4096, 9000])
def test_bits_depend_on_the_row_alone(backend: Backend, hidden: int) -> None:
    """Not on the batch, nor on where a row begins or how far rows lie apart."""
    for dtype in backend.dtypes:
        x, residual, weight = torch.randn(4, hidden), torch.randn(4, hidden), weights(hidden, dtype)
        x, residual = x.to(dtype), residual.to(dtype)
        together = backend.run("add_rms_norm", x, residual.clone(), weight, EPS)
        shifted = torch.randn(4, hidden + 3).to(dtype)[:, 1 : hidden + 1]
        shifted.copy_(x)
        assert torch.equal(together, backend.run("add_rms_norm", shifted, residual.clone(), weight, EPS))
        for b in range(4):
            alone = backend.run("add_rms_norm", x[b : b + 1], residual[b : b + 1].clone(), weight, EPS)
            assert torch.equal(alone[0], together[b])
        odd = shifted[1]
        assert torch.equal(backend.run("silu_mul", odd, odd), backend.run("silu_mul", x, x)[1])


@each_compiled
def test_shapes(backend: Backend) -> None:
    """Leading dimensions are rows; no rows, no work."""
    x, weight = torch.randn(2, 3, 5, 8), torch.rand(8)
    for view in (x, x[:, :, :1], x[:1, :1, ::2], x[1:, 2], x[0, 0, 0], x[:0], x[:, 1:2, 3]):
        wanted = reference.rms_norm(view, weight, EPS)
        torch.testing.assert_close(backend.run("rms_norm", view, weight, EPS), wanted)
        torch.testing.assert_close(backend.run("silu_mul", view, view), F.silu(view) * view)
    assert backend.run("silu_mul", x[..., :0], x[..., :0]).shape == (2, 3, 5, 0)


@pytest.mark.parametrize(
    "name, args, message",
    [
        ("rms_norm", (torch.rand(2, 8), torch.rand(7), EPS), r"weight has shape \[7\]; takes \[8\]"),
        ("rms_norm", (torch.rand(2, 8), torch.rand(8).bfloat16(), EPS), "weight has another dtype"),
        ("rms_norm", (torch.rand(2, 8).half(), torch.rand(8).half(), EPS), "x is float16, which the CPU"),
        ("rms_norm", (torch.rand(2, 8).int(), torch.rand(8), EPS), "x has an unsupported dtype"),
        ("rms_norm", (torch.rand(8, 2).T, torch.rand(8), EPS), "x has strided columns"),
        ("rms_norm", (torch.rand(2, 3, 9, 8)[:, :, ::2], torch.rand(8), EPS), "x has unevenly spaced rows"),
        ("rms_norm", (torch.rand(2, 0), torch.rand(0), EPS), r"x has shape \[2, 0\]; takes rows of 1"),
        ("rms_norm", (torch.tensor(1.0), torch.rand(1), EPS), r"x is a scalar; takes \[\.\.\., hidden\]"),
        ("add_rms_norm", (torch.rand(2, 8), torch.rand(3, 8), torch.rand(8), EPS), "residual has shape"),
        ("add_rms_norm", (torch.rand(2, 8), torch.rand(2, 8).double(), torch.rand(8), EPS),
         "residual has another dtype"),
        ("add_rms_norm", (torch.rand(2, 8), torch.rand(2, 9)[:, :8], torch.rand(8), EPS),
         "residual is not contiguous"),
        ("silu_mul", (torch.rand(2, 8), torch.rand(2, 7)),
         r"up has shape \[2, 7\]; takes that of gate, \[2, 8\]"),
        ("silu_mul", (torch.rand(2, 8), torch.rand(2, 8).bfloat16()), "up has another dtype"),
        ("silu_mul", (torch.rand(2, 8), torch.rand(8, 2).T), "up has strided columns"),
        ("silu_mul", (torch.tensor(1.0), torch.tensor(1.0)), "gate is a scalar"),
    ],
)  # fmt: skip
def test_bad_arguments(name: str, args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"{name}: .*{message}"):
        Backend("portable").run(name, *args)


def test_opcheck() -> None:
    x, weight = torch.randn(3, 2, 8), torch.rand(8)
    for op, args in (
        (torch.ops.fastdllm_ext.rms_norm.default, (x, weight, EPS)),
        (torch.ops.fastdllm_ext.add_rms_norm.default, (x, torch.randn(3, 2, 8), weight, EPS)),
        (torch.ops.fastdllm_ext.silu_mul.default, (x, torch.randn(3, 2, 8))),
    ):
        torch.library.opcheck(op, args)
