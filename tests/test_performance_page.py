"""docs/performance.md is what the files of results say, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import figures
import page

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {
    "cpu": "Some CPU", "cpu_isa": "avx2", "threads": 2, "torch": "2.11", "transformers": "5.0",
    "python": "3.11", "gpus": ["Some GPU"], "cuda_available": True,
}  # fmt: skip


def clock(seconds: float) -> dict[str, Any]:
    return {"median_s": seconds, "quartiles_s": [seconds, seconds], "samples_s": [seconds] * 3}


def write(folder: Path, question: str, device: str, rows: list[dict[str, Any]], **extra: Any) -> None:
    facts = {
        "date": "2030-01-02T03:04:05+00:00", "commit": "c0ffee", "changed_files": [], "driver": "1.2",
        "command": f"python benchmarks/{question}.py", "device": device,
        "environment": ENVIRONMENT | {"cuda_available": device == "cuda"}, "conditions": {"repeats": 3},
        "missing": {}, "results": rows, **extra,
    }  # fmt: skip
    (folder / f"{question}-{device}.json").write_text(json.dumps(facts))


def generation(implementation: str, seconds: float, **changes: Any) -> dict[str, Any]:
    row = {
        "implementation": implementation, "cache": "dual", "runtime": "", "tokens_per_step": 4, "steps": 32,
        "stops_at_eos": False, "model": "small", "dtype": "bfloat16", "batch": 1, "prompt": 128,
        "gen_length": 128, "block_length": 32, "nfe": 32, "tokens": 128, "tokens_per_second": 128 / seconds,
        "extrapolated_from_steps": None, "speedup_over_loop": 10 / seconds, "tokens_equal": {},
        **clock(seconds),
    }  # fmt: skip
    return row | changes


def steps(context: int, seconds: float) -> dict[str, Any]:
    return {
        "varied": "context", "model": "small", "dtype": "bfloat16", "context": context, "block": 32,
        "batch": 1, "block_step": clock(seconds), "refresh": clock(1.0),
    }  # fmt: skip


def write_cpu(folder: Path, ours: float) -> None:
    equal = {"published, dual, 4 a step": 1.0}
    rows = [
        generation("plain loop", 10.0, cache="none", tokens_per_step=1, extrapolated_from_steps=12),
        generation("fastdllm_ext", ours, runtime="fused", tokens_equal=equal),
        generation("published", 2.0),
    ]
    write(folder, "end_to_end", "cpu", rows, reference={"sha256": {"generate.py": "abc"}})
    fits = [{
        "dtype": "bfloat16", "varied": "context", "what": "block_step", "sizes": [512, 4096], "exponent": 0.2,
        "last_over_first": 1.5,
    }]  # fmt: skip
    write(folder, "growth", "cpu", [steps(512, 0.010), steps(4096, 0.015)], fits=fits)


def write_gpu(folder: Path) -> None:
    whole = {"model": "llada-8b", "runtime": "fused", "prompt": 1400, "gen_length": 1024}
    batch = {"model": "llada-8b", "runtime": "fused", "prompt": 900, "gen_length": 256}
    rows = [
        generation("fastdllm_ext", 1.0, **whole, speedup_over_loop=50.0),
        generation("fastdllm_ext", 0.2, **whole, speedup_over_loop=99.0, stops_at_eos=True, tokens=229),
        generation("fastdllm_ext", 1.0, **batch, tokens_per_second=100.0),
        generation("fastdllm_ext", 2.0, **batch, tokens_per_second=900.0) | {"batch": 16},
    ]
    write(folder, "end_to_end", "cuda", rows)
    operation = {"name": "aten::mm", "seconds": 0.001, "share": 0.5, "calls": 3.0}
    phases = {
        "model": "llada-8b", "dtype": "bfloat16", "cache": "dual", "prompt": 1400, "gen_length": 1024,
        "tokens_per_step": 3.2, "total": clock(1.0),
        "shares": {"refresh": 0.5, "block_steps": 0.4, "selection": 0.05, "host": 0.05, "head": 0.1},
        "operations": [{"turn": "refresh", "turns": 2, "seconds_a_turn": 0.1, "operations": [operation]}],
        "block_step": clock(0.005) | {"times_floor": 1.3},
        "refresh": clock(0.05) | {"of_matmul": 0.55},
    }  # fmt: skip
    write(
        folder, "phases", "cuda", [phases], bandwidth={"bytes_per_s": 4e12},
        matmul={"bfloat16": {"flop_per_s": 8e14}},
    )  # fmt: skip
    needed = {"total": 2**20, "pages": 2**19, "activations": 2**19}
    memory = {
        "model": "llada-8b", "dtype": "bfloat16", "runtime": "fused", "context": 512, "peak_bytes": 2**20,
        "needed": needed, "peak_over_needed": 1.0, "is_upper_bound": False, "block_length": 32,
    }  # fmt: skip
    write(folder, "memory", "cuda", [memory])


def verdicts(folder: Path) -> dict[str, str]:
    return {target.what: target.verdict for target in page.targets(page.load(folder))}


def test_committed_page_is_that_of_the_committed_results() -> None:
    """`make bench-page` writes it."""
    results, out = ROOT / "benchmarks/results", ROOT / "docs/performance.md"
    assert page.Page(page.load(results), results, out, ROOT / "docs/images").render() == out.read_text(
        "utf-8"
    )


def test_nothing_measured(tmp_path: Path) -> None:
    text = page.Page({}, tmp_path, tmp_path / "performance.md", tmp_path).render()
    assert text.count("not measured: no GPU result yet") == 5
    assert text.count("not measured: no CPU result yet") == 3
    assert "| met |" not in text
    assert "| missed |" not in text


@pytest.mark.parametrize("ours, verdict", [(0.6, "met"), (0.7, "missed")])
def test_targets_on_the_cpu(tmp_path: Path, ours: float, verdict: str) -> None:
    write_cpu(tmp_path, ours)
    found = verdicts(tmp_path)
    (published,) = (v for what, v in found.items() if "published" in what and "bfloat16" in what)
    assert published == verdict  # 2 s / 0.6 s is more than 3, 2 s / 0.7 s is not
    assert found["block step at context 4,096 over one at 512, bfloat16"] == "met"
    assert found["tokens/s at batch 16 over batch 1"] == "not measured: no GPU result yet"


def test_targets_on_a_gpu(tmp_path: Path) -> None:
    write_gpu(tmp_path)
    found = [target for target in page.targets(page.load(tmp_path)) if target.device == "cuda"]
    assert [(t.measured, t.verdict) for t in found] == [
        (1.3, "met"), (0.55, "missed"), (50.0, "met"), (99.0, "missed"), (9.0, "met"),
    ]  # fmt: skip


def test_page_and_pictures_of_both(tmp_path: Path) -> None:
    write_cpu(tmp_path, 0.5)
    write_gpu(tmp_path)
    found = page.load(tmp_path)
    out = tmp_path / "docs" / "performance.md"
    text = page.Page(found, tmp_path, out, tmp_path / "docs/images").render()
    assert "[growth-cpu.json](../growth-cpu.json)" in text
    assert "Some GPU, driver 1.2; torch 2.11" in text
    assert "Some CPU (avx2), 2 threads" in text
    assert "10.0 [10.0, 10.0] (n 3), extrapolated" in text
    assert str(tmp_path) not in text
    pictures = list(figures.draw(found, tmp_path / "docs/images"))
    assert {p.name for p in pictures} == {
        f"performance-{q}-{d}.png" for q, d in found if q != "ops"
    }  # fmt: skip
    for picture in pictures:
        assert f"images/{picture.name}" in text
        assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
