from __future__ import annotations

import torch
from torch import Tensor

import fastdllm_ext as fd
from rule_cases import assert_as_stated, each_family, seeds
from slow_reference import SlowRule
from tiny import MASK, tiny_llada


class SlowCredit(SlowRule):
    def __init__(self, rule: fd.rules.Credit) -> None:
        self.rule = rule

    def begin(self) -> None:
        self.credit: dict[tuple[int, int], float] = {}  # of a token at a position
        self.closest = 1.0

    def fuse(self, position: int, logits: Tensor) -> Tensor:
        ranked = sorted((-float(x), token) for token, x in enumerate(logits) if token != MASK)
        self.closest = min(self.closest, ranked[1][0] - ranked[0][0])
        likeliest = ranked[0][1]
        p = float(torch.softmax(logits.double(), 0)[likeliest])
        for token in range(len(logits)):
            old = self.rule.beta * self.credit.get((position, token), 0.0)
            self.credit[position, token] = old + (p**self.rule.gamma if token == likeliest else 0.0)
        credit = torch.tensor([self.credit[position, token] for token in range(len(logits))]).double()
        return logits.double() + self.rule.alpha * (1 + credit).log()

    def choose(self, found: dict[int, float], logits: dict[int, Tensor]) -> tuple[set[int], float]:
        gap = min(abs(confidence - self.rule.threshold) for confidence in found.values())
        return {p for p, c in found.items() if c >= self.rule.threshold}, min(gap, self.closest)


@each_family
@seeds
def test_as_stated(seed: int, family: str) -> None:
    assert_as_stated(
        family,
        seed,
        lambda rng: fd.rules.Credit(
            rng.choice([0.1, 0.3, 0.6]),
            rng.choice([0.3, 2.0]),
            rng.choice([0.5, 1.0]),
            rng.choice([0.2, 1.5]),
        ),
        SlowCredit,
    )


def test_without_weight_it_is_threshold() -> None:
    model, prompts = tiny_llada(2), [torch.tensor([5, 6, 7]), torch.tensor([8])]
    settings = {"gen_length": 40, "block_length": 16}
    credit = fd.generate(model, prompts, rule=fd.rules.Credit(0.3, alpha=1e-30), **settings)
    threshold = fd.generate(model, prompts, threshold=0.3, **settings)
    assert torch.equal(credit.sequences, threshold.sequences)
    assert torch.equal(credit.step_map, threshold.step_map)


def test_credit_saves_forwards() -> None:
    """What the logits say again and again becomes confident."""
    prompts = [torch.tensor([5, 6, 7]), torch.tensor([8])]
    settings = {"gen_length": 40, "stop_on_eos": False}
    for seed in range(3):
        credit, threshold = (
            fd.generate(tiny_llada(seed), prompts, rule=fd.rules.Credit(0.9, alpha), **settings)
            for alpha in (5.0, 1e-30)
        )
        assert (credit.nfe < threshold.nfe).all()
