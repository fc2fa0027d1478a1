from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastdllm_ext as fd
from rule_cases import assert_as_stated, each_family, seeds
from slow_reference import SlowRule
from tiny import tiny_llada


class SlowKlass(SlowRule):
    def __init__(self, rule: fd.rules.Klass) -> None:
        self.rule = rule

    def begin(self) -> None:
        self.last: dict[int, Tensor] = {}
        self.stable: dict[int, int] = {}

    def choose(self, found: dict[int, float], logits: dict[int, Tensor]) -> tuple[set[int], float]:
        chosen, gap = set(), 1.0
        for p, confidence in found.items():
            now = torch.log_softmax(logits[p].double(), 0)
            kl = float((now.exp() * (now - self.last[p])).sum()) if p in self.last else math.inf
            self.last[p] = now
            self.stable[p] = self.stable.get(p, 0) + 1 if kl <= self.rule.kl else 0
            gap = min(gap, abs(kl - self.rule.kl))
            if self.stable[p] >= self.rule.history:
                gap = min(gap, abs(confidence - self.rule.threshold))
                if confidence >= self.rule.threshold:
                    chosen.add(p)
        return chosen, gap


@each_family
@seeds
def test_as_stated(seed: int, family: str) -> None:
    assert_as_stated(
        family,
        seed,
        lambda rng: fd.rules.Klass(
            rng.choice([0.05, 0.1, 0.3]), rng.choice([0.05, 0.3, 2.0]), rng.choice([1, 1, 2])
        ),
        SlowKlass,
    )


@pytest.mark.parametrize("history", [1, 2, 3])
def test_stability_takes_as_many_steps(history: int) -> None:
    """With bounds that everything meets, one position a step, until all have been stable for long enough."""
    rule = fd.rules.Klass(threshold=1e-6, kl=1e6, history=history)
    output = fd.generate(tiny_llada(), torch.tensor([[5, 6]]), gen_length=12, rule=rule, stop_on_eos=False)
    assert torch.bincount(output.step_map[0]).tolist() == [1] * history + [12 - history]


def test_a_block_remembers_nothing_of_the_one_before() -> None:
    rule = fd.rules.Klass(threshold=1e-6, kl=1e6, history=1)
    output = fd.generate(
        tiny_llada(), torch.tensor([[5, 6]]), gen_length=12, block_length=4, rule=rule, stop_on_eos=False
    )
    assert torch.bincount(output.step_map[0]).tolist() == [1, 3, 1, 3, 1, 3]
