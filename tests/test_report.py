from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

import fastdllm_ext as fd
from fastdllm_ext.cli import main
from fastdllm_ext.decoding import GenerationConfig
from fastdllm_ext.eval import analysis_figures, drift, sweep
from fastdllm_ext.eval.report import TRADEOFF_FIGURES

PNG = b"\x89PNG\r\n\x1a\n"


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer values of each kind."""
    for name, values in {
        "THRESHOLDS": (0.9, 1.0), "FACTORS": (1.0,), "QUOTAS": (1, 8), "BLOCKS": (8, 16),
        "GEN_LENGTHS": (16, 32),
    }.items():  # fmt: skip
        monkeypatch.setattr(sweep, name, values)


@pytest.fixture
def words(tmp_path: Path) -> Path:
    path = tmp_path / "words.jsonl"
    pairs = (("apple", "bell"), ("boat", "coin"), ("tiger", "lamp"))
    path.write_text(
        "".join(json.dumps({"prompt": f"Reverse {a} {b}.", "answer": f"{b} {a}"}) + "\n" for a, b in pairs)
    )
    return path


def test_a_whole_report_from_the_command_line(
    tmp_path: Path, words: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shrink(monkeypatch)
    out = tmp_path / "out"
    argv = [
        "report",
        "demo",
        "--task",
        str(words),
        "--gen-length",
        "16",
        "--block-length",
        "8",
        "--out",
        str(out),
    ]
    assert main([*argv, "--quick"]) == 0
    facts = json.loads((out / "report.json").read_text())
    page = (out / "report.html").read_text()
    pictures = [*TRADEOFF_FIGURES, *(name for part in analysis_figures.FIGURES.values() for name in part)]
    for name in pictures:
        assert (out / f"{name}.png").read_bytes().startswith(PNG)
    assert page.count("data:image/png;base64,") == len(pictures)
    assert not re.search(r'(src|href)="(?!data:)', page)  # nothing is fetched
    assert "<script" not in page
    rows = facts["settings"]
    assert rows[0]["label"] == "none, one a step"
    assert rows[0]["nfe"][0] > 1
    speeds = [row["tokens_per_second"][0] for row in rows]
    assert [row["speedup"] for row in rows] == [speed / speeds[0] for speed in speeds]
    assert all(row["problems"] == 3 and len(row["seconds"]) == 3 for row in rows)
    assert sum(row["on_front"] for row in rows) >= 1
    assert facts["conditions"]["environment"]["torch"]
    assert [row["name"] for row in facts["gen_lengths"]] == ["16 tokens", "32 tokens"]
    assert len(facts["gen_lengths"][0]["cells"]) == 5
    assert sum(row["problems"] for row in facts["prompt_lengths"]) == 3
    for row in rows:
        assert row["label"].replace("<", "&lt;") in page
    # More problems for some settings, one's own among them; only those get more.
    again, own = tmp_path / "again", tmp_path / "own"
    fewer = [*argv[:-1], str(again), "--axes", "caches", "--tradeoff", "--limit", "2", "--more", "3"]
    GenerationConfig(gen_length=16, block_length=4, rule="klass:kl=0.1").save_pretrained(own)
    assert main([*fewer, "--config", str(own)]) == 0
    facts = json.loads((again / "report.json").read_text())
    counts = {row["label"]: row["problems"] for row in facts["key_settings"]}
    rule = "klass:threshold=0.9:kl=0.1:history=2"
    assert facts["own"] == [{"gen_length": 16, "block_length": 4, "cache": "dual", "rule": rule}]
    assert counts[f"dual, {rule}, block 4"] == 3
    assert f"Chosen beforehand: dual, {rule}, block 4: " in (again / "report.html").read_text()
    assert counts["none, one a step"] == counts["dual, threshold 0.9"] == 3
    assert "dual, threshold 1" not in counts
    assert {row["problems"] for row in facts["settings"]} == {2}
    assert counts.keys() - {row["label"] for row in facts["settings"]} == set()
    # Once more: all is on record, so that the same samples come back.
    monkeypatch.setattr(drift, "measure", None)
    assert main([*argv, "--quick"]) == 0
    assert json.loads((out / "report.json").read_text())["settings"] == rows
    capsys.readouterr()
    assert main([*argv, "--quick", "--seed", "1"]) == 2
    assert "seed=0, and now seed=1; takes the same conditions, or another folder" in capsys.readouterr().err
    GenerationConfig(gen_length=32).save_pretrained(own)
    assert main([*fewer, "--config", str(own)]) == 2
    assert f"config={own}: has gen_length=32; takes 16 beside it" in capsys.readouterr().err


def test_one_part_alone(tmp_path: Path, words: Path) -> None:
    out = tmp_path / "out"
    argv = ["report", "--task", str(words), "--gen-length", "8", "--block-length", "4", "--out", str(out)]
    assert main([*argv, "--kv-similarity"]) == 0
    assert {path.name for path in out.iterdir()} == {
        "conditions.json", "kv_similarity.json", "kv_similarity.png", "kv_similarity_layers.png",
        "report.html", "report.json",
    }  # fmt: skip


def test_bad_calls_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, plain = ["--out", str(tmp_path)], tmp_path / "plain"
    shutil.copytree(fd.demo_model_path(), plain, ignore=shutil.ignore_patterns("*.jinja"))
    for argv, complaint in (
        (["demo", "--task", "none.jsonl"], "none.jsonl"),
        (["no-such-model"], "--task is missing"),
        (["no-such-model", "--task", "demo"], "no-such-model"),
        ([str(plain), "--task", "demo", "--chat"], "has no chat template"),
        (["demo", "--gen-length", "-1"], "gen_length=-1; takes 1 or more"),
        (["demo", "--batch-size", "0"], "batch_size=0; takes 1 or more"),
        (["demo", "--limit", "9", "--more", "9"], "more=9; takes more than limit=9"),
    ):
        assert main(["report", *argv, *out]) == 2
        error = capsys.readouterr().err
        assert complaint in error
        assert "fastdllm-ext report: " in error
        assert "Traceback" not in error
