from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

import fastdllm_ext as fd
from fastdllm_ext.cli import main
from fastdllm_ext.eval import calibrate
from fastdllm_ext.eval.calibrate import candidates, choose, race
from fastdllm_ext.eval.statistics import most_lost
from fastdllm_ext.eval.sweep import Result, Setting
from test_eval_sweep import result


class Oracle:
    """A sweep whose settings are right, and fast, as often as they say."""

    def __init__(self, problems: int, seed: int = 0) -> None:
        self.problems, self.seed = problems, seed
        self.asked: dict[str, int] = {}

    def run(self, settings: list[Setting], progress: object, problems: int | None = None) -> list[Result]:
        count = self.problems if problems is None else problems
        found = []
        for s in settings:
            name = str(s["name"])
            self.asked[name] = max(self.asked.get(name, 0), count)
            rng = random.Random(f"{self.seed} {name}")
            grades = [float(rng.random() < s["right"]) for _ in range(self.problems)]
            found.append(result(s, grades[:count], s["seconds"]))
        return found


def test_a_race_keeps_what_is_right_and_then_what_is_fast() -> None:
    heats = [
        [
            {"name": f"{heat}{i}", "right": right, "seconds": seconds}
            for i, (right, seconds) in enumerate(heat_of)
        ]
        for heat, heat_of in {
            "a": [(1.0, 3.0), (1.0, 1.0), (0.3, 0.1), (1.0, 2.0)],
            "b": [(0.9, 0.5), (0.2, 0.4), (0.0, 0.1), (0.1, 0.2)],
        }.items()
    ]
    oracle = Oracle(64)
    assert [s["name"] for s in race(oracle, heats, 64)] == ["a1", "b0"]  # type: ignore[arg-type]
    assert oracle.asked["a2"] < oracle.asked["a1"]  # the worse half was asked less
    # Of heats that are right as often, the slower comes first: it is tested before the faster.
    heats = [[{"name": "x", "right": 1.0, "seconds": 1.0}], [{"name": "y", "right": 1.0, "seconds": 2.0}]]
    assert [s["name"] for s in race(Oracle(8), heats, 8)] == ["y", "x"]  # type: ignore[arg-type]


def test_the_choice_stops_at_the_first_that_may_lose_too_much() -> None:
    before = result({"name": "before"}, [1.0] * 400, 9.0)
    safe = result({"name": "safe"}, [1.0] * 400, 3.0)
    lossy = result({"name": "lossy"}, [1.0] * 380 + [0.0] * 20, 2.0)
    fast = result({"name": "fast"}, [1.0] * 400, 1.0)
    chosen = choose(before, [safe, lossy, fast], 0.01)
    assert chosen is safe  # what comes after a failure is not tested: it would be one more chance to err
    assert choose(before, [safe, fast], 0.01) is fast
    assert choose(before, [lossy, safe], 0.01) is None
    assert most_lost(before.grades, lossy.grades) > 0.01


def test_a_setting_that_loses_too_much_is_chosen_as_rarely_as_is_said() -> None:
    # One rule loses exactly the bound, 2 points: choosing it is an error, which may happen in 5 % of runs.
    trials, errors = 300, 0
    for seed in range(trials):
        rng = random.Random(seed)
        before = result({}, [1.0] * 300, 9.0)
        after = result({}, [float(rng.random() < 0.98) for _ in range(300)], 1.0)
        errors += choose(before, [after], 0.02) is not None
    assert errors / trials < 0.05 + 4 * (0.05 * 0.95 / trials) ** 0.5


def test_candidates_are_valid_settings_of_one_rule_a_heat() -> None:
    heats = candidates(64)
    for heat in heats:
        configs = [fd.GenerationConfig.from_dict(setting) for setting in heat]
        assert len({c.selection for c in configs}) == 1
        assert {c.cache for c in configs} == {"prefix", "dual"}
        assert all(c.block_length <= 64 for c in configs)
    assert {c["block_length"] for c in candidates(20)[0]} == {8, 16, 20}


def test_calibrate_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "RULES", ({"threshold": 0.9}, {"threshold": 0.3}))
    monkeypatch.setattr(calibrate, "BLOCKS", (32,))
    monkeypatch.setattr(calibrate, "POLICIES", ({},))
    lines = [{"prompt": f"Reverse {a} {b} boat coin lamp.", "answer": f"lamp coin boat {b} {a}"} for a, b in
             (("apple", "bell"), ("boat", "coin"), ("tiger", "lamp"), ("yarn", "stone"))]  # fmt: skip
    path = tmp_path / "words.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines * 2))
    out = tmp_path / "out"
    argv = ["calibrate", "demo", "--task", str(path), "--gen-length", "16", "--out", str(out)]
    assert main([*argv, "--max-loss", "100"]) == 0
    told = capsys.readouterr().out
    facts = json.loads((out / "calibration" / "calibration.json").read_text())
    assert facts["raced_on"] == 2
    assert facts["decided_on"] == 6
    call = f"fd.load(fd.demo_model_path(), generation_config={str(out)!r})"
    assert call in told
    saved = fd.GenerationConfig.from_pretrained(out)
    assert saved == fd.GenerationConfig.from_dict(facts["chosen"])
    model, tokenizer = eval(call)
    prompt = torch.tensor(tokenizer("Reverse apple bell.")["input_ids"])
    assert fd.generate(model, [prompt]).sequences.shape[1] == len(prompt) + 16
    assert main([*argv, "--max-loss", "0.1"]) == 1  # six problems cannot show that
    assert "No setting is shown to lose at most 0.1 points" in capsys.readouterr().out


def test_bad_calls_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "out")]
    for argv, complaint in (
        (["--max-loss", "0"], "max_loss=0.0; takes points of accuracy"),
        (["--limit", "3"], "limit=3 with batch_size=1; takes four batches or more"),
        (["--limit", "4", "--gen-length", "512"], "exceeds the model's positions"),
        (["--limit", "0"], "limit=0; takes 1 or more"),
    ):
        assert main(["calibrate", *argv, *out]) == 2
        assert complaint in capsys.readouterr().err
    assert not (tmp_path / "out" / "generation_config.json").exists()
