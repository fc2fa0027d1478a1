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
        lambda rng: fd.rules.EntropyBound(rng.choice([0.1, 1.0, 4.0, 20.0])),
        lambda rule: {"entropy_bound": rule.bound, "remasking": "entropy"},
    )


def test_confidence_is_the_negative_entropy() -> None:
    model, prompt = tiny_llada(3), torch.tensor([[5, 6, 7]])
    settings = {"gen_length": 16, "rule": "entropy_bound:bound=3", "stop_on_eos": False}
    output = fd.generate(model, prompt, **settings)
    assert (output.confidence <= 0).all()
    assert torch.equal(
        fd.generate(model, prompt, remasking="entropy", **settings).sequences, output.sequences
    )
