from __future__ import annotations

import itertools
import json
import math
from functools import lru_cache
from pathlib import Path

import pytest
import torch

import fastdllm_ext as fd
from fastdllm_ext import _C, demo
from fastdllm_ext.demo_tasks import FAMILIES, draw, held_out, is_held_out, training_stream

ROOT = Path(__file__).parent.parent


@lru_cache
def demo_model() -> tuple:
    return fd.load(fd.demo_model_path(), device="cpu")


def encode(text: str) -> torch.Tensor:
    return torch.tensor(demo_model()[1](text)["input_ids"])


def accuracy(problems: list, **settings) -> tuple[float, float]:
    """(share of right answers, forwards a prompt)."""
    model, tokenizer = demo_model()
    prompts = [encode(p.prompt) for p in problems]
    output = fd.generate(
        model, prompts, gen_length=demo.GEN_LENGTH, block_length=demo.BLOCK_LENGTH, **settings
    )
    texts = [tokenizer.decode(a, skip_special_tokens=True) for a in output.answers()]
    right = sum(text == p.answer for text, p in zip(texts, problems, strict=True))
    return right / len(problems), float(output.nfe.float().mean())


def test_weights_are_small_and_the_tokenizer_is_exact() -> None:
    folder = fd.demo_model_path()
    assert sum(f.stat().st_size for f in folder.iterdir()) <= 8e6
    model, tokenizer = demo_model()
    assert model.config.mask_token_id == tokenizer.mask_token_id
    assert model.config.eos_token_id == tokenizer.eos_token_id
    for problem in held_out(60, seed=5):
        for text in (problem.prompt, problem.answer):
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
            assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]
        assert len(encode(problem.answer)) < demo.GEN_LENGTH


def test_training_never_sees_a_held_out_prompt() -> None:
    assert not any(is_held_out(p.prompt) for p in itertools.islice(training_stream(3), 3000))
    problems = held_out(90, seed=1)
    assert all(is_held_out(p.prompt) for p in problems)
    assert len({p.prompt for p in problems}) == 90
    assert [p.family for p in problems[:3]] == list(FAMILIES)
    assert problems == held_out(90, seed=1)
    assert problems != held_out(90, seed=2)
    practised = list(itertools.islice(training_stream(3, families=("add", "story"), nines=1.0), 2000))
    assert not any(is_held_out(p.prompt) for p in practised)
    columns = [p.answer.count("+0=09") + p.answer.count("+1=10") for p in practised]
    assert sum(columns) > 2 * len(practised)  # of about 6.6; of evenly drawn ones a tenth
    with pytest.raises(ValueError, match="family='divide' is unknown; there are add"):
        draw(None, "divide")  # type: ignore[arg-type]


def test_threshold_keeps_the_accuracy_and_a_quota_does_not() -> None:
    """The point of the demo model, on fewer prompts than its card measures."""
    problems = held_out(150, seed=7)
    for cache in ("dual", "prefix"):
        kept, forwards = accuracy(problems, threshold=0.9, cache=cache)
        assert kept >= 0.98
        steps = math.ceil(2 * forwards)  # a row that ends early takes about half of its steps
        lost, spent = accuracy(problems, steps=steps, cache=cache)
        assert spent >= forwards * 0.95
        assert lost < kept - 0.08


@pytest.mark.parametrize("isa", _C.cpu_isas())
def test_bfloat16_gives_nearly_the_same_answers(isa: str) -> None:
    """Measured: the same answer on 150 of 150 prompts with every instruction set."""
    _C.set_cpu_isa(isa)
    prompts = [encode(p.prompt) for p in held_out(40, seed=7)]
    narrow, _ = fd.load(fd.demo_model_path(), dtype=torch.bfloat16, device="cpu")
    pairs = [fd.generate(m, prompts, threshold=0.99).answers() for m in (narrow, demo_model()[0])]
    assert sum(torch.equal(a, b) for a, b in zip(*pairs, strict=True)) >= 38


def test_baseline_is_the_uncached_loop() -> None:
    """Token for token what the patched model gives with no cache and one token a step."""
    model, _ = demo_model()
    for problem in held_out(3, seed=9):
        prompt = encode(problem.prompt)
        fd.unpatch(model)
        row, forwards = demo.baseline(model, prompt, 48, 16)
        fd.patch(model)
        output = fd.generate(
            model, [prompt], gen_length=48, block_length=16, steps=48, cache="none", stop_on_eos=False
        )
        assert forwards == int(output.nfe[0]) == 48
        assert torch.equal(row, output.sequences[0])


def test_demo_writes_table_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.run(tmp_path, 2, 0) == 0
    printed = capsys.readouterr().out
    facts = json.loads((tmp_path / "demo.json").read_text())
    assert demo.format_table(facts["results"], 2) in printed
    assert all(f"> {problem.prompt}" in printed for problem in held_out(2))
    assert "step   1 [" in printed
    names = [(r["cache"], r["rule"]) for r in facts["results"]]
    assert names == [("none", "one a step"), *itertools.product(demo.CACHES, demo.RULES)]
    for result in facts["results"]:
        assert len(result["seconds"]) == 2
        assert result["tokens_per_second"] == pytest.approx(result["tokens"] / sum(result["seconds"]))
    base = facts["results"][0]
    assert (base["nfe"], base["speedup"]) == (128, 1.0)
    for picture in ("demo.png", "denoising.png"):
        assert (tmp_path / picture).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_readme_shows_the_recorded_results() -> None:
    """The table in README.md is the one that the file of results gives."""
    facts = json.loads((ROOT / "benchmarks/results/demo-cpu.json").read_text())
    table = demo.format_table(facts["results"], facts["conditions"]["prompts"])
    assert table in (ROOT / "README.md").read_text()
    best = max(r["speedup"] for r in facts["results"] if r["cache"] == "dual" and "threshold" in r["rule"])
    assert best >= 10
