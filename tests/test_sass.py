"""What the compiler made of the CUDA kernels: no GPU is needed to see it.

``FASTDLLM_MODULE=PATH python -m pytest tests/test_sass.py`` reads another module than the installed one.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

import cuda_resources
from cuda_resources import Kernel

# (source, kernels): where bytes are the floor, and so every kernel of that name loads 16 bytes at a time. The
# others, rope_write_kv's of vector width 1 among them, are for rows that are not aligned.
WIDE_LOADS = [
    ("paged_attention", r"attend"),
    ("unmask", r"unmask_parts"),
    ("copy_pages", r"copy<uint4>"),
    ("rope_write_kv", r", (?!1,)\d"),
    ("quantize_fp8", r", true>"),
]
WIDE = re.compile(r"LDG\.(?:.*\.)?(?:128|256)(?:\.|$)|LDGSTS\.(?:.*\.)?128(?:\.|$)|UBLKCP|UTMALDG")
TENSOR_CORE = re.compile(r"[HQ]G?MMA|UTC\w*MMA")
LOCAL_MEMORY = re.compile(r"(?:LDL|STL)\b")
MOST_REGISTERS = 255
# Attention kernels whose copies are Hopper's bulk copies are empty elsewhere.
ATTENTION = {"sm_80": r"attend.*Float16.*(Async|Fp8)>$", "sm_90a": r"attend.*Float16"}

each_architecture = pytest.mark.parametrize("architecture", cuda_resources.ARCHITECTURES)


@cache
def kernels(architecture: str) -> list[Kernel]:
    module = cuda_resources.module_path()
    if module is None:
        pytest.skip("built without CUDA")
    if cuda_resources.cuobjdump() is None:
        pytest.skip("no cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    if architecture not in cuda_resources.architectures(module):
        pytest.skip(f"built without {architecture}")
    return cuda_resources.read_kernels(module, architecture)


def named(architecture: str, source: str, pattern: str) -> list[Kernel]:
    found = [k for k in kernels(architecture) if k.source == source and re.search(pattern, k.name)]
    assert found, f"no kernel of {source}.cu is called {pattern}"
    return found


def without(found: list[Kernel], instruction: re.Pattern) -> list[str]:
    return [k.name for k in found if not any(map(instruction.match, k.instructions))]


@each_architecture
def test_nothing_is_spilled(architecture: str) -> None:
    for kernel in kernels(architecture):
        assert kernel.instructions, kernel.name
        assert kernel.registers <= MOST_REGISTERS, kernel.name
        assert (kernel.stack, kernel.local) == (0, 0), kernel.name
        assert not any(map(LOCAL_MEMORY.match, kernel.instructions)), kernel.name


@each_architecture
@pytest.mark.parametrize("source, pattern", WIDE_LOADS, ids=[source for source, _ in WIDE_LOADS])
def test_loads_are_16_bytes_wide(architecture: str, source: str, pattern: str) -> None:
    assert without(named(architecture, source, pattern), WIDE) == []


@each_architecture
def test_attention_uses_tensor_cores(architecture: str) -> None:
    assert without(named(architecture, "paged_attention", ATTENTION[architecture]), TENSOR_CORE) == []


@each_architecture
def test_resources_are_written_down(architecture: str) -> None:
    page = Path(__file__).parents[1] / "docs" / "cuda-resources.md"
    missing = {k.source for k in kernels(architecture)} - set(re.findall(r"\w+", page.read_text("utf-8")))
    assert not missing, f"run: python benchmarks/cuda_resources.py --out {page}"
