from __future__ import annotations

import pytest
import torch

from backends import TOLERANCE, Backend, each_backend, each_compiled, opcheck, relative_error
from fastdllm_ext import reference
from fastdllm_ext.rope import rope_table

FP8 = torch.float8_e4m3fn


def make(
    tokens: int,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    page_size: int = 32,
    dtype: torch.dtype = torch.float32,
    rotary_dim: int | None = None,
    fp8: bool = False,
) -> list:
    """Random arguments; tokens are strided views of one fused tensor, pages, or scales, are full of NaN."""
    width = heads + 2 * kv_heads
    fused = torch.randn(tokens, width, head_dim).to(dtype)
    q, k, v = fused.split([heads, kv_heads, kv_heads], dim=1)
    cos, sin = rope_table(500, rotary_dim or head_dim, 10000.0, torch.device("cpu"))
    positions = torch.randint(0, 500, (tokens,))
    pages = -(-tokens // page_size) + 2
    slots = torch.randperm(pages * page_size)[:tokens]
    slots[::5] = -1
    shape = (pages, kv_heads, page_size)
    if fp8:
        stores = [torch.full((*shape, head_dim), 0x55, dtype=torch.uint8).view(FP8) for _ in "kv"]
        stores += [torch.full(shape, torch.nan) for _ in "kv"]
    else:
        stores = [torch.full((*shape, head_dim), torch.nan, dtype=dtype) for _ in "kv"]
    return [q, k, v, cos, sin, positions, slots, *stores]


@each_backend
@pytest.mark.parametrize("head_dim, page_size", [(8, 16), (24, 32), (64, 32), (80, 64), (128, 16), (256, 64)])
@pytest.mark.parametrize("tokens", [0, 1, 33, 200])
def test_against_float64(backend: Backend, head_dim: int, page_size: int, tokens: int) -> None:
    for dtype in backend.dtypes:
        args = make(tokens, head_dim=head_dim, page_size=page_size, dtype=dtype)
        q, k, v, cos, sin, positions, slots, k_pages, v_pages = args
        wanted_k, wanted_v = k_pages.double(), v_pages.double()
        wanted = reference.rope_write_kv(
            q.double(),
            k.double(),
            v.double(),
            cos,
            sin,
            positions,
            slots,
            wanted_k,
            wanted_v,
            compute=torch.float64,
        )
        out = backend.run("rope_write_kv", *args)
        written = ~wanted_k.isnan()
        for pages in (k_pages, v_pages):
            assert torch.equal(~pages.isnan(), written), "no slot written that was not asked for"
        assert torch.equal(v_pages.double()[written], wanted_v[written])
        assert out.is_contiguous()
        if tokens:
            assert relative_error(out, wanted) < TOLERANCE[dtype]
        if written.any():
            assert relative_error(k_pages[written], wanted_k[written]) < TOLERANCE[dtype]


@each_compiled
def test_rounded_once_as_the_reference(backend: Backend) -> None:
    for dtype in backend.dtypes:
        assert_as_the_reference(backend, make(40, dtype=dtype))


def assert_as_the_reference(backend: Backend, args: list) -> None:
    """The same bits, in pages too."""
    again = [x.clone() for x in args]
    assert torch.equal(backend.run("rope_write_kv", *args), reference.rope_write_kv(*again))
    for pages, wanted in zip(args[-2:], again[-2:], strict=True):
        assert torch.equal(pages.isnan(), wanted.isnan())
        assert torch.equal(pages.nan_to_num(), wanted.nan_to_num())


@each_backend
@pytest.mark.parametrize("head_dim, rotary_dim", [(128, 64), (64, 48), (64, 2), (24, 10), (256, 254)])
def test_partial_rotation(backend: Backend, head_dim: int, rotary_dim: int) -> None:
    for dtype in backend.dtypes:
        args = make(20, head_dim=head_dim, rotary_dim=rotary_dim, dtype=dtype)
        q = args[0]
        assert_as_the_reference(backend, args)
        out = backend.run("rope_write_kv", *args)
        assert torch.equal(out[..., rotary_dim:], q[..., rotary_dim:])
        assert not torch.equal(out[..., :rotary_dim], q[..., :rotary_dim])


def assert_fp8_as_the_reference(backend: Backend, args: list) -> None:
    """The same bits: rotated queries, numbers, scales, and what was there before where nothing is stored."""
    again = [x.clone() for x in args]
    assert torch.equal(backend.run("rope_write_kv", *args), reference.rope_write_kv(*again))
    for numbers, scales, wanted, wanted_scales in zip(*(x[i : i + 2] for x in (args, again) for i in (7, 9)),
                                                      strict=True):  # fmt: skip
        known = ~wanted_scales.isnan()
        assert torch.equal(~scales.isnan(), known)
        assert torch.equal(scales[known], wanted_scales[known])
        assert torch.equal(numbers.view(torch.uint8)[known], wanted.view(torch.uint8)[known])


@each_compiled
@pytest.mark.parametrize(
    "head_dim, page_size, rotary_dim",
    [(8, 16, 8), (24, 32, 10), (64, 32, 64), (80, 64, 2), (96, 32, 96), (128, 16, 64), (256, 64, 256)],
)
@pytest.mark.parametrize("tokens", [0, 1, 33, 200])
def test_fp8_as_the_reference(
    backend: Backend, head_dim: int, page_size: int, rotary_dim: int, tokens: int
) -> None:
    for dtype in backend.dtypes:
        args = make(
            tokens, head_dim=head_dim, page_size=page_size, rotary_dim=rotary_dim, dtype=dtype, fp8=True
        )
        assert_fp8_as_the_reference(backend, args)
        stored = (args[6] >= 0).sum()
        assert [(~scales.isnan()).sum() for scales in args[-2:]] == [2 * stored] * 2


@each_compiled
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (7, 1), (6, 3), (8, 8)])
def test_fp8_of_any_heads(backend: Backend, heads: int, kv_heads: int) -> None:
    for dtype in backend.dtypes:
        assert_fp8_as_the_reference(
            backend, make(9, heads=heads, kv_heads=kv_heads, head_dim=24, dtype=dtype, fp8=True)
        )


@each_compiled
def test_fp8_of_vectors_that_are_small_large_or_bad(backend: Backend) -> None:
    for dtype in backend.dtypes:
        args = make(12, kv_heads=1, dtype=dtype, fp8=True)
        args[1:3] = [x.clone() for x in args[1:3]]
        slots = args[6] = torch.arange(12)
        largest = 6e4 if dtype == torch.float16 else 1e30
        factors = [0, -0.0, 1e-44, 3e-43, 1e-38, 1e-30, 1e-6, 1e4, largest / 4]
        for x in args[1:3]:
            for i, factor in enumerate(factors):
                x[i] = (x[i].double().clamp(-3, 3) * factor).to(dtype)
            x[9, 0, 5], x[10, 0, 63], x[11, 0, 8] = torch.nan, torch.inf, -torch.inf
        assert_fp8_as_the_reference(backend, args)
        for pages, scales in zip(args[7:9], args[9:], strict=True):
            scales, numbers = scales[0, 0, slots], pages[0, 0, slots].float()
            assert scales[9:].isnan().all(), "what is bad stays bad"
            assert (scales[:2] == 1).all()
            assert (numbers[:2] == 0).all()
            assert scales[:9].isfinite().all()
            assert (numbers[[5, 6, 7, 8]].abs().amax(-1) == 448).logical_or(scales[[5, 6, 7, 8]] == 1).all()


@each_compiled
def test_fp8_rounds_to_nearest_ties_to_even(backend: Backend) -> None:
    """All numbers of e4m3, what lies in the middle of two, and their neighbours in float32."""
    numbers = torch.arange(0x7F, dtype=torch.uint8).view(FP8).float()
    middles = (numbers[1:] + numbers[:-1]) / 2
    values = torch.cat([numbers, middles, middles.nextafter(numbers[1:]), middles.nextafter(numbers[:-1])])
    values = torch.cat([values, -values])
    values = torch.cat([values, values.new_zeros(-len(values) % 63)]).view(-1, 63)
    values = torch.cat([values, values.new_full((len(values), 1), 448.0)], 1)  # so that the scale is 1
    args = make(len(values), kv_heads=1, fp8=True)
    args[2], args[6] = values[:, None], torch.arange(len(values))
    assert_fp8_as_the_reference(backend, args)
    assert (args[10].flatten()[: len(values)] == 1).all()
    found = args[8].flatten(0, 2)[: len(values)]
    assert torch.equal(found.view(torch.uint8), values.to(FP8).view(torch.uint8))


@each_compiled
def test_every_slot_of_a_page(backend: Backend) -> None:
    for page_size in (16, 32, 64):
        args = make(3 * page_size, page_size=page_size, head_dim=8)
        args[6] = torch.arange(3 * page_size).flip(0)
        assert_as_the_reference(backend, args)


@each_compiled
def test_nothing_lies_on_16_bytes(backend: Backend) -> None:
    """The same bits wherever tensors begin, and however far tokens lie apart."""
    for dtype in backend.dtypes:
        args = make(9, dtype=dtype)
        wanted = [x.clone() for x in args]
        out = backend.run("rope_write_kv", *wanted)
        for index in (0, 1, 2, 3, 4, 7, 8):
            moved = [x.clone() for x in args]
            x = moved[index]
            moved[index] = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)
            assert torch.equal(backend.run("rope_write_kv", *moved), out)
            for a, b in zip(moved[-2:], wanted[-2:], strict=True):
                assert torch.equal(a.nan_to_num(), b.nan_to_num())
        odd = [x.clone() for x in args]
        wide = torch.full((9, odd[1][0].numel() + 3), torch.nan, dtype=dtype)
        wide[:, : odd[1][0].numel()] = odd[1].flatten(1)
        odd[1] = wide.as_strided(odd[1].shape, (wide.shape[1], odd[1].shape[2], 1))
        backend.run("rope_write_kv", *odd)
        assert torch.equal(odd[-2].nan_to_num(), wanted[-2].nan_to_num())


def dream(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Dream's modules: a table in the activations' dtype, every product and sum rounded to it."""
    c, s = (t.to(x.dtype)[:, None].repeat(1, 1, 2) for t in (cos, sin))
    a, b = x.chunk(2, dim=-1)
    return x * c + torch.cat((-b, a), dim=-1) * s


@each_compiled
def test_a_table_in_bfloat16_is_dreams_convention(backend: Backend) -> None:
    """Exact in float32; in bfloat16 as near as ops.py says, and nearer to float64 than the modules are."""
    cos, sin = (x.bfloat16().float() for x in rope_table(500, 64, 1e6, torch.device("cpu")))
    for dtype in (torch.float32, torch.bfloat16):
        args = make(200, dtype=dtype)
        args[3:5] = cos, sin
        out, q = backend.run("rope_write_kv", *args), args[0]
        at_c, at_s = (x[args[5]] for x in (cos, sin))
        modules, exact = dream(q, at_c, at_s), dream(q.double(), at_c.double(), at_s.double())
        if dtype == torch.float32:
            assert torch.equal(out, modules)
            continue
        a, b = q.double().abs().chunk(2, dim=-1)
        c, s = at_c[:, None].double().abs(), at_s[:, None].double().abs()
        products = torch.cat((a * c + b * s, b * c + a * s), dim=-1)
        assert ((out.double() - modules.double()).abs() <= 3 * 2**-8 * products).all()
        assert ((out.double() - exact).abs() <= 2**-8 * exact.abs() * (1 + 1e-3) + 1e-7).all()
        assert relative_error(out, exact) < relative_error(modules, exact)


@pytest.mark.parametrize(
    "index, change, message",
    [
        (1, lambda k: k[:1], r"k has shape \[1, 2, 64\]; takes \[9, \*, 64\]"),
        (2, lambda v: v.double(), "v has another dtype"),
        (3, lambda c: c.double(), "cos has another dtype; takes float32"),
        (3, lambda c: c.repeat(1, 2), "cos has 64 columns; takes at most head_dim / 2 = 32"),
        (5, lambda p: p + 1000, r"positions\[0\] is 1\d\d\d; takes 0 to 499"),
        (6, lambda s: s + 1000, r"slots\[\d\] is \d+; takes anything up to 95"),
        (7, lambda k: k[:, :1], "k_pages has shape"),
        (8, lambda v: v.transpose(1, 2).contiguous().transpose(1, 2), "v_pages is not contiguous"),
    ],
)
def test_bad_arguments(index: int, change, message: str) -> None:
    args = make(9)
    args[index] = change(args[index])
    with pytest.raises(RuntimeError, match="rope_write_kv: .*" + message):
        Backend("portable").run("rope_write_kv", *args)


@pytest.mark.parametrize(
    "index, change, message",
    [
        (9, lambda s: None, r"k_pages is float8_e4m3fn and k_scales is None; takes \[3, 2, 32\] float32"),
        (10, lambda s: s[:1], r"v_scales has shape \[1, 2, 32\]; takes \[3, 2, 32\]"),
        (9, lambda s: s.double(), "k_scales has another dtype; takes float32"),
        (8, lambda v: v.float(), "v_scales is given and v_pages is not float8_e4m3fn"),
    ],
)
def test_bad_scales(index: int, change, message: str) -> None:
    args = make(9, fp8=True)
    args[index] = change(args[index])
    with pytest.raises(RuntimeError, match="rope_write_kv: .*" + message):
        Backend("portable").run("rope_write_kv", *args)


@pytest.mark.parametrize("fp8", [False, True])
def test_opcheck(fp8: bool) -> None:
    args = make(6, fp8=fp8)
    args[-2:] = [x.nan_to_num() for x in args[-2:]]  # opcheck compares, and NaN equals nothing
    args[6] = args[6].abs()
    args[:3] = [x.contiguous() for x in args[:3]]
    opcheck("rope_write_kv", tuple(args))
