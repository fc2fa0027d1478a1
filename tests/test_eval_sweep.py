from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fastdllm_ext as fd
from fastdllm_ext.eval import summary
from fastdllm_ext.eval.opening import Run
from fastdllm_ext.eval.sweep import Result, Sweep, baseline, grid, identity, label
from fastdllm_ext.eval.tasks import Problem, Task
from tiny import tiny_llada


class Numbers:
    """A tokenizer of numbers in words of their own: "3 14 15"."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, tokens: torch.Tensor, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return " ".join(map(str, tokens.tolist()))


def opened(problems: int = 5, batch_size: int = 1, **more: Any) -> Run:
    prompts = [" ".join(str(2 + (7 * i + j) % 50) for j in range(3 + i)) for i in range(problems)]
    asked = [
        Problem(prompt, lambda text: float(len(text) % 2), family="ab"[i % 2])
        for i, prompt in enumerate(prompts)
    ]
    conditions = {"batch_size": batch_size, "model_name": "tiny", **more}
    task = Task("numbers", "odd lengths", asked)
    return Run(tiny_llada(), Numbers(), task, 8, 4, conditions, lambda shots: task)


SETTINGS = [baseline(8, 4), {"gen_length": 8, "block_length": 4, "cache": "dual", "threshold": 0.5}]


def test_a_sweep_is_what_generate_gives(tmp_path: Path) -> None:
    for batch_size in (1, 2):
        run = opened(batch_size=batch_size)
        results = Sweep(run, tmp_path / str(batch_size)).run(SETTINGS)
        for setting, result in zip(SETTINGS, results, strict=True):
            alone = [fd.generate(run.model, [prompt], seed=0, **setting) for prompt in run.prompts()]
            assert result.tokens == [int(o.lengths[0] - o.prompt_lengths[0]) for o in alone]
            assert result.nfe == [int(o.nfe[0]) for o in alone]
            assert result.answers == [Numbers().decode(o.answers()[0], True) for o in alone]
            assert result.grades == [float(len(answer) % 2) for answer in result.answers]
            assert result.sizes == ([1] * 5 if batch_size == 1 else [2, 2, 1])
            assert len(result.seconds) == len(result.sizes)
            rate = sum(result.tokens) / sum(result.seconds)
            assert result.tokens_per_second().value == pytest.approx(rate)
            assert result.tokens_per_forward().value == pytest.approx(sum(result.tokens) / sum(result.nfe))
            assert result.mean_nfe().value == pytest.approx(sum(result.nfe) / 5)


def test_settings_take_turns_and_an_interrupted_sweep_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, int]] = []
    real = Sweep._answer

    def counted(self: Sweep, setting: Any, first: int, last: int) -> Any:
        if len(calls) == 7:
            raise KeyboardInterrupt
        calls.append((setting["cache"], first))
        return real(self, setting, first, last)

    monkeypatch.setattr(Sweep, "_answer", counted)
    with pytest.raises(KeyboardInterrupt):
        Sweep(opened(), tmp_path).run(SETTINGS)
    # Each setting once to warm up, then problem by problem.
    assert calls == [
        ("none", 0),
        ("none", 0),
        ("dual", 0),
        ("dual", 0),
        ("none", 1),
        ("dual", 1),
        ("none", 2),
    ]
    with (tmp_path / "records.jsonl").open("a") as file:
        file.write('{"setting": "half a li')
    monkeypatch.setattr(Sweep, "_answer", real)
    done = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()[:5]]
    results = Sweep(opened(), tmp_path).run(SETTINGS)
    assert [r.seconds[0] for r in results] == [r["seconds"][0] for r in done[:2]]  # not measured again
    assert [len(r.grades) for r in results] == [5, 5]
    fresh = Sweep(opened(), tmp_path / "fresh").run(SETTINGS)
    assert [r.answers for r in results] == [r.answers for r in fresh]
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == 10


def test_fewer_problems_and_then_all(tmp_path: Path) -> None:
    few = Sweep(opened(), tmp_path).run(SETTINGS, problems=2)
    every = Sweep(opened(), tmp_path).run(SETTINGS)
    assert [r.answers for r in few] == [r.answers[:2] for r in every]
    assert every[0].after(2).answers == every[0].answers[2:]
    assert every[0].after(2).seconds == every[0].seconds[2:]
    assert every[0].only([3, 0]).tokens == [every[0].tokens[3], every[0].tokens[0]]


def test_a_folder_holds_results_of_one_kind(tmp_path: Path) -> None:
    Sweep(opened(dtype="float32"), tmp_path)
    with pytest.raises(
        ValueError, match=r"dtype='float32', and now dtype='bfloat16'; takes the same conditions"
    ):
        Sweep(opened(dtype="bfloat16"), tmp_path)


def test_the_grid_holds_the_papers_questions() -> None:
    for quick in (False, True):
        settings = grid(128, 32, quick=quick)
        assert len({identity(s) for s in settings}) == len(settings)
        assert settings[0] == baseline(128, 32)
        for setting in settings:
            fd.GenerationConfig.from_dict(setting)
        dual = [s for s in settings if s["cache"] == "dual" and s["gen_length"] == 128]
        assert {s["threshold"] for s in dual if "threshold" in s} >= {0.5, 0.6, 0.7, 0.8, 0.9, 1.0}
        assert {128 // s["steps"] for s in dual if "steps" in s} == {1, 2, 4, 8, 16, 32}
        assert any("factor" in s for s in dual)
        assert any("refresh" in s for s in dual)
        assert {s["block_length"] for s in dual} == {4, 8, 16, 32, 64, 128}
        assert {s["gen_length"] for s in settings} == {64, 128, 256}
        assert {s["cache"] for s in settings} == {"none", "prefix", "dual"}
        names = {str(s["rule"]).partition(":")[0] for s in settings if "rule" in s}
        assert names == set(fd.rules.RULES)
    assert len(grid(128, 32)) > 1.3 * len(grid(128, 32, quick=True))
    assert [s["cache"] for s in grid(128, 32, axes=[])] == ["none"]
    with pytest.raises(ValueError, match="axes='blcoks'; takes of caches"):
        grid(128, 32, axes=["blcoks"])


def test_labels() -> None:
    beside = {"gen_length": 128, "block_length": 32}
    assert label(baseline(128, 32), beside) == "none, one a step"
    assert label(beside | {"cache": "dual", "steps": 32}, beside) == "dual, 4 a step"
    assert label({"gen_length": 64, "cache": "prefix", "factor": 0.5}, beside) == "prefix, factor 0.5, gen 64"
    policy = {"cache": "dual", "threshold": 0.9, "window": [8, 8], "refresh": 2}
    assert label(policy, beside) == "dual, threshold 0.9, window 8+8, refresh 2"
    assert label({"cache": "dual", "rule": "frechet:factor=0.5"}, beside) == "dual, frechet:factor=0.5"


def result(setting: Any, grades: list[float], seconds: float, nfe: int = 4) -> Result:
    count = len(grades)
    answers = ["right" if grade else "wrong" for grade in grades]
    return Result(setting, grades, [10] * count, [nfe] * count, answers, [seconds] * count, [1] * count)


def test_a_summary_names_what_is_lost_and_what_nothing_beats() -> None:
    results = [
        result(SETTINGS[0], [1.0] * 19 + [0.0], 2.0),
        result(SETTINGS[1], [1.0] * 18 + [0.0] * 2, 0.5),
        result(SETTINGS[1] | {"threshold": 0.6}, [1.0] * 15 + [0.0] * 5, 0.6),
    ]
    rows = summary.summarise(results, ["a", "b"] * 10, {"gen_length": 8, "block_length": 4})
    assert [row["on_front"] for row in rows] == [True, True, False]
    shorter = result(SETTINGS[1] | {"gen_length": 4}, [1.0] * 20, 0.1)  # another task: it beats nothing
    again = summary.summarise([*results, shorter], ["a"] * 20, {"gen_length": 8, "block_length": 4})
    assert [row["on_front"] for row in again] == [True, True, False, False]
    assert [row["accuracy"][0] for row in rows] == [0.95, 0.9, 0.75]
    assert [row["loss"][0] for row in rows] == pytest.approx([0.0, 0.05, 0.2])
    assert rows[1]["loss_at_most"] > 0.05
    assert [row["tokens_per_second"][0] for row in rows] == pytest.approx([5, 20, 100 / 6])
    assert rows[1]["same_answer"] == 0.95
    assert rows[0]["by_family"] == {"a": 1.0, "b": 0.9}
    assert summary.select(rows, cache="dual", threshold=..., gen_length=8) == rows[1:]
    assert summary.select(rows, cache="dual", threshold=0.6) == rows[2:]
    assert summary.select(rows, cache="none", threshold=...) == []


def test_prompt_lengths_compare_the_same_problems() -> None:
    results = [result(SETTINGS[0], [1.0, 0.0, 1.0, 1.0, 0.0, 0.0], 2.0), result(SETTINGS[1], [1.0] * 6, 0.5)]
    results[0].seconds = [6.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    rows = summary.by_prompt_length(results, [9, 1, 2, 3, 4, 5])
    assert [row["name"] for row in rows] == ["1 to 2 tokens", "3 to 4 tokens", "5 to 9 tokens"]
    assert [row["cells"][0]["accuracy"][0] for row in rows] == [0.5, 0.5, 0.5]
    assert [row["cells"][1]["speedup"] for row in rows] == pytest.approx([3.0, 7.0, 11.0])
    assert summary.by_prompt_length([replace(results[0], sizes=[6], seconds=[1.0])], [1] * 6) == []


def test_settings_that_do_not_fit_are_known() -> None:
    run = opened()
    longest = max(map(len, run.prompts()))
    assert run.fits({"gen_length": 256 - longest})
    run.check_fits({"gen_length": 256 - longest})
    with pytest.raises(
        ValueError, match=rf"gen_length={257 - longest}: with a prompt of {longest} tokens it exceeds"
    ):
        run.check_fits({"gen_length": 257 - longest})
