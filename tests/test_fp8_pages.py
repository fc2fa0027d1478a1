"""Generations whose keys and values are kept as fp8: the option of a patch, and pages that a caller gives.

The operations are tested in test_rope_write_kv.py and test_paged_attention.py, the cache in test_cache.py.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import fastdllm_ext as fd
from fastdllm_ext import whole
from fastdllm_ext.arguments import open_cache
from fastdllm_ext.patching.registry import Options, patched_family
from slow_reference import SlowModel, slow_generate
from test_generate import CACHES, random_rows, random_settings, random_tiny
from tiny import MASK, random_prompt, tiny_dream, tiny_llada

FP8 = torch.float8_e4m3fn
FAMILIES = {"llada": tiny_llada, "dream": tiny_dream}

# Sums in another order move what is quantised by some 1e-7 of it. Once in some 1e5 elements that is enough
# for the neighbouring number of e4m3, at most 1/8 away: one element of one key or value of some 50, which
# moves a logit by some hundredths at most. Where the reference decides by less, no one answer is right.
FLIP = 0.05
FLOAT32 = 1e-5  # where nothing of that happens, as in test_generate.py


def small_case(rng: random.Random, seed: int, family: str) -> tuple[Any, dict[str, Any], Any, list[int]]:
    """A model, settings, prompts and lengths: short rows, for few decisions leave room for FLIP."""
    model = random_tiny(rng, seed, family)
    settings = random_settings(rng, seed, 12, family == "dream")
    settings |= {"infill": False, "block_length": rng.choice([1, 3, 8])}
    settings.pop("cfg_scale", None)
    rows = rng.choice([1, 2])
    prompts, _ = random_rows(rng, rows, False)
    return model, settings, prompts, [rng.randint(1, 12) for _ in range(rows)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("part", range(4))
def test_token_for_token_as_the_reference_over_quantised_keys_and_values(family: str, part: int) -> None:
    """Over both runtimes, all cache modes and rules.

    And to the precision of float32 in most; while the reference without fp8 is that close in hardly any.
    """
    exact, plain, rows = 0, 0, 0
    for seed in range(12 * part, 12 * part + 12):
        for attempt in range(60):
            rng = random.Random(f"fp8 {family} {seed} {attempt}")
            model, settings, prompts, lengths = small_case(rng, seed, family)
            truth, unquantised = (
                [
                    slow_generate(model, p, gen_length=n, fp8=fp8, **settings)
                    for p, n in zip(prompts, lengths, strict=True)
                ]
                for fp8 in (True, False)
            )
            if min(row.closest for row in truth) > FLIP:
                break
        else:
            raise AssertionError("no configuration with one right answer in 60")
        for runtime in ("fused", "modules"):
            fd.patch(model, runtime=runtime, kv_cache_dtype="fp8")
            output = fd.generate(model, prompts, gen_length=lengths, **settings)
            for b, (prompt, row, other) in enumerate(zip(prompts, truth, unquantised, strict=True)):
                first, n = len(prompt), len(row.tokens)
                assert output.sequences[b, first : first + n].tolist() == row.tokens
                assert output.step_map[b, :n].tolist() == row.step_map
                assert int(output.nfe[b]) == row.nfe
                found = output.confidence[b, :n]
                torch.testing.assert_close(found, torch.tensor(row.confidence), rtol=0.1, atol=FLIP)
                rows += 1
                exact += is_close(found, row.confidence)
                plain += is_close(found, other.confidence)
    assert exact >= 0.8 * rows
    assert plain <= 0.2 * rows


def is_close(found: torch.Tensor, wanted: list[float]) -> bool:
    return torch.allclose(found, torch.tensor(wanted), rtol=10 * FLOAT32, atol=FLOAT32)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(12))
def test_a_row_is_the_same_alone_and_in_every_batch(seed: int, family: str) -> None:
    """Rows of up to 16 positions: up to 64, products of the fused runtime have the same bits in any batch."""
    rng = random.Random(f"{family} {seed}")
    model = fd.patch(random_tiny(rng, seed, family), kv_cache_dtype="fp8")
    prompts = [random_prompt(rng, 1, 7) for _ in range(4)]
    lengths = [rng.randint(1, 9) for _ in prompts]
    settings: dict[str, Any] = {
        "block_length": rng.choice([2, 4, 9]),
        "cache": CACHES[seed % 3],
        "threshold": 0.2,
    }
    together = fd.generate(model, prompts, gen_length=lengths, **settings)
    for b, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        alone = fd.generate(model, [prompt], gen_length=length, **settings)
        assert torch.equal(alone.sequences[0], together.sequences[b, : len(prompt) + length])
        assert torch.equal(alone.step_map[0], together.step_map[b, :length])
        assert torch.equal(alone.confidence[0], together.confidence[b, :length])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_pages_that_are_given_count_and_not_the_option(family: str, dtype: torch.dtype) -> None:
    model = FAMILIES[family](3, dtype)
    kv_heads = 4 if family == "llada" else 2
    own, fp8 = (fd.PagedKVCache(2, kv_heads, 8, num_pages=9, dtype=x) for x in (dtype, FP8))
    prompt, settings = torch.full((1, 20), 5), {"gen_length": 32, "steps": 32}
    plain = fd.generate(model, prompt, **settings)
    given = fd.generate(model, prompt, kv_cache=fp8, **settings)
    assert not torch.equal(given.confidence, plain.confidence)
    fd.patch(model, kv_cache_dtype="fp8")
    for found, wanted in (
        (fd.generate(model, prompt, **settings), given),
        (fd.generate(model, prompt, kv_cache=fp8, **settings), given),
        (fd.generate(model, prompt, kv_cache=own, **settings), plain),
        (fd.generate(fd.patch(model, kv_cache_dtype="auto"), prompt, **settings), plain),
    ):
        assert torch.equal(found.sequences, wanted.sequences)
        assert torch.equal(found.confidence, wanted.confidence)
    assert own.stats.num_used == fp8.stats.num_used == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_of_a_call_is_what_the_option_says(dtype: torch.dtype) -> None:
    model = tiny_llada(dtype=dtype)
    family = patched_family(model)
    geometry, parts = family.geometry(model), family.parts(model)
    found = [
        open_cache(None, geometry, lambda _: [40], parts, Options(kv_cache_dtype=choice)).dtype
        for choice in ("auto", "fp8")
    ]
    assert found == [dtype, FP8]


def test_bad_keys_become_bad_logits() -> None:
    """NaN and infinity reach the scales, and so the logits, whose check names the module."""
    for bad in (torch.nan, torch.inf):
        model = fd.patch(tiny_llada(), kv_cache_dtype="fp8")
        with torch.no_grad():
            model.model.transformer["blocks"][0].k_proj.weight[3, 5] = bad
        with pytest.raises(ValueError, match=r"NaN or infinite in rows .* first in the output of .*k_proj"):
            fd.generate(model, torch.full((1, 9), 5), gen_length=8)


@pytest.mark.parametrize("family", FAMILIES)
def test_loglikelihood_takes_the_option(family: str) -> None:
    """Of one token, that is one forward, which the slow model can do."""
    exact = 0
    for seed in range(10):
        rng = random.Random(f"{family} {seed}")
        model = fd.patch(random_tiny(rng, seed, family), kv_cache_dtype="fp8")
        prompt, answer = random_prompt(rng, 5, 40), random_prompt(rng, 1, 1)
        found = fd.loglikelihood(model, [prompt], [answer], samples=1)
        row = torch.cat((prompt, torch.tensor([MASK])))
        slow = SlowModel(model, len(row), fp8=True)
        with torch.no_grad():
            logits = slow.forward(row, torch.arange(len(row)), len(row))[len(prompt)]
        wanted = logits.log_softmax(0)[answer]
        torch.testing.assert_close(found, wanted, rtol=0, atol=FLIP)
        exact += torch.allclose(found, wanted, rtol=10 * FLOAT32, atol=10 * FLOAT32)
    assert exact >= 8


def test_layers_that_share_pages_share_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[fd.PagedKVCache] = []

    class Recorded(whole.Scratch):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(whole, "Scratch", Recorded)
    model = fd.patch(tiny_llada(n_layers=5), kv_cache_dtype="fp8")
    fd.loglikelihood(model, [torch.tensor([5, 6])], [torch.tensor([7])], samples=1)
    (cache,) = made
    assert [x.shape for x in cache.storage] == [(1, 2, 1, 4, 32, 8)]
    assert [x.shape for x in cache.scale_storage] == [(1, 2, 1, 4, 32)]
    assert [x.data_ptr() for x in cache.scales(4) if x is not None] == [
        x.data_ptr() for x in cache.scale_storage[0][0]
    ]
