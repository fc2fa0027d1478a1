"""What a failed launch says."""

from __future__ import annotations

import pytest
import torch

from backends import COMPILED, Backend, emulator
from calls import LAUNCHED, arguments

on_cuda_kernels = pytest.mark.parametrize("backend", [x for x in COMPILED if x.values[0].is_cuda])


@pytest.mark.skipif(emulator is None, reason="built without FASTDLLM_SIMT; see `make test`")
@pytest.mark.parametrize("name", LAUNCHED)
def test_names_the_operation_and_all_shapes(name: str) -> None:
    assert emulator is not None
    args = arguments(name)
    emulator.simt_refuse_next_launch()
    with pytest.raises(RuntimeError, match=f"^{name}: invalid configuration argument \\(") as error:
        Backend("simt").run(name, *args)
    schema = getattr(torch.ops.fastdllm_simt, name).default._schema
    for x, given in zip(schema.arguments, args, strict=False):
        assert not isinstance(given, torch.Tensor) or f"{x.name} {list(given.shape)}" in str(error.value)
    Backend("simt").run(name, *args)


@on_cuda_kernels
def test_more_blocks_than_a_grid_holds(backend: Backend) -> None:
    pages, pairs = torch.zeros(2048, 1, 1, dtype=torch.uint8), torch.zeros(2**20, dtype=torch.int64)
    shapes = r"pages \[2048, 1, 1\], src \[1048576\], dst \[1048576\]"
    with pytest.raises(RuntimeError, match=rf"^copy_pages: .*invalid.* \({shapes}\)"):
        backend.run("copy_pages", pages, pairs, pairs)
    few = arguments("copy_pages")
    backend.run("copy_pages", *few)
    assert torch.equal(few[0][:, few[2]], few[0][:, few[1]])
