from __future__ import annotations

from typing import Any

import pytest
import torch

from backends import Backend, each_backend, each_compiled, relative_error
from fastdllm_ext import reference
from test_elementwise import with_guards

# One vector, odd, what a block's registers hold of float32 and of 16 bits, and longer rows.
SIZES = [1, 8, 33, 64, 1000, 4099, 6144, 6148, 12288, 12296, 13001]
NAN, ZERO, LARGEST = 0x7F, 0x00, 0x7E


def codes(values: torch.Tensor) -> torch.Tensor:
    """Their bits, with torch's two NaN as one."""
    bits = values.view(torch.uint8)
    return torch.where(bits == 0xFF, NAN, bits)


def assert_same(found: tuple[torch.Tensor, torch.Tensor], x: torch.Tensor) -> None:
    """Bit for bit what torch makes of x; so all backends give the same bits."""
    for out, shape, dtype in zip(
        found, (x.shape, (*x.shape[:-1], 1)), (torch.float8_e4m3fn, torch.float32), strict=True
    ):
        assert (out.shape, out.dtype) == (shape, dtype)
        assert out.is_contiguous()
    values, scales = reference.quantize_fp8(x)
    assert torch.equal(codes(found[0]), codes(values))
    assert not (found[0].view(torch.uint8) == 0xFF).any(), "one NaN, whatever its sign was"
    kept = torch.where(scales.isnan(), torch.tensor(torch.nan), scales)
    assert torch.equal(found[1].view(torch.int32), kept.view(torch.int32))


@each_backend
@pytest.mark.parametrize("k", SIZES)
def test_against_torch(backend: Backend, k: int) -> None:
    for dtype in backend.dtypes:
        x = with_guards(3, k, dtype, spread=100)
        x[1] *= 1e-3
        x[2, 1:] *= 1e-6  # far below the row's largest: 8-bit denormals and zeros
        if backend.name != "reference":
            assert_same(backend.run("quantize_fp8", x), x)
        values, scales = backend.run("quantize_fp8", x)
        error = (values.double() * scales - x.double()).abs()
        bound = torch.maximum(2**-4 * x.double().abs(), 2**-10 * scales)
        assert (error <= bound * (1 + 2**-20)).all(), "half a step, but for the rounding of the quotient"
        assert (values.float().abs().amax(-1) == 448).all()


@each_compiled
def test_rounding(backend: Backend) -> None:
    """Every number of 8 bits, what lies half-way between two, and the neighbours of that; the scale is 1."""
    numbers = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (numbers[1:] + numbers[:-1]) / 2
    around = [torch.nextafter(middles, torch.tensor(far)) for far in (0.0, 500.0)]
    x = torch.cat([numbers, middles, *around])
    x = torch.stack([x, -x])
    values, scales = backend.run("quantize_fp8", x)
    assert (scales == 1).all()
    assert_same((values, scales), x)
    assert torch.equal(values[0, :127].view(torch.uint8), torch.arange(0x7F, dtype=torch.uint8))
    assert (values[0, 127:253].view(torch.uint8) % 2 == 0).all(), "ties go to the even one"


@each_compiled
def test_all_magnitudes(backend: Backend) -> None:
    """Rows of random bits: of every exponent, denormals among them, and rows of one exponent each."""
    x = torch.randint(-(2**31), 2**31, (40, 77)).to(torch.int32)
    x[:20] = x[:20] & ~0x7F800000 | torch.linspace(0, 254, 20).to(torch.int32)[:, None] << 23
    for dtype in backend.dtypes:
        rows = x.view(torch.float32).nan_to_num().to(dtype).nan_to_num()
        assert_same(backend.run("quantize_fp8", rows), rows)
        tiny = (torch.randn(20, 77) * 1e-38 * 10 ** -torch.linspace(0, 7, 20)[:, None]).to(dtype)
        assert_same(backend.run("quantize_fp8", tiny), tiny)


@each_compiled
def test_rows_of_extremes(backend: Backend) -> None:
    largest = torch.finfo(torch.float32).max
    rows: list[tuple[list[float], float, list[int]]] = [  # x, its scale, and its values' bits
        ([0.0, 0.0, 0.0], 1.0, [ZERO, ZERO, ZERO]),
        ([0.0, -0.0, 0.0], 1.0, [ZERO, 0x80, ZERO]),
        ([0.0, 1e-45, -1e-45], 1.0, [ZERO, ZERO, 0x80]),  # the quotient of 2⁻¹⁴⁹ and 448 is zero
        ([0.0, 448 * 2.0**-149, 0.0], 2.0**-149, [ZERO, LARGEST, ZERO]),
        ([0.0, 600 * 2.0**-149, 0.0], 2.0**-149, [ZERO, LARGEST, ZERO]),  # 600 saturates
        ([largest, -largest, 1.0], largest / 448, [LARGEST, 0x80 | LARGEST, ZERO]),
        ([1.0, torch.nan, -1.0], torch.nan, [NAN, NAN, NAN]),
        ([1.0, -torch.nan, torch.inf], torch.nan, [NAN, NAN, NAN]),
        ([1.0, torch.inf, -1.0], torch.nan, [NAN, NAN, NAN]),
        ([1.0, -torch.inf, 0.0], torch.nan, [NAN, NAN, NAN]),
    ]
    x = torch.tensor([row for row, _, _ in rows])
    x.view(torch.int32)[6, 1] = 0x7FA12345  # a NaN with bits of its own
    values, scales = backend.run("quantize_fp8", x)
    assert values.view(torch.uint8).tolist() == [bits for _, _, bits in rows]
    wanted = torch.tensor([[scale] for _, scale, _ in rows])
    torch.testing.assert_close(scales, wanted, rtol=2**-24, atol=0, equal_nan=True)
    assert_same((values, scales), x)


@each_compiled
@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_a_bad_number_anywhere_makes_the_rows_scale_nan(backend: Backend, bad: float) -> None:
    places = [0, 1, 5, 31, 32, 255, 256, 2047, 4096, 8200, 13000]
    for dtype in backend.dtypes:
        x = with_guards(len(places) + 1, 13001, dtype)
        x[torch.arange(len(places)), places] = bad
        assert_same(backend.run("quantize_fp8", x), x)
        scales = backend.run("quantize_fp8", x)[1]
        assert scales.isfinite().flatten().tolist() == [False] * len(places) + [True]


@each_compiled
def test_shapes(backend: Backend) -> None:
    """Leading dimensions are rows, which may be strided; no rows, no work."""
    for dtype in backend.dtypes:
        x = torch.randn(2, 3, 5, 24).to(dtype)
        for view in (x, x[:, :, :1], x[:1, :1, ::2], x[1:, 2], x[0, 0, 0], x[:0], x[:, 1:2, 3]):
            assert_same(backend.run("quantize_fp8", view), view)
        for columns in (slice(0, 16), slice(8, 24), slice(3, 19)):  # on 16 bytes, and not
            assert_same(backend.run("quantize_fp8", x[..., columns]), x[..., columns])


def product(backend: Backend, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x · weightᵀ of the quantised rows of both, [rows, n] bfloat16."""
    device = "cuda" if backend.name == "cuda" else "cpu"
    if device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("torch multiplies 8-bit floats with scales of rows from compute capability 9.0 on")
    if device == "cpu" and torch.__version__ < (2, 13):
        pytest.skip("torch multiplies 8-bit floats with scales of rows on the CPU from 2.13 on")
    a, scale_a = (t.to(device) for t in backend.run("quantize_fp8", x))
    b, scale_b = (t.to(device) for t in backend.run("quantize_fp8", weight))
    out = torch._scaled_mm(a, b.t(), scale_a=scale_a, scale_b=scale_b.t(), out_dtype=torch.bfloat16)
    return out.cpu()


@each_compiled
@pytest.mark.parametrize("draw", [torch.randn, torch.rand])
def test_product(backend: Backend, draw: Any) -> None:
    """A value errs by dx <= max(2⁻⁴ |x|, 2⁻¹⁰ scale), so a product by the sum of dx |w| + |x| dw + dx dw.

    What sums and bfloat16 round is below 2⁻⁸ of the sum of |x w|. Without negative numbers the bound is about
    13% of the product. In the norm errors cancel: uniform ones of at most 2⁻⁴ are 2⁻⁴ / √3 of either factor,
    and together √2 times that, 0.051 of the product.
    """
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = draw(32, 512).to(dtype), draw(48, 512).to(dtype)
        out, truth = product(backend, x, weight), x.double() @ weight.double().T
        sizes = [t.double().abs() for t in (x, weight)]
        dx, dw = (torch.maximum(2**-4 * t, 2**-10 * t.amax(-1, keepdim=True) / 448) for t in sizes)
        bound = dx @ sizes[1].T + (sizes[0] + dx) @ dw.T + 2**-8 * (sizes[0] @ sizes[1].T)
        assert ((out.double() - truth).abs() <= bound).all()
        assert relative_error(out, truth) < 2**-4


@each_compiled
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_product_with_a_bad_number(backend: Backend, bad: float) -> None:
    x, weight = torch.randn(32, 64), torch.randn(48, 64)
    x[3, 5] = weight[7, 11] = bad
    wanted = torch.zeros(32, 48, dtype=torch.bool)
    wanted[3] = wanted[:, 7] = True
    assert torch.equal(product(backend, x, weight).isnan(), wanted)


@pytest.mark.parametrize(
    "x, message",
    [
        (torch.rand(2, 8).half(), "x is float16, which the CPU"),
        (torch.rand(2, 8).double(), "x has an unsupported dtype"),
        (torch.rand(8, 2).T, "x has strided columns"),
        (torch.rand(2, 3, 9, 8)[:, :, ::2], "x has unevenly spaced rows"),
        (torch.rand(2, 0), r"x has shape \[2, 0\]; takes rows of 1"),
        (torch.tensor(1.0), r"x is a scalar; takes \[\.\.\., k\]"),
    ],
)
def test_bad_arguments(x: torch.Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"quantize_fp8: .*{message}"):
        Backend("portable").run("quantize_fp8", x)


def test_opcheck() -> None:
    for x in (torch.randn(3, 2, 8), torch.randn(3, 16).bfloat16()[:, :8], torch.zeros(0, 8)):
        torch.library.opcheck(torch.ops.fastdllm_ext.quantize_fp8.default, (x,))
