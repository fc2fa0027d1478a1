"""Facts about the installation, for bug reports and for the conditions of a measurement."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fastdllm_ext import _C


def collect_env() -> dict[str, Any]:
    """Versions, CPU and CUDA facts, and what was compiled in; plain values that JSON can hold."""
    cuda = torch.cuda.is_available()
    return {
        "fastdllm_ext": _version("fastdllm_ext"),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_isa": _C.cpu_isa(),
        "cpu_isas": _C.cpu_isas(),
        "built_for_torch": _C.built_for_torch,
        "build_type": _C.build_type,
        "cuda_kernels": _C.cuda_built,
        "cuda_architectures": _C.cuda_architectures,
        "cuda_runtime": _C.cuda_runtime_version,
        "cuda_of_torch": torch.version.cuda,
        "cuda_available": cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
    }


def cpu_name() -> str:
    """The processor's name, as the system tells it."""
    if sys.platform.startswith("linux"):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def format_env() -> str:
    """:func:`collect_env` as aligned lines."""
    facts = collect_env()
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {_text(value)}" for name, value in facts.items())


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value in (None, "") else str(value)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
