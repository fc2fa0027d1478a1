"""What the compiler made of the CUDA kernels: registers, shared memory, spills, instructions.

    python benchmarks/cuda_resources.py --out docs/cuda-resources.md

Reads the built module, or the one that FASTDLLM_MODULE names, with cuobjdump and nvdisasm; needs no GPU.
Shared memory is what a kernel declares; what a launch asks for does not show in the file.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from fastdllm_ext import _C

ARCHITECTURES = ("sm_80", "sm_90a")


@dataclass
class Kernel:
    """One kernel compiled for one architecture; sizes in bytes."""

    source: str  # stem of the .cu file
    name: str  # as in the source, with template arguments
    registers: int
    stack: int  # spilled registers and arrays that the compiler indexes
    shared: int
    local: int
    instructions: list[str] = field(default_factory=list)  # mnemonics, such as LDG.E.128


def module_path() -> Path | None:
    """The module to read; None where it holds no CUDA kernels."""
    if named := os.environ.get("FASTDLLM_MODULE"):
        return Path(named)
    return Path(_C.__file__) if _C.cuda_built else None


def cuobjdump() -> str | None:
    """The program: pip's (which has nvdisasm beside it), or the one of a CUDA toolkit on the PATH."""
    try:
        for file in files("nvidia-cuda-cuobjdump") or []:
            if file.name == "cuobjdump":
                return str(file.locate())
    except PackageNotFoundError:
        pass
    return shutil.which("cuobjdump")


def architectures(module: Path) -> list[str]:
    """Architectures that the module holds machine code for."""
    return sorted(set(re.findall(r"\.(sm_\w+)\.cubin", _dump(module, "-lelf"))))


def read_kernels(module: Path, architecture: str) -> list[Kernel]:
    """All kernels of an architecture, with their instructions, by source and name."""
    kernels: dict[str, Kernel] = {}
    source = mangled = ""
    for line in _dump(module, "-res-usage", "-arch", architecture).splitlines():
        if line.startswith("identifier = "):
            source = Path(line.removeprefix("identifier = ")).stem
        elif function := re.search(r"Function (\w+):", line):
            mangled = function[1]
        elif "REG:" in line:
            used = {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", line)}
            sizes = (used["REG"], used["STACK"], used["SHARED"], used["LOCAL"])
            kernels[mangled] = Kernel(source, _short_name(mangled), *sizes)
    for line in _dump(module, "-sass", "-arch", architecture).splitlines():
        if function := re.search(r"Function : (\w+)", line):
            mangled = function[1]
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/ +(?:@!?U?P\w+ +)?([A-Z][\w.]*)", line):
            kernels[mangled].instructions.append(instruction[1])
    return sorted(kernels.values(), key=lambda kernel: (kernel.source, kernel.name))


def _dump(module: Path, *options: str) -> str:
    program = cuobjdump()
    if program is None:
        raise FileNotFoundError("cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    return subprocess.run([program, *options, str(module)], capture_output=True, text=True, check=True).stdout


def _short_name(mangled: str) -> str:
    """Demangled, without return type, namespaces and parameters."""
    program = shutil.which("c++filt")
    if program is None:
        return mangled
    name = subprocess.run([program, mangled], capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"\(anonymous namespace\)::|\b(fastdllm|cuda)::|^void ", "", name)
    name = re.sub(r"\((int|bool|unsigned int)\)", "", name)  # (int)4 as a template argument
    return name[: name.rindex("(")] if name.endswith(")") else name


def table(kernels: list[Kernel]) -> str:
    """Markdown."""
    lines = ["| source | kernel | registers | stack | shared memory |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {k.source} | `{k.name}` | {k.registers} | {k.stack + k.local} | {k.shared} |" for k in kernels
    ]
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to write")
    parser.add_argument("--arch", nargs="+", default=list(ARCHITECTURES), help="architectures to read")
    args = parser.parse_args()
    module = module_path()
    if module is None:
        raise SystemExit("built without CUDA: set FASTDLLM_MODULE to a module that has the kernels")
    there = architectures(module)
    text = [
        "# What the compiler made of the CUDA kernels",
        "",
        "Written from the built module: `python benchmarks/cuda_resources.py --out docs/cuda-resources.md`.",
        "Registers are for each thread; stack (spilled registers, arrays in local memory) and declared",
        "shared memory in bytes, of which 1,024 are the system's own on Hopper. Shared memory that a launch",
        "asks for does not show here. `tests/test_sass.py` checks limits, tensor cores and widths of loads.",
    ]
    for architecture in args.arch:
        if architecture in there:
            text += ["", f"## {architecture}", table(read_kernels(module, architecture))]
    args.out.write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
