"""A rule of ``fd.rules`` on small random models, against its statement in plain Python."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

import fastdllm_ext as fd
from slow_reference import SlowRule, slow_generate
from test_generate import assert_row, error_of, random_rows, random_settings, random_tiny
from tiny import MASK

each_family = pytest.mark.parametrize("family", ["llada", "dream"])
seeds = pytest.mark.parametrize("seed", range(6))  # every cache mode twice


def settings_without_rule(rng: random.Random, seed: int, gen_length: int, shifts: bool) -> dict[str, Any]:
    settings = random_settings(rng, seed, gen_length, shifts)
    for name in ("steps", "threshold", "factor", "schedule", "eps", "remasking"):
        settings.pop(name, None)
    return settings


def assert_as_stated(
    family: str,
    seed: int,
    draw: Callable[[random.Random], fd.rules.Rule],
    state: Callable[[Any], dict[str, Any] | SlowRule],
) -> None:
    """Token for token, for every row, and with the same bits for a row alone.

    ``state`` says the rule that ``draw`` has drawn in the words of `slow_generate`.
    """
    for attempt in range(30):
        rng = random.Random(f"{family} {seed} {attempt}")
        model, rule = random_tiny(rng, seed, family), draw(rng)
        settings = settings_without_rule(rng, seed, 70, family == "dream")
        if rule.verifies:
            settings.pop("cfg_scale", None)
        prompts, lengths = random_rows(rng, rng.choice([1, 2, 3]), settings["infill"])
        lengths = [min(length, 24) for length in lengths]
        truth = []
        for prompt, length in zip(prompts, lengths, strict=True):
            stated = state(rule)
            words = {"slow_rule": stated} if isinstance(stated, SlowRule) else stated
            truth.append(slow_generate(model, prompt, gen_length=length, **settings, **words))
        if min(row.closest for row in truth) > error_of(settings):
            break
    else:
        raise AssertionError("no configuration with one right answer in 30")

    def count(lengths: list[int]) -> dict[str, Any]:
        return {} if settings["infill"] else {"gen_length": lengths}

    for runtime in ("fused", "modules"):
        fd.patch(model, runtime=runtime)
        output = fd.generate(model, prompts, rule=rule, **settings, **count(lengths))
        for b, (prompt, row) in enumerate(zip(prompts, truth, strict=True)):
            assert_row(output, b, prompt, row, error_of(settings))
        assert not (output.sequences == MASK).any()
    assert_batch_invariant(model, prompts, lengths, rule=rule, **settings)


def assert_batch_invariant(model: Any, prompts: list, lengths: list[int], **settings: Any) -> None:
    """Each row has the bits that it has alone, what is drawn included."""

    def generate(rows: list[int]) -> fd.GenerationOutput:
        count = {} if settings["infill"] else {"gen_length": [lengths[b] for b in rows]}
        return fd.generate(
            model, [prompts[b] for b in rows], **settings, **count, seed=[40 + b for b in rows]
        )

    settings |= {"temperature": 0.7}
    together = generate(list(range(len(prompts))))
    for b in range(len(prompts)):
        alone = generate([b])
        end = int(alone.lengths[0])
        assert together.sequences[b, :end].tolist() == alone.sequences[0, :end].tolist()
        assert int(together.nfe[b]) == int(alone.nfe[0])
        width = alone.step_map.shape[1]
        assert together.step_map[b, :width].tolist() == alone.step_map[0].tolist()
