from __future__ import annotations

import pytest
import torch

from backends import Backend, each_backend


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_copies(backend: Backend, dtype: torch.dtype) -> None:
    pages = torch.randint(0, 200, (3, 9, 2, 16, 5)).to(dtype)
    before, src, dst = pages.clone(), torch.tensor([0, 8, 0]), torch.tensor([4, 1, 5])
    backend.run("copy_pages", pages, src, dst)
    kept = [i for i in range(9) if i not in (4, 1, 5)]
    assert torch.equal(pages[:, dst], before[:, src])
    assert torch.equal(pages[:, kept], before[:, kept])


@each_backend
@pytest.mark.parametrize("page, first", [(7, 0), (16, 1), (24, 8), (2050, 0)])
def test_pages_that_do_not_lie_on_16_bytes(backend: Backend, page: int, first: int) -> None:
    pages = torch.randint(0, 200, (2 * 5 * page + first,), dtype=torch.uint8)[first:].view(2, 5, page)
    before = pages.clone()
    backend.run("copy_pages", pages, torch.tensor([0, 4]), torch.tensor([3, 1]))
    assert torch.equal(pages, before[:, [0, 4, 2, 0, 4]])


@each_backend
def test_nothing_to_copy(backend: Backend) -> None:
    pages = torch.rand(2, 3, 4)
    before, none = pages.clone(), torch.zeros(0, dtype=torch.int64)
    backend.run("copy_pages", pages, none, none)
    assert torch.equal(pages, before)


@pytest.mark.parametrize(
    "src, dst, message",
    [
        ([0], [9], r"dst\[0\] is 9; takes 0 to 8"),
        ([-1], [0], r"src\[0\] is -1"),
        ([0, 1], [2, 2], "written twice or also read"),
        ([0, 1], [1, 2], "written twice or also read"),
        ([0, 1], [2], r"dst has shape \[1\]; takes \[2\]"),
    ],
)
def test_bad_arguments(src: list[int], dst: list[int], message: str) -> None:
    pages = torch.rand(3, 9, 4)
    before = pages.clone()
    with pytest.raises(RuntimeError, match="copy_pages: .*" + message):
        Backend("portable").run("copy_pages", pages, torch.tensor(src), torch.tensor(dst))
    assert torch.equal(pages, before)


def test_opcheck() -> None:
    args = (torch.rand(2, 4, 3), torch.tensor([0]), torch.tensor([1]))
    torch.library.opcheck(torch.ops.fastdllm_ext.copy_pages.default, args)
