from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a name that does not exist is not asked for
# torchao is found by these processes, and not by programs that tests start: it is not quiet.
os.environ["PYTHONPATH"] = os.pathsep.join(
    path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if Path(path).name != "torchao"
)

import pytest
import torch
import transformers

from fastdllm_ext import _C


def pytest_sessionstart() -> None:
    """A run that is meant for one version of transformers proves nothing on another."""
    expected = os.environ.get("FASTDLLM_EXPECT_TRANSFORMERS", transformers.__version__)
    if transformers.__version__ != expected:
        raise pytest.UsageError(f"transformers is {transformers.__version__}; expected {expected}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() and _C.cuda_built:
        return
    skip = pytest.mark.skip(reason="no CUDA device, or built without CUDA")
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def clean_slate() -> Iterator[None]:
    """Same random numbers each time, the best instruction set, and NaN in memory that nobody wrote."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    _C.set_cpu_isa(_C.cpu_isas()[-1])
    yield
    _C.set_cpu_isa(_C.cpu_isas()[-1])
