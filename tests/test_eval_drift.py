"""Drift against slow computations, and the steps of a decode against those that a watcher sees."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdllm_ext as fd
from fastdllm_ext.decoder import Decoder
from fastdllm_ext.decoding import GenerationConfig
from fastdllm_ext.eval import drift
from fastdllm_ext.eval.steps import taken_steps
from fastdllm_ext.generate import opened
from test_eval_uncached import FAMILIES, slow_scores
from tiny import EOS, MASK, random_prompt, random_rule

SHAPE: dict[str, Any] = {"gen_length": 24, "block_length": 8, "stop_on_eos": False}


def some_prompts(seed: int, count: int = 5) -> list[Tensor]:
    rng = random.Random(seed)
    return [random_prompt(rng, 2, 30) for _ in range(count)]


def demo_prompts(count: int) -> tuple[Any, list[Tensor]]:
    model, tokenizer = fd.load(fd.demo_model_path(), device="cpu")
    assert tokenizer is not None
    problems = ["Add 4821 and 9975.", "Reverse apple river stone candle boat drum.", "Add 88121 and 712."]
    return model, [torch.tensor(tokenizer(problem)["input_ids"]) for problem in problems[:count]]


# --- The steps of a decode -------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "settings",
    [
        {"cache": "none"}, {"cache": "dual"}, {"cache": "prefix"}, {"cache": "dual", "refresh": 2},
        {"cache": "prefix", "window": (2, 2), "suffix": 4},
        {"cache": "dual", "eos_token_id": list(range(2, 20))},
    ],
    ids=str,
)  # fmt: skip
def test_steps_are_those_that_a_watcher_sees(family: str, settings: dict[str, Any]) -> None:
    """Rows before each turn, told from the finished ones, with an early end of rows among them."""
    rng = random.Random(f"{family} {settings}")
    model, prompts = FAMILIES[family](3), some_prompts(4)
    rule = random_rule(rng, 24)
    config = GenerationConfig(**SHAPE | {"stop_on_eos": "eos_token_id" in settings} | settings | rule)
    seen: dict[tuple[int, int], dict[str, Any]] = {}
    with opened(Decoder, model, prompts, None, config) as decoder:
        refreshed_at = [0] * len(prompts)
        while any(not row.done for row in decoder.rows):
            before = decoder.tokens.clone()
            at = [replace(row) for row in decoder.rows]
            for row in decoder.turn():
                b, old = row.index, at[row.index]
                step = old.next_step(decoder.family.shift)
                if step.is_refresh:
                    refreshed_at[b] = old.nfe
                changed = (before[b] != decoder.tokens[b]).nonzero()[:, 0]
                low, high = step.candidates
                seen[b, old.nfe] = {
                    "row": before[b, : row.end],
                    "masks": (before[b, low:high] == MASK).nonzero()[:, 0] + low,
                    "committed": changed,
                    "tokens": decoder.tokens[b, changed],
                    "confidence": decoder.confidence[b, changed],
                    "block": old.block,
                    "since_refresh": old.nfe - refreshed_at[b],
                }
    found = taken_steps(model, prompts, config, batch_size=2)
    assert [(s.prompt, s.number) for s in found] == sorted(seen)
    for step in found:
        for name, value in seen[step.prompt, step.number].items():
            got = getattr(step, name)
            if name == "confidence":  # batches of another size add up in another order
                torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-5)
            else:
                assert torch.equal(torch.as_tensor(got), torch.as_tensor(value)), name
        assert not (step.row == MASK)[torch.arange(len(step.row)) < len(prompts[step.prompt])].any()


def test_steps_of_an_infill() -> None:
    """Given tokens between the masks stay in every row."""
    row = torch.tensor([4, MASK, 6, MASK, MASK, 9, MASK, 5])
    steps = taken_steps(FAMILIES["llada"](), [row], GenerationConfig(infill=True, steps=4, block_length=4), 1)
    assert torch.equal(steps[0].row, row)
    for before, after in pairwise(steps):
        assert torch.equal(before.row.index_put((before.committed,), before.tokens), after.row)
    assert sum(len(step.committed) for step in steps) == 4


# --- Drift -----------------------------------------------------------------------------------------


def slow_selected(confidence: list[float], rule: dict[str, Any], count: int) -> set[int]:
    order = sorted(range(len(confidence)), key=lambda i: (-confidence[i], i))
    if "threshold" in rule:
        return {i for i in order if confidence[i] >= rule["threshold"]} | {order[0]}
    if "factor" in rule:
        sizes = [n for n, i in enumerate(order, 1) if (n + 1) * (1 - confidence[i]) <= rule["factor"]]
        return set(order[: max([1, *sizes])])
    return set(order[:count])


def slow_drift(model: Any, prompts: list[Tensor], cache: str, rule: dict[str, Any]) -> dict[str, Any]:
    """All block steps: rows from the step map, what the model's own forward says, and the rules anew."""
    found: dict[str, Any] = {
        "tokens": Counter(),
        "other": Counter(),
        "unselected": Counter(),
        "difference": [],
    }
    shift = model.config.model_type.lower() == "dream"
    for prompt in prompts:
        output = fd.generate(model, [prompt], cache=cache, **SHAPE, **rule)
        step_map, first = output.step_map[0], len(prompt)
        for k in range(0, 24, 8):
            steps = sorted(set(step_map[k : k + 8].tolist()))
            for since, step in enumerate(steps[1:], start=1):
                row = output.sequences[0].clone()
                row[first:][step_map >= step] = MASK
                assert not shift or row[first + k] != MASK  # which the refresh has filled
                masks = (row[first + k : first + k + 8] == MASK).nonzero()[:, 0] + first + k
                tokens, sure = slow_scores(model, row, masks, "low_confidence", MASK)
                done = [i for i, p in enumerate(masks.tolist()) if step_map[p - first] == step]
                chosen = slow_selected(sure.tolist(), rule, len(done))
                for i in done:
                    at = int(masks[i])
                    found["tokens"][since] += 1
                    found["other"][since] += int(output.sequences[0, at] != tokens[i])
                    found["unselected"][since] += i not in chosen
                    found["difference"].append(float(output.confidence[0, at - first] - sure[i]))
    return found


@pytest.mark.parametrize("cache", ["dual", "prefix"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rule", [{"steps": 12}, {"threshold": 0.2}, {"factor": 3.0}], ids=str)
def test_a_slow_computation_finds_the_same(family: str, cache: str, rule: dict[str, Any]) -> None:
    model, prompts = FAMILIES[family](5), some_prompts(6)
    result = drift.measure(model, prompts, caches=(cache,), max_steps=10**6, batch_size=3, **SHAPE, **rule)
    found, wanted = result["caches"][cache], slow_drift(model, prompts, cache, rule)
    tokens = found["all"]["tokens"]
    assert tokens == sum(wanted["tokens"].values()) > 20
    assert round(found["all"]["other_token"][0] * tokens) == sum(wanted["other"].values()) > 0
    assert round(found["all"]["not_selected"][0] * tokens) == sum(wanted["unselected"].values())
    values = torch.tensor(wanted["difference"])
    difference = found["all"]["confidence_difference"]
    assert difference["mean"] == pytest.approx(float(values.mean()), abs=1e-5)
    assert difference["mean_absolute"] == pytest.approx(float(values.abs().mean()), abs=1e-5)
    assert difference["quantiles"]["0.95"] == pytest.approx(float(values.quantile(0.95)), abs=1e-4)
    for group in found["by_since_refresh"]:
        inside = range(group["from"], group["to"] + 1)
        assert group["tokens"] == sum(wanted["tokens"][i] for i in inside)
        assert round(group["other_token"][0] * group["tokens"]) == sum(wanted["other"][i] for i in inside)
    for key in ("by_since_refresh", "by_block"):
        assert sum(group["tokens"] for group in found[key]) == tokens
    assert [group["from"] for group in found["by_block"]] == [0, 1, 2]
    json.dumps(result)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rule", [{"steps": 24}, {"threshold": 0.2}, {"factor": 3.0}], ids=str)
def test_without_a_cache_there_is_none(family: str, rule: dict[str, Any]) -> None:
    """Every step is a refresh, and the uncached model does what it did, to the last bits of a confidence."""
    result = drift.measure(
        FAMILIES[family](5), some_prompts(6), caches=("none",), max_steps=10**6, batch_size=3, **SHAPE, **rule
    )
    found = result["caches"]["none"]
    assert found["steps"]["block_step"] == 0
    assert found["all"] is None
    assert found["by_since_refresh"] == []
    group = found["refreshes"]
    assert group["steps"] == found["steps"]["refresh"]
    assert (group["other_token"][0], group["not_selected"][0]) == (0, 0)
    assert group["selected_uncached"] == group["tokens"] == 5 * 24
    assert group["confidence_difference"]["mean_absolute"] < 1e-6


def test_the_demo_model_one_token_a_step() -> None:
    """A trained model's drift is small, is there, and refreshes have none."""
    model, prompts = demo_prompts(2)
    settings: dict[str, Any] = {"gen_length": 32, "block_length": 32, "steps": 32, "batch_size": 2}
    result = drift.measure(model, prompts, name="demo", max_steps=20, **settings)
    assert (result["model"], result["conditions"]["rule"]) == ("demo", "one a step")
    for found in result["caches"].values():
        assert found["all"]["steps"] == 20 < found["steps"]["block_step"]
        assert found["all"]["other_token"][0] < 0.1
        assert 0 < found["all"]["confidence_difference"]["mean_absolute"] < 0.05
        assert found["refreshes"]["confidence_difference"]["mean_absolute"] < 1e-6


def test_the_draw_is_seeded() -> None:
    model, prompts = FAMILIES["llada"](), some_prompts(1)

    def run(seed: int, **more: Any) -> Any:
        return drift.measure(model, prompts, max_steps=9, seed=seed, steps=24, **SHAPE, **more)["caches"]

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert run(1)["dual"]["all"]["steps"] == 9
    assert run(1)["dual"]["refreshes"]["steps"] == 1


def test_bins() -> None:
    assert [drift._bin(i) for i in (1, 2, 3, 4, 5, 8, 9, 16, 17)] == [
        (1, 1), (2, 2), (3, 4), (3, 4), (5, 8), (5, 8), (9, 16), (9, 16), (17, 32)
    ]  # fmt: skip


def test_a_mask_of_another_id_and_another_confidence() -> None:
    """The settings' own mask token and ranking are those of the uncached model too."""
    prompts = [torch.tensor([4, 5, 6, 7])]
    more: dict[str, Any] = {"mask_token_id": 9, "remasking": "margin", "threshold": 0.05}
    model = FAMILIES["dream"](2)
    with torch.no_grad():
        model.lm_head.weight[9] *= 4  # often the likeliest of all
    found = drift.measure(model, prompts, caches=("none",), max_steps=1000, **SHAPE, **more)
    group = found["caches"]["none"]["refreshes"]
    assert (group["other_token"][0], group["not_selected"][0], group["tokens"]) == (0, 0, 24)
    assert group["confidence_difference"]["mean_absolute"] < 1e-6


@pytest.mark.parametrize(
    "message, arguments",
    [
        ("temperature=0.5", {"temperature": 0.5}),
        ("alg_temp=0.5", {"alg_temp": 0.5, "steps": 8}),
        ("cfg_scale=1.0", {"cfg_scale": 1.0}),
        ("top_k=3", {"top_k": 3}),
        ("remasking='random'", {"remasking": "random"}),
        ("max_steps=0", {"max_steps": 0}),
        ("cache='dual'; takes caches", {"cache": "dual"}),
        ("prompts holds none", {"prompts": []}),
    ],
)
def test_bad_input(message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        drift.measure(FAMILIES["dream"](), **{"prompts": [torch.tensor([EOS, 5])]} | arguments)
