"""Find the installed torch to build against, without importing it. Used by CMake and by the build backend.

pip runs an isolated build with the user's interpreter and only edits ``sys.path``, so
``sysconfig`` still names the user's site-packages: the torch found there is the one that the
built module will run with.
"""

from __future__ import annotations

import importlib.util
import os
import re
import site
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

MINIMUM = (2, 11)
FALLBACK = "torch>=2.11,<2.14"


def version(folder: Path) -> tuple[int, int]:
    """(major, minor) of the torch package in ``folder``; (0, 0) where it says none."""
    text = (folder / "version.py").read_text(encoding="utf-8")
    found = re.search(r"__version__\s*=\s*['\"](\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def candidates() -> Iterator[Path]:
    """Folders that may hold a torch package, the most deliberate choice first."""
    if chosen := os.environ.get("FASTDLLM_TORCH_DIR"):
        yield Path(chosen)
        return
    spec = importlib.util.find_spec("torch")
    if spec and spec.origin:
        yield Path(spec.origin).parent
    for kind in ("platlib", "purelib"):
        yield Path(sysconfig.get_path(kind)) / "torch"
    for folder in [*site.getsitepackages(), site.getusersitepackages()]:
        yield Path(folder) / "torch"
    if environment := os.environ.get("VIRTUAL_ENV"):
        python = f"python{sys.version_info[0]}.{sys.version_info[1]}"
        yield Path(environment) / "lib" / python / "site-packages" / "torch"


def find() -> Path | None:
    """The first torch that has the stable ABI's headers and is new enough."""
    for folder in candidates():
        header = folder / "include" / "torch" / "csrc" / "stable" / "library.h"
        if header.exists() and version(folder) >= MINIMUM:
            return folder
    return None


if __name__ == "__main__":
    torch = find()
    if torch is None:
        wanted = ".".join(map(str, MINIMUM))
        sys.exit(
            f"fastdllm_ext: no torch >= {wanted} found to build against. Install torch first, "
            "or set FASTDLLM_TORCH_DIR to its package folder."
        )
    print(torch.as_posix(), end="")
