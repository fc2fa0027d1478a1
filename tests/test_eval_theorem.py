"""Theorem 1 at work, against counts by the model's own forwards, one row at a time."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdllm_ext as fd
from fastdllm_ext.eval import theorem
from test_eval_drift import SHAPE, demo_prompts, some_prompts
from test_eval_uncached import FAMILIES, slow_scores
from tiny import MASK


def sharp(family: str, seed: int, by: float) -> Any:
    """A random model that is sure of itself: its logits are multiplied."""
    model = FAMILIES[family](seed)
    head = model.lm_head if family == "dream" else model.model.transformer["ff_out"]
    with torch.no_grad():
        head.weight *= by
    return model


def slow_one_by_one(model: Any, row: Tensor, positions: list[int]) -> dict[int, int]:
    """The most confident of the positions first, then the next from the row with that token in it."""
    row, left, found = row.clone(), list(positions), {}
    while left:
        tokens, sure = slow_scores(model, row, torch.tensor(left), "low_confidence", MASK)
        best = max(range(len(left)), key=lambda i: (float(sure[i]), -i))
        found[left[best]] = int(tokens[best])
        row[left[best]] = tokens[best]
        del left[best]
    return found


def slow_theorem(model: Any, prompts: list[Tensor], cache: str, rule: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"steps": 0, "checked": []}
    for b, prompt in enumerate(prompts):
        output = fd.generate(model, [prompt], cache=cache, **SHAPE, **rule)
        step_map, answer = output.step_map[0], output.sequences[0, len(prompt) :]
        for step in range(int(output.nfe[0])):
            found["steps"] += 1
            done = (step_map == step).nonzero()[:, 0]
            if len(done) < 2:
                continue
            row = output.sequences[0].clone()
            row[len(prompt) :][step_map >= step] = MASK
            alone = slow_one_by_one(model, row, (done + len(prompt)).tolist())
            epsilon = 1 - float(output.confidence[0, done].min())
            found["checked"].append(
                {
                    "prompt": b,
                    "step": step,
                    "tokens": len(done),
                    "epsilon": epsilon,
                    "inside": (len(done) + 1) * epsilon <= 1,
                    "agree": sum(alone[i + len(prompt)] == int(answer[i]) for i in done.tolist()),
                }
            )
    return found


@pytest.mark.parametrize("cache", ["none", "dual"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rule", [{"steps": 8}, {"threshold": 0.5}, {"factor": 1.5}], ids=str)
def test_counts_are_those_of_slow_forwards(family: str, cache: str, rule: dict[str, Any]) -> None:
    model, prompts = sharp(family, 5, 3.0), some_prompts(7, 4)
    result = theorem.measure(model, prompts, caches=(cache,), max_steps=10**6, batch_size=3, **SHAPE, **rule)
    found, wanted = result["caches"][cache], slow_theorem(model, prompts, cache, rule)
    checked = sorted(found["checked"], key=lambda x: (x["prompt"], x["step"]))
    assert len(checked) == len(wanted["checked"]) > 5
    for got, should in zip(checked, wanted["checked"], strict=True):
        assert got["epsilon"] == pytest.approx(should["epsilon"], abs=1e-5)
        assert got | {"epsilon": 0} == should | {"epsilon": 0}
    assert found["steps"] == wanted["steps"]
    assert found["parallel_steps"] == len(checked)
    assert round(found["inside"][0] * len(checked)) == sum(x["inside"] for x in checked)
    for side, group in found["groups"].items():
        some = [x for x in checked if x["inside"] == (side == "inside")]
        assert group["checked"] == len(some)
        assert group["agree"] == sum(x["agree"] == x["tokens"] for x in some)
        assert group["tokens"] == sum(x["tokens"] for x in some)
        assert group["tokens_agree"] == sum(x["agree"] for x in some)
        if some:
            value, low, high = group["share"]
            assert low <= value <= high
            assert value == group["agree"] / len(some)
    assert sum(size["steps"] for size in found["by_size"]) == len(checked)
    assert any(x["agree"] < x["tokens"] for x in checked), "the check has no power"
    json.dumps(result)


@pytest.mark.parametrize("family", FAMILIES)
def test_factor_1_stays_inside(family: str) -> None:
    """The rule is the bound."""
    found = theorem.measure(sharp(family, 1, 8.0), some_prompts(2), max_steps=3, factor=1.0, **SHAPE)
    found = found["caches"]["none"]
    assert found["inside"][0] == 1
    assert found["groups"]["outside"] == {
        "checked": 0, "agree": 0, "share": None, "tokens": 0, "tokens_agree": 0,
    }  # fmt: skip
    assert found["groups"]["inside"]["checked"] == 3 < found["parallel_steps"]


def test_the_draw_is_seeded_and_of_either_side() -> None:
    model, prompts = sharp("llada", 5, 3.0), some_prompts(7)

    def run(seed: int) -> Any:
        return theorem.measure(model, prompts, max_steps=2, seed=seed, threshold=0.5, **SHAPE)["caches"]

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert [g["checked"] for g in run(1)["none"]["groups"].values()] == [2, 2]


def test_one_token_a_step_is_never_parallel() -> None:
    found = theorem.measure(FAMILIES["llada"](), some_prompts(1, 2), steps=24, **SHAPE)["caches"]["none"]
    assert (found["steps"], found["parallel_steps"], found["inside"], found["checked"]) == (48, 0, None, [])


def test_the_demo_model_within_the_bound() -> None:
    """Trained to convergence on regular answers, it is consistent enough to agree with itself there."""
    model, prompts = demo_prompts(4)
    found = theorem.measure(model, prompts, max_steps=2, gen_length=32, block_length=16, threshold=0.9)
    inside = found["caches"]["none"]["groups"]["inside"]
    assert inside["agree"] == inside["checked"] == 2


@pytest.mark.parametrize(
    "message, arguments",
    [
        ("temperature=0.5", {"temperature": 0.5}),
        ("cfg_scale=1.0", {"cfg_scale": 1.0}),
        ("remasking='margin': the theorem bounds probabilities", {"remasking": "margin"}),
        ("max_steps=0", {"max_steps": 0}),
        ("cache='none'; takes caches", {"cache": "none"}),
        ("prompts holds none", {"prompts": []}),
    ],
)
def test_bad_input(message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        theorem.measure(FAMILIES["llada"](), **{"prompts": [torch.tensor([4, 5])]} | arguments)
