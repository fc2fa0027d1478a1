"""Every benchmark runs from end to end, on a tiny model, and writes what the page reads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import common
import end_to_end
import growth
import memory
import ops
import page
import phases
import precision

ROOT = Path(__file__).parent.parent
FACTS = {"date", "commit", "changed_files", "command", "environment", "conditions", "missing", "results"}


def run(name: str, out: Path, *arguments: str) -> dict[str, Any]:
    command = [
        sys.executable,
        str(ROOT / f"benchmarks/{name}.py"),
        "--device",
        "cpu",
        "--quick",
        "--out",
        str(out),
    ]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    facts = json.loads(out.read_text())
    assert set(facts) >= FACTS
    assert facts["results"]
    assert str(out.parent) not in facts["command"]
    return facts


def test_end_to_end(tmp_path: Path) -> None:
    facts = run("end_to_end", tmp_path / "end_to_end-cpu.json", "--shape", "tiny", "--dtype", "float32")
    rows = facts["results"]
    assert "published implementation" in facts["missing"]
    base = rows[0]
    assert base["extrapolated_from_steps"] == len(base["samples_s"])
    assert base["median_s"] == pytest.approx(base["nfe"] * sorted_median(base["samples_s"]))
    for row in rows[1:]:
        assert row["extrapolated_from_steps"] is None
        assert row["speedup_over_loop"] == pytest.approx(base["median_s"] / row["median_s"])
        assert all(share == 1 for share in row["tokens_equal"].values())  # in float32
    assert {(r["cache"], r["runtime"]) for r in rows[1:]} >= {("dual", "fused"), ("dual", "modules")}
    assert [r for r in rows if r["stops_at_eos"] and r["tokens"] < r["gen_length"]]


def test_precision(tmp_path: Path) -> None:
    facts = run("precision", tmp_path / "precision-cpu.json", "--shape", "tiny", "--dtype", "bfloat16")
    speed, accuracy = (page.select(facts, question=question) for question in ("speed", "accuracy"))
    assert [(r["quantization"], r["kv_cache_dtype"]) for r in speed] == [
        (q, kv) for q in ("none", "int8") for kv in ("auto", "fp8")
    ]
    assert {r["quantization"] for r in accuracy} == {"none", "int8", "fp8"}
    assert speed[0]["speedup"] == 1
    assert speed[-1]["speedup"] == pytest.approx(
        speed[0]["total"]["median_s"] / speed[-1]["total"]["median_s"]
    )
    for rule in precision.RULES:
        rows = page.select({"results": accuracy}, rule=rule)
        assert rows[0]["rows_equal"] == 1
        assert all(row["accuracy"] == row["right"] / 4 for row in rows)


@pytest.mark.slow
def test_serve_load(tmp_path: Path) -> None:
    loads = ["--repeats", "1", "--clients", "1", "8", "--shares", "0.8"]
    rows = run("serve_load", tmp_path / "serve_load-cpu.json", *loads)["results"]
    assert [(r["load"], r["server"]) for r in rows] == [
        (load, server)
        for load in ("closed", "closed", "open")
        for server in ("one at a time", "side by side")
    ]
    assert len({row["texts"] for row in rows}) == 1
    assert all(row["requests"] == 16 and row["right"] >= 14 for row in rows)
    assert all(row["first_block_seconds"]["p50"] <= row["request_seconds"]["p99"] for row in rows)


def test_serve_soak(tmp_path: Path) -> None:
    """Which raises where an answer is lost or another's, or a page is not given back."""
    (row,) = run("serve_soak", tmp_path / "serve_soak-cpu.json")["results"]
    assert sum(row["kinds"].values()) == row["requests"] == 80
    assert set(row["kinds"]) == {"whole", "streamed", "left", "gone", "malformed", "oversized"}


def test_phases(tmp_path: Path) -> None:
    for row in run("phases", tmp_path / "phases-cpu.json", "--shape", "tiny", "--dtype", "float32")[
        "results"
    ]:
        parts = ("refresh", "block_steps", "selection", "host")
        assert sum(row["shares"][name] for name in parts) == pytest.approx(1, abs=0.2)
        assert 0 < row["shares"]["head"] < 1
        turns = {"refresh"} if row["cache"] == "none" else {"refresh", "block_step"}
        assert {t["turn"] for t in row["operations"]} == turns
        for turn in row["operations"]:
            assert 0 < len(turn["operations"]) <= 10
            assert sum(o["share"] for o in turn["operations"]) <= 1.0001
        assert ("times_floor" in row.get("block_step", {})) == (row["cache"] == "dual")


def test_growth(tmp_path: Path) -> None:
    facts = run("growth", tmp_path / "growth-cpu.json", "--shape", "tiny", "--dtype", "bfloat16")
    assert {(f["varied"], f["what"]) for f in facts["fits"]} == {
        (varied, what) for varied in ("context", "block", "batch") for what in ("block_step", "refresh")
    }
    for row in facts["results"]:
        assert len(row["refresh"]["samples_s"]) == 2 * growth.BLOCKS


def test_memory(tmp_path: Path) -> None:
    facts = run("memory", tmp_path / "memory-cpu.json", "--shape", "tiny")
    assert {r["runtime"] for r in facts["results"]} == {"fused", "modules"}
    assert all(r["needed"]["total"] > 0 and r["peak_bytes"] >= 0 for r in facts["results"])


def test_exponents_of_power_laws() -> None:
    sizes = [512, 1024, 4096]
    assert growth.exponent(sizes, [3.0 * n**1.25 for n in sizes]) == pytest.approx(1.25)
    assert growth.exponent(sizes, [7.0, 7.0, 7.0]) == pytest.approx(0)


def test_plain_loop_is_the_uncached_loop() -> None:
    """All of its steps give the tokens that the patched model gives with no cache and one token a step."""
    model = common.make_model(common.SHAPES["tiny"], torch.float32, "cpu")
    prompts = common.random_prompts(common.SHAPES["tiny"], 2, 9, "cpu")
    rows = torch.cat((prompts, torch.full((2, 64), model.config.mask_token_id)), dim=1)
    seconds = end_to_end.plain_loop(model, rows, 9, 64, "cpu")
    output = end_to_end.fd.generate(
        model, prompts, gen_length=64, block_length=common.BLOCK, steps=64, cache="none", stop_on_eos=False
    )
    assert len(seconds) == 64
    assert torch.equal(rows, output.sequences)


def test_budgets_are_those_of_the_design() -> None:
    """LLaDA-8B, bfloat16, batch 1, block 32, a context of 2,400: GB of each part."""
    parts = common.SHAPES["llada-8b"].block_step_bytes(1, 32, 2400, 2)
    rounded = {name: round(count / 1e9, 2) for name, count in parts.items()}
    assert rounded == {"layer_weights": 13.96, "head": 1.04, "kv": 1.26, "logits": 0.02}
    flop = common.SHAPES["llada-8b"].refresh_flop(1, 32, 2400)
    assert 0.85 < flop / (2 * 8.0e9 * 2400) < 1


def test_weights_are_counted_as_they_are() -> None:
    for name in ("tiny", "dream-tiny"):
        shape = common.SHAPES[name]
        model = common.make_model(shape, torch.float32, "cpu")
        matrices = [p for p in model.parameters() if p.dim() > 1]
        counted = shape.layers * shape.layer_weights + 2 * shape.hidden * shape.vocab
        assert sum(p.numel() for p in matrices) == counted
        assert not model.get_output_embeddings().weight[shape.mask_id].any()


def test_schedules_fit_published_code() -> None:
    assert common.steps_for(1024, 3.25) == 320
    assert common.steps_for(128, 4) == 32
    assert common.steps_for(128, 1) == 128
    assert common.steps_for(33, 1000) == 4  # two blocks, whose published loop takes two steps at least


def test_imports_of_a_checkout_leave_no_trace(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "__init__.py").write_text("NAME = 'theirs'")
    (tmp_path / "generate.py").write_text("from model import NAME")
    paths = sys.path[:]
    with end_to_end.imported_from(tmp_path):
        import generate  # type: ignore[import-not-found]

        assert generate.NAME == "theirs"
    assert sys.path == paths
    assert not {"model", "generate"} & set(sys.modules)


def test_paths_of_the_machine_stay_out_of_results(tmp_path: Path) -> None:
    shown = common.command_line(
        [str(ROOT / "benchmarks/ops.py"), "--out", str(tmp_path / "x.json"), "--reference", str(tmp_path)]
    )
    assert shown == "python benchmarks/ops.py --out x.json --reference PATH"


@pytest.mark.parametrize("module", [end_to_end, growth, memory, ops, page, phases])
def test_docstring_begins_with_the_question(module: Any) -> None:
    assert "?" in module.__doc__.splitlines()[0]


def sorted_median(samples: list[float]) -> float:
    return float(torch.tensor(samples, dtype=torch.float64).quantile(0.5))
