"""Dream's published call, over the same loop as ``generate``."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

import fastdllm_ext as fd
from fastdllm_ext.diffusion_generate import DreamModelOutput
from fastdllm_ext.rows import TimeSteps
from tiny import MASK, PAD, VOCAB, tiny_dream, tiny_llada

PROMPT = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


@pytest.mark.parametrize(
    "published, ours",
    [
        ({"alg": "maskgit_plus", "steps": 9}, {"steps": 9, "schedule": "linear"}),
        ({"alg": "topk_margin", "steps": 9}, {"steps": 9, "schedule": "linear", "remasking": "margin"}),
        (
            {"alg": "entropy", "steps": 9, "eps": 0.1, "top_p": 0.9},
            {"steps": 9, "schedule": "linear", "remasking": "entropy", "eps": 0.1, "top_p": 0.9},
        ),
        (
            {"alg": "entropy", "steps": 9, "alg_temp": 0.3, "temperature": 0.7, "top_k": 9},
            {"steps": 9, "schedule": "linear", "remasking": "entropy", "alg_temp": 0.3, "temperature": 0.7}
            | {"top_k": 9},
        ),
        ({"alg": "origin", "steps": 9}, {"steps": 9, "schedule": "independent", "remasking": "random"}),
        ({"steps": 9}, {"steps": 9, "schedule": "independent", "remasking": "random"}),
    ],
)
@pytest.mark.parametrize("cached", [False, True])
def test_algorithms(published: dict[str, Any], ours: dict[str, Any], cached: bool) -> None:
    """Uncached, the whole answer is one block; cached, 32 positions are (here 8)."""
    model = tiny_dream()
    where = {"cache": "dual", "block_length": 8} if cached else {}
    mine = {"cache": "dual", "block_length": 8} if cached else {"cache": "none", "block_length": 20}
    found = model.diffusion_generate(PROMPT, max_new_tokens=20, seed=3, **published, **where)
    output = fd.generate(model, PROMPT, gen_length=20, seed=3, **ours, **mine)
    assert isinstance(found, torch.Tensor)
    assert torch.equal(found, output.sequences)


@pytest.mark.parametrize("rule", [{"threshold": 0.2}, {"factor": 2.0}, {"alg": "confidence_threshold"}])
@pytest.mark.parametrize(
    "where, cache", [({"dual_cache": True}, "dual"), ({"dual_cache": False}, "prefix"), ({}, "none")]
)
def test_confidence_threshold(rule: dict[str, Any], where: dict[str, Any], cache: str) -> None:
    """A threshold or factor asks for it by itself; callers pass ``steps`` along, which plays no part."""
    model = tiny_dream()
    found = model.diffusion_generate(PROMPT, max_new_tokens=40, steps=40, **rule, **where)
    bound = {k: v for k, v in rule.items() if k != "alg"}
    assert torch.equal(found, fd.generate(model, PROMPT, gen_length=40, cache=cache, **bound).sequences)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_stays_where_it_was(side: str) -> None:
    model = tiny_dream()
    rows = [torch.tensor([5, 6, 7, 8, 9]), torch.tensor([11, 12])]
    padding = torch.tensor([PAD] * 3)
    ids = torch.stack([rows[0], torch.cat((padding, rows[1]) if side == "left" else (rows[1], padding))])
    settings: dict[str, Any] = {
        "alg": "entropy",
        "steps": 12,
        "max_new_tokens": 12,
        "return_dict_in_generate": True,
    }
    output = model.diffusion_generate(ids, attention_mask=ids != PAD, output_history=True, **settings)
    assert output.sequences.shape == (2, 17)
    assert torch.equal(output.sequences[:, :5], ids)
    for b, row in enumerate(rows):
        alone = model.diffusion_generate(row[None], **settings)
        assert torch.equal(output.sequences[b, 5:], alone.sequences[0, len(row) :])
    assert torch.equal(output.history[-1], output.sequences)


def test_history_is_the_row_after_every_forward() -> None:
    model = tiny_dream(2)
    seen: list[torch.Tensor] = []

    def watch(step: int | None, x: torch.Tensor, logits: torch.Tensor | None) -> torch.Tensor:
        assert (step is None) == (logits is None)
        assert step is None or (step == len(seen) - 1 and logits.shape == (2, 24, VOCAB))
        seen.append(x.clone())
        return x

    settings: dict[str, Any] = {
        "max_new_tokens": 20, "alg": "entropy", "steps": 7, "stop_on_eos": False,
        "return_dict_in_generate": True, "output_history": True,
    }  # fmt: skip
    output = model.diffusion_generate(PROMPT, generation_tokens_hook_func=watch, **settings)
    assert isinstance(output, DreamModelOutput)
    assert (seen[0][:, 4:] == MASK).all()
    assert len(output.history) == len(seen) - 1 == int(output.details.nfe.max()) == 7
    assert all(torch.equal(a, b) for a, b in zip(output.history, seen[1:], strict=True))
    assert torch.equal(model.diffusion_generate(PROMPT, **settings).sequences, output.sequences)
    assert model.diffusion_generate(PROMPT, **settings | {"output_history": False}).history is None


def test_history_fills_what_lies_behind_an_eos_last() -> None:
    model = tiny_dream()
    settings: dict[str, Any] = {"max_new_tokens": 30, "alg": "entropy", "steps": 30, "dual_cache": True}
    end = int(model.diffusion_generate(PROMPT, **settings)[0, 15])
    output = model.diffusion_generate(
        PROMPT, return_dict_in_generate=True, output_history=True, eos_token_id=end, **settings
    )
    assert output.details.lengths[0] <= 16, "this row ends early"
    assert torch.equal(output.history[-1], output.sequences)
    for before, after in zip(output.history, output.history[1:], strict=False):
        assert ((before == after) | (before == MASK)).all()


def test_hooks_edit_logits_and_tokens() -> None:
    model = tiny_dream()
    settings: dict[str, Any] = {"max_new_tokens": 16, "alg": "maskgit_plus", "steps": 8, "stop_on_eos": False}
    plain = model.diffusion_generate(PROMPT, **settings)
    favourite = int(plain[0, 4:].mode().values)

    def same(step: int, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        whole = model(x).logits
        shifted = torch.cat((whole[:, :1], whole[:, :-1]), 1)
        torch.testing.assert_close(logits, shifted, rtol=1e-4, atol=1e-4)  # sums of float32 in another order
        return logits

    assert torch.equal(model.diffusion_generate(PROMPT, generation_logits_hook_func=same, **settings), plain)

    def never(step: int, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        logits[..., favourite] = -math.inf
        return logits

    without = model.diffusion_generate(PROMPT, generation_logits_hook_func=never, **settings)
    assert favourite in plain[:, 4:]
    assert favourite not in without[:, 4:]

    def pinned(step: int | None, x: torch.Tensor, logits: torch.Tensor | None) -> torch.Tensor:
        x[:, 10] = 33
        return x

    fixed = model.diffusion_generate(PROMPT, generation_tokens_hook_func=pinned, **settings)
    assert (fixed[:, 10] == 33).all()
    assert not (fixed == MASK).any()

    def remasked(step: int | None, x: torch.Tensor, logits: torch.Tensor | None) -> torch.Tensor:
        x[:, 4] = MASK if step == 2 else x[:, 4]
        return x

    masked_again: list[int] = []

    def watch(step: int, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        if bool((x[:, 4] == MASK).all()):
            masked_again.append(step)
        return logits

    again = model.diffusion_generate(
        PROMPT, generation_tokens_hook_func=remasked, generation_logits_hook_func=watch, **settings
    )
    assert 3 in masked_again, "the step after sees the mask"
    assert not (again == MASK).any()


@pytest.mark.parametrize(
    "arguments, length",
    [
        ({}, 24), ({"max_new_tokens": 7}, 11), ({"max_length": 13}, 13), ({"max_length": 20}, 20),
        ({"max_new_tokens": 3, "max_length": 50}, 7),
    ],
)  # fmt: skip
def test_length(arguments: dict[str, int], length: int) -> None:
    """As published: the default ``max_length`` of 20 leaves the prompt out, a given one counts it."""
    found = tiny_dream().diffusion_generate(PROMPT, steps=4, alg="entropy", **arguments)
    assert found.shape == (2, length)


def test_several_sequences_a_prompt() -> None:
    model = tiny_dream()
    found = model.diffusion_generate(
        PROMPT, num_return_sequences=3, max_new_tokens=30, steps=30, alg="entropy", temperature=1.5, seed=1
    )
    assert found.shape == (6, 34)
    assert torch.equal(found[:, :4], PROMPT.repeat_interleave(3, 0))
    assert len({tuple(row.tolist()) for row in found[:3]}) > 1


@pytest.mark.parametrize("as_attribute", [False, True])
@pytest.mark.parametrize("kind", ["theirs", "dream"])
def test_generation_config(kind: str, as_attribute: bool) -> None:
    """The argument or the model's own; keyword arguments win; HuggingFace's own defaults do not count."""
    model = tiny_dream()
    values: dict[str, Any] = {"alg": "topk_margin", "steps": 6, "eps": 0.2, "max_new_tokens": 12}
    config: Any = transformers.GenerationConfig(**values) if kind == "theirs" else SimpleNamespace(**values)
    if as_attribute:
        model.generation_config = config
    given = () if as_attribute else (config,)
    assert torch.equal(model.diffusion_generate(PROMPT, *given), model.diffusion_generate(PROMPT, **values))
    assert model.diffusion_generate(PROMPT, *given, max_new_tokens=5).shape == (2, 9)


def test_token_ids_can_be_given() -> None:
    model = tiny_dream()
    settings: dict[str, Any] = {"alg": "entropy", "steps": 20, "max_new_tokens": 20}
    found = model.diffusion_generate(PROMPT, mask_token_id=40, **settings)
    assert not (found == 40).any()
    free = model.diffusion_generate(PROMPT, stop_on_eos=False, **settings)
    last = int(free[0, 14])
    stopped = model.diffusion_generate(PROMPT, eos_token_id=[last], pad_token_id=2, **settings)
    end = 4 + free[0, 4:].tolist().index(last)
    assert stopped[0, : end + 1].tolist() == free[0, : end + 1].tolist()
    assert (stopped[0, end + 1 :] == 2).all()


@pytest.mark.parametrize("steps, masks", [(1, 5), (4, 4), (4, 40), (50, 10), (64, 64)])
def test_time_steps_fill_everything(steps: int, masks: int) -> None:
    left, times, quotas = masks, TimeSteps(steps, 1e-3, None), []
    while left > 0:
        quotas.append(times.quota(left, left))
        left -= quotas[-1]
    assert left == 0
    assert min(quotas) >= 1
    assert len(quotas) <= steps


def test_time_steps_share_what_a_hook_masks_again() -> None:
    came: list[int] = []
    went: list[int] = []

    def again(step: int | None, x: torch.Tensor, logits: torch.Tensor | None) -> torch.Tensor:
        came.append(int((x == MASK).sum()))
        if step in (0, 2):
            x[0, 5:15] = MASK
        went.append(int((x == MASK).sum()))
        return x

    tiny_dream().diffusion_generate(
        PROMPT[:1], alg="maskgit_plus", steps=6, max_new_tokens=30, generation_tokens_hook_func=again
    )
    times = TimeSteps(6, 1e-3, None)
    assert came[1:] == [left - times.quota(left, left) for left in went[:-1]]
    assert came[-1] == 0
    assert went != came


def test_origin_frees_each_mask_by_chance() -> None:
    """Four steps from t = 1 to 0.1: of 40 masks, the first frees (1 - 0.1) / 4, which is 9 on average."""
    model, first = tiny_dream(), []
    for seed in range(60):
        output = fd.generate(
            model, PROMPT[:1], gen_length=40, block_length=40, cache="none", stop_on_eos=False, seed=seed,
            steps=4, eps=0.1, schedule="independent", remasking="random",
        )  # fmt: skip
        assert int(output.nfe) <= 4
        first.append(int((output.step_map == 0).sum()))
    share = 0.9 / 4
    deviation = math.sqrt(40 * share * (1 - share) / len(first))  # of the mean of 60 binomial numbers
    assert abs(sum(first) / len(first) - 40 * share) < 4 * deviation
    spread = torch.tensor(first, dtype=torch.float32).var()
    # The variance of a sample of 60 deviates by about sqrt(2 / 59) = 18% of itself.
    assert 0.3 < float(spread) / (40 * share * (1 - share)) < 1.7


@pytest.mark.parametrize(
    "error, message, arguments",
    [
        (ValueError, r"alg='greedy'; takes one of origin, maskgit_plus, topk_margin", {"alg": "greedy"}),
        (ValueError, r"threshold=0.9: takes alg='confidence_threshold', got 'entropy'",
         {"alg": "entropy", "threshold": 0.9}),
        (ValueError, r"dual_cache=True, cache='none': takes only one", {"dual_cache": True, "cache": "none"}),
        (ValueError, r"generation hooks: takes cache='none' and one block, got cache='dual'",
         {"generation_tokens_hook_func": lambda i, x, l: x, "cache": "dual"}),
        (ValueError, r"cfg_scale=1.0: takes no generation hooks",
         {"generation_logits_hook_func": lambda i, x, l: l, "cfg_scale": 1.0}),
        (ValueError, r"max_length=4: takes more than the prompt's 4 tokens", {"max_length": 4}),
        (ValueError, r"max_new_tokens=0; takes 1 or more", {"max_new_tokens": 0}),
        (TypeError, r"max_new_tokens=2.5; takes an int", {"max_new_tokens": 2.5}),
        (ValueError, r"mask_token_id=64; takes 0 to 63", {"mask_token_id": 64}),
        (ValueError, r"eos_token_id=99; takes 0 to 63", {"eos_token_id": [1, 99]}),
        (TypeError, r"unknown argument 'gen_length'; takes alg, alg_temp", {"gen_length": 4}),
        (TypeError, r"unknown argument 'treshold'", {"treshold": 0.9}),
        (ValueError, r"inputs=NoneType; takes a \[B, P\]", {"inputs": None}),
        (ValueError, r"inputs=tensor of shape \[4\]", {"inputs": PROMPT[0]}),
        (ValueError, r"top_p=0; takes a number above 0", {"top_p": 0}),
        (ValueError, r"num_return_sequences=0; takes 1 or more", {"num_return_sequences": 0}),
    ],
)  # fmt: skip
def test_bad_input(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    model = tiny_dream()
    with pytest.raises(error, match=message):
        model.diffusion_generate(**({"inputs": PROMPT} | arguments))
    assert model.diffusion_generate(PROMPT, max_new_tokens=4, steps=2).shape == (2, 8)


def test_an_error_in_the_first_hook_gives_the_pages_back() -> None:
    model, cache = tiny_dream(), fd.PagedKVCache(2, 2, 8, num_pages=9)

    def broken(step: int | None, x: torch.Tensor, logits: torch.Tensor | None) -> torch.Tensor:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        model.diffusion_generate(PROMPT, steps=4, generation_tokens_hook_func=broken, kv_cache=cache)
    assert cache.stats.num_used == 0


def test_llada_has_no_such_method() -> None:
    assert not hasattr(tiny_llada(), "diffusion_generate")
