from __future__ import annotations

import pytest
import torch

from backends import TOLERANCE, Backend, each_backend, each_compiled, relative_error
from fastdllm_ext import reference
from fastdllm_ext.rope import rope_table


def make(
    tokens: int,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    page_size: int = 32,
    dtype: torch.dtype = torch.float32,
    rotary_dim: int | None = None,
) -> list:
    """Random arguments; tokens are strided views of one fused tensor, pages are full of NaN."""
    width = heads + 2 * kv_heads
    fused = torch.randn(tokens, width, head_dim).to(dtype)
    q, k, v = fused.split([heads, kv_heads, kv_heads], dim=1)
    cos, sin = rope_table(500, rotary_dim or head_dim, 10000.0, torch.device("cpu"))
    positions = torch.randint(0, 500, (tokens,))
    pages = -(-tokens // page_size) + 2
    slots = torch.randperm(pages * page_size)[:tokens]
    slots[::5] = -1
    stores = [torch.full((pages, kv_heads, page_size, head_dim), torch.nan, dtype=dtype) for _ in "kv"]
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
        assert torch.equal(~k_pages.isnan(), written), "no slot written that was not asked for"
        assert torch.equal(v_pages.double()[written], wanted_v[written])
        assert out.is_contiguous()
        if tokens:
            assert relative_error(out, wanted) < TOLERANCE[dtype]
        if written.any():
            assert relative_error(k_pages[written], wanted_k[written]) < TOLERANCE[dtype]


@each_compiled
def test_rounded_once_as_the_reference(backend: Backend) -> None:
    args = make(40, dtype=torch.bfloat16)
    again = [x.clone() for x in args]
    assert torch.equal(backend.run("rope_write_kv", *args), reference.rope_write_kv(*again))
    assert torch.equal(args[-2].nan_to_num(), again[-2].nan_to_num())


@each_backend
def test_partial_rotation(backend: Backend) -> None:
    args = make(20, head_dim=128, rotary_dim=64)
    out = backend.run("rope_write_kv", *args)
    assert torch.equal(out[..., 64:], args[0][..., 64:])
    assert not torch.equal(out[..., :64], args[0][..., :64])


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


def test_opcheck() -> None:
    args = make(6)
    args[-2:] = [x.nan_to_num() for x in args[-2:]]  # opcheck compares, and NaN equals nothing
    args[6] = args[6].abs()
    args[:3] = [x.contiguous() for x in args[:3]]
    torch.library.opcheck(torch.ops.fastdllm_ext.rope_write_kv.default, tuple(args))
