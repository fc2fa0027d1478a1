"""Does the test-suite notice a fault in a CUDA kernel? Makes one at a time and runs the emulated tests.

    python tests/simt/mutate.py --out docs/mutation.md [--only attention] [--jobs 2]

Faults: a barrier or a wait for asynchronous copies removed (``__syncthreads``, ``__syncwarp``,
``cp_async_wait``, ``mbarrier_wait``); a comparison that includes its bound made to exclude it, or the other
way round. Every one in device code counts, but for those in EQUIVALENT, which make the same program.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "csrc" / "cuda"
NOT_KERNELS = {"ptx.h", "kernels.h", "facts.cu"}

# The tests that run a file's kernels.
TESTS = {
    "attention": ["test_paged_attention.py"],
    "paged_attention": ["test_paged_attention.py"],
    "rope_write_kv": ["test_rope_write_kv.py"],
    "unmask": ["test_unmask.py"],
    "block": ["test_block_loop.py"],
    "copy_pages": ["test_copy_pages.py"],
    "quantize_fp8": ["test_quantize_fp8.py"],
    "rms_norm": ["test_elementwise.py"],
    "silu_mul": ["test_elementwise.py"],
    "device": [
        "test_elementwise.py",
        "test_copy_pages.py",
        "test_rope_write_kv.py",
        "test_paged_attention.py",
        "test_unmask.py",
    ],
}

GUARDED = "the next line compares with head_dim, which is no more"
# (file, text of the line, or a part of it): why the changed program computes the same.
EQUIVALENT: dict[tuple[str, str], str] = {
    ("device.h", "return a < b ?"): "equal values are the same value",
    ("attention_pipeline.h", "for (int d = head_dim_; d < kDim; ++d)"): (
        "a row in shared memory has 16 bytes behind its kDim elements, which nothing reads"
    ),
    (
        "paged_attention.cu",
        "if (row_tile >= work.row_tiles)",
    ): "the tile behind the last has no rows to write",
    ("attention_tiles.h", "for (int n = 0; n < kDim / 8; ++n)  →"): GUARDED,
    ("attention_tiles.h", "for (int c = 0; c < kColumns; ++c)  →"): GUARDED,
    ("paged_attention.cu", "for (int c = 0; c < kColumns; ++c)  →"): GUARDED,
    ("paged_attention.cu", "if (lane + c * kWarp < head_dim)  →"): (
        "reads one number more, the row's own largest score, into a sum that is not written"
    ),
    ("unmask.cu", "b.value > a.value || (b.value == a.value && b.token < a.token)"): (
        "a token occurs once, and of equal values the lower token is taken either way"
    ),
    ("unmask.cu", "for (int i = 0; i < kPerThread; i += kVector<T>) {"): (
        "looks at tokens of the next part as well, whose own block judges them the same"
    ),
    (
        "unmask.cu",
        "for (int64_t base = p.cu_rows[b]; base < end;",
    ): "the groups past the end repeat the last row",
    ("unmask.cu", "return weight(knobs.temperature > 0 ?"): (
        "without noise the value that the candidate maximises is its logit"
    ),
}

REMOVED = re.compile(r"(?<![\w.])(__syncthreads|__syncwarp|cp_async_wait<\d+>|mbarrier_wait)\(.*?\);")
COMPARED = re.compile(r"(?<=[\w)\]}]) (<=|>=|<|>) (?=[\w(&*-])")
FLIPPED = {"<": "<=", "<=": "<", ">": ">=", ">=": ">"}


@dataclass(frozen=True)
class Mutant:
    """One fault: ``source`` from ``begin`` to ``end`` becomes ``text``."""

    file: str
    line: int
    begin: int
    end: int
    text: str
    shown: str

    @property
    def kind(self) -> str:
        return "bound" if self.text else "barrier or wait"


def without_comments(source: str) -> str:
    """The same length, with blanks for comments, strings and preprocessor lines."""
    pattern = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\])*"|^#[^\n]*', re.S | re.M)
    return pattern.sub(lambda m: re.sub(r"[^\n]", " ", m.group()), source)


def device_code(code: str) -> list[tuple[int, int]]:
    """Bodies of the functions marked __device__ or __global__."""
    found = []
    for mark in re.finditer(r"__device__|__global__", code):
        opening = code.find("{", mark.end())
        if opening < 0 or ";" in code[mark.end() : opening].replace("asm", ""):
            continue
        depth, at = 1, opening + 1
        while depth:
            depth += {"{": 1, "}": -1}.get(code[at], 0)
            at += 1
        found.append((opening, at))
    return found


def mutants_of(path: Path) -> list[Mutant]:
    """All faults of a file."""
    source = path.read_text(encoding="utf-8")
    code = without_comments(source)
    inside = device_code(code)
    lines = source.splitlines()
    found = []

    def add(begin: int, end: int, text: str) -> None:
        line = source.count("\n", 0, begin)
        if any(a <= begin < b for a, b in inside):
            shown = f"{lines[line].strip()}" + (f"  →  `{text}`" if text else "")
            found.append(Mutant(path.name, line + 1, begin, end, text, shown))

    for m in REMOVED.finditer(code):
        add(m.start(), m.end() - 1, "")  # the semicolon stays: it may be all of a branch
    for m in COMPARED.finditer(code):
        statement = code[code.rfind("\n", 0, m.start()) + 1 : m.start()]
        if "static_assert" not in statement and "if constexpr" not in statement:
            add(m.start(1), m.end(1), FLIPPED[m.group(1)])
    return found


def tests_of(mutant: Mutant) -> list[str]:
    """The files of tests that run the mutant's kernels."""
    stem = Path(mutant.file).stem
    return TESTS.get(stem) or TESTS[stem.split("_")[0]]


# Builds that judge a mutant, the quick one first: plain with checked array indices, then AddressSanitizer.
BUILDS = {
    "bounds": ["-DCMAKE_CXX_FLAGS_DEBUG=-O1 -fsanitize=bounds -fsanitize-undefined-trap-on-error"],
    "asan": ["-DCMAKE_CXX_FLAGS_DEBUG=-O1 -g1", "-DFASTDLLM_SANITIZE=ON"],
}


class Workshop:
    """A copy of the sources with build trees of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("csrc", "tests", "third_party", "benchmarks", "python"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.pyc", "results"))
        for name in ("CMakeLists.txt", "pyproject.toml"):
            shutil.copy(ROOT / name, folder)
        for build, flags in BUILDS.items():
            self.run(
                "cmake", "-S", ".", "-B", build, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}",
                "-DCMAKE_BUILD_TYPE=Debug", "-DFASTDLLM_CUDA=OFF", "-DFASTDLLM_PORTABLE=ON",
                "-DFASTDLLM_SIMT=ON", *flags,
            )  # fmt: skip
            self.build(build)

    def run(self, *command: str, timeout: float | None = None, **more: str) -> None:
        scripts = sysconfig.get_path("scripts")
        environment = os.environ | {"PATH": f"{scripts}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"} | more
        subprocess.run(
            command,
            cwd=self.folder,
            env=environment,
            check=True,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def build(self, name: str) -> None:
        self.run("cmake", "--build", name, "--target", "_simt", "-j", "1")

    def is_caught(self, mutant: Mutant) -> str | None:
        """What noticed it: the compiler, a test, or nothing."""
        path = self.folder / "csrc" / "cuda" / mutant.file
        source = path.read_text(encoding="utf-8")
        path.write_text(source[: mutant.begin] + mutant.text + source[mutant.end :], encoding="utf-8")
        try:
            for build in BUILDS:
                self.build(build)
                if failed := self.failing_test(build, tests_of(mutant)):
                    return failed if build == "bounds" else f"{failed} ({build})"
        except subprocess.CalledProcessError:
            return "compiler"
        finally:
            path.write_text(source, encoding="utf-8")
        return None

    def failing_test(self, build: str, tests: list[str]) -> str | None:
        more = {"FASTDLLM_SIMT_LIBRARY": str(self.folder / build / "_simt.so")}
        if build == "asan":
            libraries = (
                subprocess.check_output(["g++", f"-print-file-name={name}.so"], text=True).strip()
                for name in ("libasan", "libstdc++")
            )
            more |= {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}
        try:
            self.run(
                sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-k", "simt",
                *(str(ROOT / "tests" / name) for name in tests), timeout=400, **more,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return "no end in time"
        except subprocess.CalledProcessError as error:
            failed = re.search(r"FAILED \S+::(\w+)", error.stdout)
            return failed.group(1) if failed else "crash"
        return None


def reason(mutant: Mutant) -> str | None:
    """Why the mutant is the same program, where it is known to be."""
    for (file, text), why in EQUIVALENT.items():
        if file == mutant.file and text in mutant.shown:
            return why
    return None


def report(results: list[tuple[Mutant, str | None]]) -> str:
    """Markdown: the share caught, and every mutant that was not."""
    out = [
        "# Mutation check of the CUDA kernels",
        "",
        "`make mutants` removes each barrier and each wait for asynchronous copies and flips each comparison",
        "in device code, one at a time, and runs the emulated tests (tests/simt/mutate.py).",
        "",
        "| file | kind | mutants | caught | same program | missed |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    same = [(m, why) for m, caught in results if not caught and (why := reason(m))]
    missed = [m for m, caught in results if not caught and not reason(m)]

    def row(name: str, kind: str, chosen: list[tuple[Mutant, str | None]]) -> str:
        mine = {id(m) for m, _ in chosen}
        counts = (
            len(chosen),
            sum(bool(caught) for _, caught in chosen),
            sum(id(m) in mine for m, _ in same),
            sum(id(m) in mine for m in missed),
        )
        return f"| {name} | {kind} | " + " | ".join(map(str, counts)) + " |"

    for file in sorted({m.file for m, _ in results}):
        for kind in ("barrier or wait", "bound"):
            chosen = [(m, caught) for m, caught in results if m.file == file and m.kind == kind]
            if chosen:
                out.append(row(file, kind, chosen))
    out.append(row("**all**", "", results))
    caught, real = sum(bool(c) for _, c in results), len(results) - len(same)
    out += [
        "",
        f"Caught: {caught} of {len(results)} faults. {len(same)} others make the same program, judged by hand"
        f" (reasons below): {100 * caught / max(real, 1):.1f}% of those that change it.",
        "",
    ]
    if missed:
        out += ["## Missed", *(f"- `{m.file}:{m.line}` `{m.shown}`" for m in missed), ""]
    if same:
        out += ["## The same program", *(f"- `{m.file}:{m.line}` `{m.shown}`: {why}" for m, why in same), ""]
    return "\n".join(out)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="Markdown report to write")
    parser.add_argument("--only", default="", help="files whose name contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--list", action="store_true", help="show the mutants and stop")
    args = parser.parse_args()
    files = sorted(p for p in CUDA.iterdir() if p.suffix in (".cu", ".h") and p.name not in NOT_KERNELS)
    mutants = [m for p in files if args.only in p.name for m in mutants_of(p)]
    if args.list:
        for m in mutants:
            print(f"{m.file}:{m.line}  {m.shown}" + ("  (same program)" if reason(m) else ""))
        return
    with tempfile.TemporaryDirectory() as temporary:
        shops: Queue[Workshop] = Queue()
        for job in range(args.jobs):
            shops.put(Workshop(Path(temporary) / str(job)))
        everything = sorted({name for m in mutants for name in tests_of(m)})
        for build in BUILDS:
            if failed := shops.queue[0].failing_test(build, everything):
                sys.exit(f"{build}: the tests fail without any mutation: {failed}")

        def judge(mutant: Mutant) -> tuple[Mutant, str | None]:
            shop = shops.get()
            try:
                caught = shop.is_caught(mutant)
            finally:
                shops.put(shop)
            print(f"{mutant.file}:{mutant.line} {caught or 'MISSED'}  {mutant.shown}", flush=True)
            return mutant, caught

        with ThreadPoolExecutor(args.jobs) as pool:
            results = list(pool.map(judge, mutants))
    text = report(results)
    print(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
