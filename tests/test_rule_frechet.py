from __future__ import annotations

import torch

import fastdllm_ext as fd
from rule_cases import assert_as_stated, each_family, seeds
from tiny import tiny_llada


@each_family
@seeds
def test_as_stated(seed: int, family: str) -> None:
    assert_as_stated(
        family,
        seed,
        lambda rng: fd.rules.Frechet(rng.choice([0.3, 0.75, 1.5, 3.0])),
        lambda rule: {"frechet": rule.factor},
    )


def test_never_fewer_than_factor() -> None:
    """What the weakest token's rule allows, the whole profile allows: no step of the first is longer."""
    model, prompt = tiny_llada(3), torch.tensor([[5, 6, 7]])
    settings = {"gen_length": 64, "cache": "none", "stop_on_eos": False}
    for bound in (0.75, 1.5, 3.0):
        by_factor, by_profile = (
            fd.generate(model, prompt, **settings, **rule)
            for rule in ({"factor": bound}, {"rule": fd.rules.Frechet(bound)})
        )
        first = [(output.step_map == 0).sum() for output in (by_factor, by_profile)]
        assert first[1] >= first[0]
