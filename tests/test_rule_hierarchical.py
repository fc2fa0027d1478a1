from __future__ import annotations

import torch
from torch import Tensor

import fastdllm_ext as fd
from rule_cases import assert_as_stated, each_family, seeds
from slow_reference import SlowRule
from tiny import MASK, tiny_llada


class SlowHierarchical(SlowRule):
    def __init__(self, rule: fd.rules.Hierarchical) -> None:
        self.rule = rule

    def choose(self, found: dict[int, float], logits: dict[int, Tensor]) -> tuple[set[int], float]:
        runs: list[list[int]] = []
        for p in sorted(found):
            if runs and runs[-1][-1] == p - 1:
                runs[-1].append(p)
            else:
                runs.append([p])
        chosen = {p for p, c in found.items() if c >= self.rule.threshold}
        gaps = [abs(c - bound) for c in found.values() for bound in (self.rule.threshold, self.rule.low)]
        for run in runs:
            best, *others = sorted((-found[p], p) for p in run)
            if -best[0] >= self.rule.low:
                chosen.add(best[1])
            gaps += [x[0] - best[0] for x in others[:1] if x[0] != best[0]]
        return chosen, min(gaps)


@each_family
@seeds
def test_as_stated(seed: int, family: str) -> None:
    assert_as_stated(
        family,
        seed,
        lambda rng: fd.rules.Hierarchical(rng.choice([0.2, 0.5, 1.0]), rng.choice([1e-6, 0.05, 0.1, 0.3])),
        SlowHierarchical,
    )


def test_one_of_each_run_of_masks() -> None:
    """Given tokens divide the masks into three runs, and every position that is filled divides its run."""
    row = torch.tensor([[4, MASK, MASK, MASK, 5, MASK, 6, MASK, MASK, MASK, MASK, MASK]])
    output = fd.generate(tiny_llada(), row, infill=True, rule="hierarchical:threshold=1.0:low=1e-6")
    first = (output.step_map[0] == 0).tolist()
    assert [sum(first[0:3]), first[4], sum(first[6:11])] == [1, True, 1]
    assert int(output.nfe[0]) <= 5
