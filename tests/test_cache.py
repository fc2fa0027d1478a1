from __future__ import annotations

import pytest
import torch

import fastdllm_ext as fd
from fastdllm_ext.cache import PagePool


def test_pool_allocates_lowest_first_and_counts() -> None:
    pool = PagePool(8)
    assert pool.allocate(3) == [0, 1, 2]
    assert (pool.num_pages, pool.num_free, pool.num_used, pool.peak_used) == (8, 5, 3, 3)
    pool.free([1])
    assert pool.allocate(1) == [1]
    pool.free([0, 1, 2])
    assert (pool.num_free, pool.peak_used) == (8, 3)


def test_exhaustion_says_how_many() -> None:
    pool = PagePool(4)
    pool.allocate(1)
    with pytest.raises(fd.OutOfPages, match="needed 5 pages, 3 of 4 are free"):
        pool.allocate(5)
    assert issubclass(fd.OutOfPages, ValueError)
    assert pool.num_free == 3


def test_double_free_is_an_error_and_changes_nothing() -> None:
    pool = PagePool(4)
    a, b = pool.allocate(2)
    pool.free([a])
    with pytest.raises(ValueError, match=f"free of page {a}, which has 0 owners"):
        pool.free([b, a])
    with pytest.raises(ValueError, match="has 1 owners"):
        pool.free([b, b])
    assert pool.refcount(b) == 1
    with pytest.raises(ValueError, match="page 9; the pool has pages 0 to 3"):
        pool.free([9])
    assert pool.num_free == 3


def test_fork_and_copy_on_write() -> None:
    pool = PagePool(3)
    pages = pool.allocate(2)
    pool.fork(pages)
    assert pool.num_shared == 2
    assert pool.make_private(pages[0]) == 2
    assert pool.make_private(pages[0]) == pages[0], "now the only owner"
    with pytest.raises(fd.OutOfPages):
        pool.make_private(pages[1])
    assert pool.refcount(pages[1]) == 2, "unchanged by the failure"
    with pytest.raises(ValueError, match="fork of page"):
        PagePool(2).fork([0])


@pytest.mark.parametrize("count", [0, -1])
def test_pool_needs_pages(count: int) -> None:
    with pytest.raises(ValueError, match=f"num_pages={count}"):
        PagePool(count)


def make_cache(num_pages: int = 6) -> fd.PagedKVCache:
    cache = fd.PagedKVCache(2, 3, 8, num_pages=num_pages, page_size=16)
    cache.storage[0].zero_()
    return cache


def test_branches_share_their_first_pages() -> None:
    cache = make_cache(5)
    (a,) = cache.add([40])
    b = cache.branch(a, 16, 40)
    assert cache.block_table([a, b]).tolist() == [[0, 1, 2], [0, 3, 4]]
    with pytest.raises(fd.OutOfPages):
        cache.branch(a, 32, 40)
    whole = cache.branch(a, 32, 32)
    assert cache.block_table([whole]).tolist() == [[0, 1]]
    for shared, length in ((8, 40), (64, 80), (32, 31), (0, 0)):
        with pytest.raises(ValueError, match=f"shared={shared}: takes whole pages of 16, 3 at most"):
            cache.branch(a, shared, length)
    for sequence in (a, b, whole):
        cache.free(sequence)
    assert cache.stats.num_used == 0


def test_a_copy_that_runs_out_of_pages_halfway() -> None:
    """Of two shared pages one can be copied: both hold what they held, and the call can be made again."""
    cache = make_cache(4)
    (a,) = cache.add([32])
    cache.storage[0][:, :, [0, 1]] = torch.rand(2, 2, 2, 3, 16, 8)
    before = cache.storage[0][:, :, [0, 1]].clone()
    b = cache.fork(a)
    (c,) = cache.add([16])
    with pytest.raises(fd.OutOfPages):
        cache.prepare_write(b, 0, 32)
    assert torch.equal(cache.storage[0][:, :, cache.block_table([b])[0].long()], before)
    assert torch.equal(cache.storage[0][:, :, cache.block_table([a])[0].long()], before)
    cache.free(c)
    cache.prepare_write(b, 0, 32)
    assert torch.equal(cache.storage[0][:, :, cache.block_table([b])[0].long()], before)
    assert cache.stats.num_shared == 0


def test_block_tables_and_slots() -> None:
    cache = make_cache()
    a, b = cache.add([20, 16])
    assert cache.block_table([a, b]).tolist() == [[0, 1], [2, 0]]
    assert cache.block_table([]).shape == (0, 0)
    assert cache.slots(a, 15, 18).tolist() == [15, 16, 17]
    assert cache.slots(b, 0, 2).tolist() == [32, 33]
    assert fd.PagedKVCache.pages_for([20, 16, 1], 16) == 4
    assert cache.layer(1)[0].data_ptr() == cache.storage[0][1, 0].data_ptr()


def test_add_is_all_or_nothing() -> None:
    cache = make_cache()
    with pytest.raises(fd.OutOfPages, match="needed 7 pages, 6 of 6 are free"):
        cache.add([33, 64])
    assert cache.stats.num_free == 6
    with pytest.raises(ValueError, match="lengths="):
        cache.add([4, 0])


def test_a_forked_sequence_is_copied_when_written() -> None:
    cache = make_cache()
    (a,) = cache.add([40])
    cache.storage[0][:, :, :3] = torch.rand(2, 2, 3, 3, 16, 8)
    b = cache.fork(a)
    assert cache.stats.num_shared == 3
    cache.prepare_write(b, 17, 18)
    table_a, table_b = cache.block_table([a, b]).tolist()
    assert [x == y for x, y in zip(table_a, table_b, strict=True)] == [True, False, True]
    assert torch.equal(cache.storage[0][:, :, table_a[1]], cache.storage[0][:, :, table_b[1]])
    cache.prepare_write(b, 0, 40)
    cache.free(a)
    cache.free(b)
    assert cache.stats.num_free == 6


def test_scales_lie_beside_keys_and_values_of_fp8_and_are_copied_with_them() -> None:
    cache = fd.PagedKVCache(2, 3, 8, num_pages=6, page_size=16, dtype=torch.float8_e4m3fn)
    (scales,) = cache.scale_storage
    assert (scales.shape, scales.dtype) == ((2, 2, 6, 3, 16), torch.float32)
    assert cache.storage[0].shape == (2, 2, 6, 3, 16, 8)
    assert cache.storage[0].dtype == cache.dtype == torch.float8_e4m3fn
    for i in range(2):
        for found, wanted in zip(cache.scales(i), scales[i], strict=True):
            assert found is not None
            assert found.data_ptr() == wanted.data_ptr()
            assert found.is_contiguous()
    assert cache.storage[0].nbytes + scales.nbytes == 6 * fd.PagedKVCache.page_bytes(2, 3, 8, cache.dtype, 16)
    numbers = cache.storage[0].view(torch.uint8)
    numbers.random_()
    scales.uniform_()
    (a,) = cache.add([40])
    b = cache.fork(a)
    before = numbers.clone(), scales.clone()
    cache.prepare_write(b, 17, 18)
    table_a, table_b = cache.block_table([a, b]).tolist()
    assert table_a[1] != table_b[1]
    for x, old in zip((numbers, scales), before, strict=True):
        assert torch.equal(x[:, :, table_b[1]], old[:, :, table_a[1]])
        others = [page for page in range(6) if page != table_b[1]]
        assert torch.equal(x[:, :, others], old[:, :, others])


def test_other_dtypes_have_no_scales() -> None:
    cache = make_cache()
    assert cache.scale_storage == []
    assert cache.scales(1) == (None, None)
    assert cache.storage[0].nbytes == 6 * fd.PagedKVCache.page_bytes(2, 3, 8, torch.float32, 16)


def test_a_freed_sequence_is_gone() -> None:
    cache = make_cache()
    (a,) = cache.add([1])
    cache.free(a)
    with pytest.raises(ValueError, match=f"sequence={a} is not in this cache"):
        cache.free(a)


def test_page_size_is_checked() -> None:
    with pytest.raises(ValueError, match="page_size=24; takes one of"):
        fd.PagedKVCache(1, 1, 8, num_pages=1, page_size=24)
