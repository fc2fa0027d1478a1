from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from backends import (
    BACKENDS,
    TOLERANCE,
    Backend,
    each_backend,
    each_compiled,
    emulator,
    opcheck,
    relative_error,
)
from fastdllm_ext import reference


@dataclass
class Case:
    """Random ragged sequences over shuffled pages; slots behind a sequence's end hold NaN."""

    args: tuple
    queries: list[int]

    @classmethod
    def make(
        cls,
        queries: list[int],
        keys: list[int],
        *,
        heads: int = 4,
        kv_heads: int = 2,
        head_dim: int = 64,
        page_size: int = 32,
        dtype: torch.dtype = torch.float32,
        spread: float = 1.0,
        fp8: bool = False,
    ) -> Case:
        counts = [-(-n // page_size) for n in keys]
        pages = torch.randperm(sum(counts) + 3)
        table = torch.zeros(len(keys), max([*counts, 1]), dtype=torch.int32)
        k = torch.full((len(pages), kv_heads, page_size, head_dim), torch.nan, dtype=dtype)
        v = k.clone()
        for b, (count, length) in enumerate(zip(counts, keys, strict=True)):
            own, pages = pages[:count], pages[count:]
            table[b, :count] = own
            for x in (k, v):
                for i, page in enumerate(own.tolist()):
                    filled = min(page_size, length - i * page_size)
                    x[page, :, :filled] = torch.randn(kv_heads, filled, head_dim) * spread
        offsets = torch.tensor([0, *itertools.accumulate(queries)], dtype=torch.int32)
        q = (torch.randn(sum(queries), heads, head_dim) * spread).to(dtype)
        lengths = torch.tensor(keys, dtype=torch.int32)
        rest = (table, lengths, offsets, max([*queries, 0]), head_dim**-0.5)
        if not fp8:
            return cls((q, k, v, *rest), queries)
        (k, k_scales), (v, v_scales) = map(with_garbage, (k, v))
        return cls((q, k, v, *rest, k_scales, v_scales), queries)

    def truth(self) -> torch.Tensor:
        """In float64; of fp8 over the numbers times their scales."""
        q, *rest = self.args
        return reference.paged_attention(q.double(), *rest, compute=torch.float64)


def with_garbage(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As fp8 with scales; any numbers where NaN was."""
    numbers, scales = reference.quantize_fp8(x)
    garbage = torch.randint(0, 256, x.shape, dtype=torch.uint8)
    numbers = torch.where(x.isnan(), garbage, numbers.view(torch.uint8)).view(torch.float8_e4m3fn)
    return numbers, scales[..., 0]


# Pages of the dtype, and of fp8 with scales. The tolerances are the same: the truth is that of the numbers
# that the pages hold, which are exact in every dtype; the scales are float32, and a weight times one is
# rounded where the weight was.
each_storage = pytest.mark.parametrize("fp8", [False, True], ids=["own", "fp8"])


@each_backend
@each_storage
@pytest.mark.parametrize("head_dim", [8, 24, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("page_size", [16, 32, 64])
def test_sizes(backend: Backend, head_dim: int, page_size: int, fp8: bool) -> None:
    for dtype in backend.dtypes:
        case = Case.make(
            [1, 33, 7], [1, 100, 65], head_dim=head_dim, page_size=page_size, dtype=dtype, fp8=fp8
        )
        out = backend.run("paged_attention", *case.args)
        assert out.dtype == dtype
        assert relative_error(out, case.truth()) < TOLERANCE[dtype]


@each_backend
@each_storage
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (4, 4), (4, 1), (7, 1), (28, 4), (6, 2)])
def test_grouped_query_attention(backend: Backend, heads: int, kv_heads: int, fp8: bool) -> None:
    for dtype in backend.dtypes:
        case = Case.make([32, 5], [70, 33], heads=heads, kv_heads=kv_heads, dtype=dtype, fp8=fp8)
        assert relative_error(backend.run("paged_attention", *case.args), case.truth()) < TOLERANCE[dtype]


@each_backend
@each_storage
@pytest.mark.parametrize("queries", [1, 2, 15, 16, 17, 31, 32, 33, 64, 129, 300])
def test_ragged_queries(backend: Backend, queries: int, fp8: bool) -> None:
    for dtype in backend.dtypes:
        case = Case.make([queries, 0, 3, queries], [40, 8, 0, 1000], dtype=dtype, fp8=fp8)
        out = backend.run("paged_attention", *case.args)
        assert relative_error(out, case.truth()) < TOLERANCE[dtype]
        assert (out[queries : queries + 3] == 0).all(), "a sequence without keys gets zeros"


@each_compiled
@each_storage
def test_thousands_of_queries(backend: Backend, fp8: bool) -> None:
    count = 700 if backend.name == "simt" else 2500
    for dtype in backend.dtypes:
        case = Case.make([count, 32], [count, 100], heads=2, kv_heads=1, dtype=dtype, fp8=fp8)
        assert relative_error(backend.run("paged_attention", *case.args), case.truth()) < TOLERANCE[dtype]


@each_backend
@each_storage
def test_many_pages(backend: Backend, fp8: bool) -> None:
    case = Case.make([8], [5000], page_size=16, fp8=fp8)
    assert relative_error(backend.run("paged_attention", *case.args), case.truth()) < 1e-5


@each_backend
@each_storage
def test_large_scores_do_not_overflow(backend: Backend, fp8: bool) -> None:
    for dtype in backend.dtypes:
        case = Case.make([9], [200], dtype=dtype, spread=12.0, fp8=fp8)
        out = backend.run("paged_attention", *case.args)
        assert (
            relative_error(out, case.truth()) < 3 * TOLERANCE[dtype]
        )  # scores of ±1e3: softmax is nearly a choice


@each_compiled
def test_nan_in_a_key_reaches_only_its_sequence(backend: Backend) -> None:
    case = Case.make([4, 4], [50, 50])
    clean = backend.run("paged_attention", *case.args)
    _, k, _, table = case.args[:4]
    k[table[0, 1], :, 3] = torch.nan
    out = backend.run("paged_attention", *case.args)
    assert out[:4].isnan().all()
    assert torch.equal(out[4:], clean[4:])


@each_compiled
@pytest.mark.parametrize("which", ["k", "v"])
def test_a_nan_scale_reaches_only_its_sequence(backend: Backend, which: str) -> None:
    for dtype in backend.dtypes:
        case = Case.make([4, 4], [50, 300], dtype=dtype, fp8=True)
        clean = backend.run("paged_attention", *case.args)
        case.args[-2 if which == "k" else -1][case.args[3][0, 1], :, 3] = torch.nan
        out = backend.run("paged_attention", *case.args)
        assert out[:4].isnan().all()
        assert torch.equal(out[4:], clean[4:])


@each_compiled
@pytest.mark.parametrize("spread", [1e-30, 1e-3, 1e3, 1e30])
def test_small_and_large_values_of_fp8(backend: Backend, spread: float) -> None:
    """Weights meet the scales before they are rounded, and must not lose bits by that. Keys are as large."""
    for dtype in backend.dtypes:
        if dtype == torch.float16 and not 1e-3 <= spread <= 1e3:
            continue  # no numbers of float16
        case = Case.make([9, 40], [200, 30], dtype=dtype, fp8=True)
        case.args[-1].mul_(spread)
        case.args[-2].mul_(spread)
        case.args[0].div_(spread)
        assert relative_error(backend.run("paged_attention", *case.args), case.truth()) < TOLERANCE[dtype]


@each_compiled
def test_every_number_of_fp8(backend: Backend) -> None:
    """Exact, denormals and zeros too: one key a sequence, so that its value is what comes out."""
    numbers = torch.arange(256, dtype=torch.uint8)
    numbers[[0x7F, 0xFF]] = 0  # NaN, which scales stand for
    for dtype in backend.dtypes:
        case = Case.make([1], [1], heads=1, kv_heads=1, head_dim=256, dtype=dtype, fp8=True)
        _, _, v, table, *_, v_scales = case.args
        v.view(torch.uint8)[table[0, 0], 0, 0] = numbers
        v_scales[table[0, 0], 0, 0] = 0.5
        out = backend.run("paged_attention", *case.args)[0, 0]
        assert torch.equal(out, (numbers.view(torch.float8_e4m3fn).float() * 0.5).to(dtype))


@each_compiled
def test_no_queries(backend: Backend) -> None:
    case = Case.make([0, 0], [5, 0])
    assert backend.run("paged_attention", *case.args).shape == (0, 4, 64)


@each_compiled
@each_storage
def test_bits_do_not_depend_on_the_batch(backend: Backend, fp8: bool) -> None:
    for dtype in backend.dtypes:
        case = Case.make([32, 1, 16, 100, 32], [500, 31, 300, 100, 64], dtype=dtype, fp8=fp8)
        q, k, v, table, lengths, offsets, _, *rest = case.args
        together = backend.run("paged_attention", *case.args)
        assert torch.equal(together, backend.run("paged_attention", *case.args))
        for b, queries in enumerate(case.queries):
            begin = int(offsets[b])
            alone = backend.run(
                "paged_attention",
                q[begin : begin + queries].contiguous(),
                k,
                v,
                table[b : b + 1].contiguous(),
                lengths[b : b + 1].contiguous(),
                torch.tensor([0, queries], dtype=torch.int32),
                queries,
                *rest,
            )
            assert torch.equal(alone, together[begin : begin + queries])


@each_compiled
@each_storage
def test_bits_do_not_depend_on_the_number_of_threads(backend: Backend, fp8: bool) -> None:
    threads = torch.get_num_threads()
    for dtype in backend.dtypes:
        case = Case.make([100, 32], [700, 300], dtype=dtype, fp8=fp8)
        found = []
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                found.append(backend.run("paged_attention", *case.args))
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


def _on_emulated_device(multiprocessors: int, block_kib: int, all_kib: int) -> Iterator[None]:
    assert emulator is not None
    emulator.simt_set_device(multiprocessors, block_kib, all_kib, 9)
    yield
    emulator.simt_set_device(4, 227, 228, 9)


CUDA = [backend for backend in BACKENDS if backend.values[0].is_cuda]
# Shared memory of compute capability 8.6 (two stages of keys fit), and few or many multiprocessors.
DEVICES = {"small": (1, 99, 100), "wide": (40, 227, 228)}


@pytest.mark.parametrize("backend", CUDA)
@each_storage
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("queries, heads, kv_heads", [(3, 2, 2), (32, 1, 1), (40, 1, 1), (32, 7, 1)])
def test_any_device(
    backend: Backend, device: str, queries: int, heads: int, kv_heads: int, fp8: bool
) -> None:
    """The number of splits and stages follows from the device; results do not."""
    if backend.name == "cuda" and device != "small":
        pytest.skip("one device is there")
    for dtype in backend.dtypes:
        case = Case.make([queries, 5], [777, 128], heads=heads, kv_heads=kv_heads, dtype=dtype, fp8=fp8)
        for _ in _on_emulated_device(*DEVICES[device]) if backend.name == "simt" else [None]:
            out = backend.run("paged_attention", *case.args)
        assert relative_error(out, case.truth()) < TOLERANCE[dtype]


@pytest.mark.parametrize("backend", CUDA)
@pytest.mark.parametrize("head_dim, page_size", [(24, 16), (64, 64), (80, 32), (128, 16), (256, 32)])
def test_bulk_copies(
    backend: Backend, head_dim: int, page_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other way to copy keys and values gives the same bits."""
    for dtype in (torch.bfloat16, torch.float16):
        case = Case.make([16, 1, 9], [700, 33, 64], head_dim=head_dim, page_size=page_size, dtype=dtype)
        out = backend.run("paged_attention", *case.args)
        monkeypatch.setenv("FASTDLLM_CUDA_COPY", "bulk")
        assert torch.equal(backend.run("paged_attention", *case.args), out)
        monkeypatch.delenv("FASTDLLM_CUDA_COPY")


@pytest.mark.parametrize("backend", CUDA)
@each_storage
def test_tokens_outside_of_all_sequences_get_zeros(backend: Backend, fp8: bool) -> None:
    """Where a graph's buffers have more room than the batch needs."""
    for dtype in backend.dtypes:
        case = Case.make([4, 40, 9], [50, 70, 3], heads=6, kv_heads=2, dtype=dtype, fp8=fp8)
        q, k, v, table, lengths, offsets, longest, *rest = case.args
        args = (q, k, v, table[:2].contiguous(), lengths[:2].contiguous(), offsets[:3].contiguous(), longest)
        out = backend.run("paged_attention", *args, *rest)
        assert relative_error(out[:44], case.truth()[:44]) < TOLERANCE[dtype]
        assert (out[44:] == 0).all()
        nobody = (q, k, v, table[:0].contiguous(), lengths[:0].contiguous(), offsets[:1].contiguous(), 0)
        assert (backend.run("paged_attention", *nobody, *rest) == 0).all()


@pytest.mark.parametrize("backend", CUDA)
@each_storage
@pytest.mark.parametrize("keys", [0, 1, 63, 64, 65, 128, 255, 256, 257])
def test_every_row_and_key_of_a_tile(backend: Backend, keys: int, fp8: bool) -> None:
    """Around the sizes of tiles of rows and keys. A row that is lost is 9% of the norm or so."""
    for dtype in backend.dtypes:
        for queries in (32, 64, 128, 129):
            case = Case.make([queries], [keys], heads=1, kv_heads=1, dtype=dtype, spread=0.1, fp8=fp8)
            out = backend.run("paged_attention", *case.args)
            assert relative_error(out, case.truth()) < TOLERANCE[dtype]


def _changed(index: int, value: object) -> tuple:
    args = list(Case.make([4], [20]).args)
    args[index] = value(args[index]) if callable(value) else value
    return tuple(args)


@pytest.mark.parametrize(
    "index, change, message",
    [
        (0, lambda q: q[0], r"q has shape \[4, 64\]"),
        (0, lambda q: q[:, :3].contiguous(), "q has 3 heads; takes a multiple of the 2"),
        (0, lambda q: q[..., :12].contiguous(), "head_dim 12"),
        (0, lambda q: q.half(), "float16"),
        (0, lambda q: q.transpose(0, 1), "q is not contiguous"),
        (1, lambda k: k.bfloat16(), "k_pages has another dtype"),
        (1, lambda k: k[:, :, :8].contiguous(), "page_size 8"),
        (2, lambda v: v[:1], "v_pages has shape"),
        (3, lambda t: t.long(), "block_table has another dtype; takes int32"),
        (3, lambda t: t + 1000, r"block_table\[0, 0\] is 10"),
        (4, lambda n: n + 1000, r"kv_lens\[0\] is 1020"),
        (4, lambda n: n - 21, r"kv_lens\[0\] is -1"),
        (5, lambda o: o + 1, "cu_seqlens_q runs from 1"),
        (6, 3, "max_seqlen_q 3, but sequence 0 has 4"),
    ],
)
def test_bad_arguments(index: int, change: object, message: str) -> None:
    with pytest.raises(RuntimeError, match="paged_attention: .*" + message):
        Backend("portable").run("paged_attention", *_changed(index, change))


def _of_fp8(change: dict[int, object]) -> tuple:
    args = list(Case.make([4], [20], fp8=True).args)
    for index, value in change.items():
        args[index] = value(args[index]) if callable(value) else value
    return tuple(args)


@pytest.mark.parametrize(
    "change, message",
    [
        ({8: None}, r"k_pages is float8_e4m3fn and k_scales is None; takes \[4, 2, 32\] float32"),
        ({9: None}, r"v_pages is float8_e4m3fn and v_scales is None; takes \[4, 2, 32\] float32"),
        ({8: lambda s: s[..., :9]}, r"k_scales has shape \[4, 2, 9\]; takes \[4, 2, 32\]"),
        ({9: lambda s: s.bfloat16()}, "v_scales has another dtype; takes float32"),
        ({9: lambda s: s.transpose(0, 1).contiguous().transpose(0, 1)}, "v_scales is not contiguous"),
        ({1: lambda k: k.float()}, "k_scales is given and k_pages is not float8_e4m3fn; takes None"),
        ({1: lambda k: k.bfloat16()}, "takes that, or float8_e4m3fn with k_scales"),
        ({1: lambda k: k.float(), 8: None}, "v_pages has another dtype than k_pages"),
        ({1: lambda k: k.to(torch.float8_e5m2)}, "k_pages has another dtype"),
    ],
)
def test_bad_scales(change: dict[int, object], message: str) -> None:
    with pytest.raises(RuntimeError, match="paged_attention: .*" + message):
        Backend("portable").run("paged_attention", *_of_fp8(change))


@each_storage
def test_opcheck(fp8: bool) -> None:
    args = Case.make([3, 5], [40, 9], fp8=fp8).args
    opcheck("paged_attention", args)
