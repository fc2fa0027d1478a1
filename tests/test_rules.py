"""How rules are given, checked, written down and read again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fastdllm_ext as fd
from fastdllm_ext.rules import RULES, parse
from fastdllm_ext.rules.base import first_best
from tiny import EOS, PAD, tiny_dream, tiny_llada

ROW = torch.tensor([[4, 5, 6]])
each_rule = pytest.mark.parametrize("name", RULES)


@each_rule
def test_every_form_is_the_same_rule(name: str) -> None:
    rule = RULES[name]()
    assert parse(name) == parse(str(rule)) == parse(rule.to_dict()) == parse(rule) == rule
    assert "," not in str(rule), "lm_eval splits its model arguments there"
    assert RULES[name].__doc__


@each_rule
def test_settings_round_trip(name: str, tmp_path: Path) -> None:
    config = fd.GenerationConfig(rule=name)
    assert config.rule == RULES[name]()
    values = json.loads(json.dumps(config.to_dict()))
    assert fd.GenerationConfig.from_dict(values) == config
    config.save_pretrained(tmp_path)
    assert fd.GenerationConfig.from_pretrained(tmp_path) == config
    assert "rule" not in fd.GenerationConfig().to_dict()


def test_a_rule_replaces_another() -> None:
    config = fd.GenerationConfig(steps=4, schedule="linear")
    built = fd.GenerationConfig.build(config, {"rule": "frechet"})
    assert (built.steps, built.schedule, str(built.rule)) == (None, "even", "frechet:factor=0.75")
    back = fd.GenerationConfig.build(built, {"threshold": 0.8})
    assert (back.rule, back.threshold) == (None, 0.8)
    assert str(fd.GenerationConfig().selection) == "threshold:threshold=0.9"
    assert str(fd.GenerationConfig(steps=8).selection) == "steps:steps=8"
    assert str(fd.GenerationConfig(factor=1.0).selection) == "factor:factor=1.0"


@pytest.mark.parametrize(
    "error, message, arguments",
    [
        (ValueError, r"rule='fresh'; takes one of frechet, entropy_bound", {"rule": "fresh"}),
        (ValueError, r"takes one of frechet", {"rule": {"factor": 0.5}}),
        (TypeError, r"rule=3; takes a rule, its name", {"rule": 3}),
        (ValueError, r"rule='frechet:0.5'; takes name:parameter=value", {"rule": "frechet:0.5"}),
        (ValueError, r"each parameter once", {"rule": "frechet:factor=1:factor=2"}),
        (TypeError, r"frechet: unknown parameter 'bound'; takes factor", {"rule": "frechet:bound=1"}),
        (TypeError, r"frechet: factor='much'; takes a number above 0", {"rule": "frechet:factor=much"}),
        (ValueError, r"frechet: factor=0; takes a number above 0", {"rule": "frechet:factor=0"}),
        (ValueError, r"frechet: factor=nan", {"rule": "frechet:factor=nan"}),
        (ValueError, r"entropy_bound: bound=inf", {"rule": "entropy_bound:bound=inf"}),
        (ValueError, r"threshold=0.9, rule=frechet:factor=0.75: takes only one of",
         {"rule": "frechet", "threshold": 0.9}),
        (ValueError, r"remasking='margin': rule=frechet:factor=0.75 ranks by 'low_confidence'; takes that",
         {"rule": "frechet", "remasking": "margin"}),
        (ValueError, r"remasking='random': rule=entropy_bound:bound=0.1 ranks by 'entropy'",
         {"rule": "entropy_bound", "remasking": "random"}),
        (ValueError, r"alg_temp=0.5: is a matter of steps", {"rule": "frechet", "alg_temp": 0.5}),
    ],
)  # fmt: skip
def test_bad_rules(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        fd.generate(tiny_llada(), ROW, **arguments)


def test_dream_takes_rules_where_it_takes_thresholds() -> None:
    model = tiny_dream()
    settings: dict[str, Any] = {"max_new_tokens": 12, "rule": "frechet:factor=2"}
    ours = fd.generate(model, ROW, gen_length=12, cache="none", rule="frechet:factor=2", stop_on_eos=False)
    found = model.diffusion_generate(ROW, stop_on_eos=False, **settings)
    assert torch.equal(found, ours.sequences)
    with pytest.raises(ValueError, match=r"rule=frechet:factor=2: takes alg='confidence_threshold'"):
        model.diffusion_generate(ROW, alg="entropy", **settings)
    with pytest.raises(ValueError, match=r"rule=frechet:factor=2: takes no generation hooks"):
        model.diffusion_generate(ROW, generation_tokens_hook_func=lambda step, x, logits: x, **settings)


@each_rule
def test_a_row_ends_at_its_end_of_text(name: str) -> None:
    """With the tokens that decoding on would give, and in fewer forwards."""
    stopped = 0
    for seed in range(6):
        model = tiny_llada(seed)
        with torch.no_grad():
            model.model.transformer["ff_out"].weight[EOS] *= 2.5  # an EOS turns up early
        settings: dict[str, Any] = {"gen_length": 48, "block_length": 12, "rule": name}
        short, full = (fd.generate(model, ROW, stop_on_eos=stop, **settings) for stop in (True, False))
        end = int(short.lengths[0])
        assert end == int(full.lengths[0])
        assert torch.equal(short.sequences[0, :end], full.sequences[0, :end])
        assert (short.sequences[0, end:] == PAD).all()
        assert short.nfe <= full.nfe
        stopped += int(short.nfe < full.nfe)
    assert stopped >= 2


def test_the_first_of_the_best_in_each_group() -> None:
    score = torch.tensor([0.5, 1.0, 1.0, 0.25, 0.25, -1.0])
    group = torch.tensor([3, 3, 3, 0, 0, 1])
    assert first_best(score, group, 5).tolist() == [False, True, False, True, False, True]
