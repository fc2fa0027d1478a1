"""What the uncached model says of a row, against the model's own forward."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdllm_ext as fd
from fastdllm_ext.eval import uncached
from fastdllm_ext.eval.uncached import score_rows
from tiny import MASK, random_prompt, random_shape, tiny_dream, tiny_llada

FAMILIES = {"llada": tiny_llada, "dream": tiny_dream}
ERROR = 1e-5  # of a probability in float32: logits of size 10 carry some 1e-6 of that


@torch.no_grad()
def slow_logits(model: Any, row: Tensor) -> Tensor:
    """[P, vocab] float64: those of position i, by the model's own forward. Dream has none of position 0."""
    logits = model(row[None]).logits[0].double()
    return logits.roll(1, 0) if model.config.model_type.lower() == "dream" else logits


def slow_scores(
    model: Any, row: Tensor, positions: Tensor, remasking: str, mask_id: int
) -> tuple[Tensor, Tensor]:
    logits = slow_logits(model, row)[positions]
    p = logits.softmax(-1)
    logits[:, mask_id] = -torch.inf
    tokens = logits.argmax(-1)
    if remasking == "entropy":
        return tokens, (p * p.log()).sum(-1)
    if remasking == "margin":
        p[:, mask_id] = 0
        first, second = p.topk(2).values.T
        return tokens, first - second
    return tokens, p.gather(1, tokens[:, None])[:, 0]


def masked_row(rng: random.Random, low: int = 2) -> Tensor:
    row = random_prompt(rng, low, 60)
    row[torch.rand(len(row)) < 0.4] = MASK
    return row


@pytest.mark.parametrize("remasking", ["low_confidence", "margin", "entropy"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(4))
def test_the_models_own_forward_says_the_same(
    monkeypatch: pytest.MonkeyPatch, seed: int, family: str, remasking: str
) -> None:
    """Random shapes and rows of unequal lengths, some of which ask for nothing; the head in small parts."""
    monkeypatch.setattr(uncached, "HEAD_ROWS", 7)
    rng = random.Random(f"{family} {seed}")
    model = FAMILIES[family](seed, **random_shape(rng, family))
    rows = [masked_row(rng) for _ in range(7)]
    positions = [torch.tensor(sorted(rng.sample(range(1, len(r)), rng.randint(0, len(r) - 1)))) for r in rows]
    positions = [where.long() for where in positions]
    mask_id = rng.choice([MASK, 9])
    found = score_rows(model, rows, positions, rng.choice([1, 3, 16]), mask_id=mask_id, remasking=remasking)
    assert len(found) == len(rows)
    for row, where, (tokens, confidence) in zip(rows, positions, found, strict=True):
        wanted, sure = slow_scores(model, row, where, remasking, mask_id)
        assert torch.equal(tokens, wanted)
        assert (confidence - sure).abs().max() < 10 * ERROR if len(where) else len(confidence) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mask_is_never_the_candidate_but_has_its_share(family: str) -> None:
    """A head that prefers the mask everywhere."""
    model = FAMILIES[family]()
    head = model.lm_head if family == "dream" else model.model.transformer["ff_out"]
    row = torch.tensor([4, 5, 6, MASK, MASK, 7, MASK])
    where = torch.arange(1, 7)
    with torch.no_grad():
        head.weight[MASK] = 1.5 * head.weight[score_rows(model, [row], [where], 1)[0].tokens[2]]
    assert (slow_logits(model, row)[where].argmax(-1) == MASK).any(), "the check has no power"
    ((tokens, confidence),) = score_rows(model, [row], [where], 1)
    wanted, sure = slow_scores(model, row, where, "low_confidence", MASK)
    assert torch.equal(tokens, wanted)
    assert (confidence - sure).abs().max() < ERROR


def test_rows_share_forwards_and_the_first_position() -> None:
    """Batches of batch_size rows; LLaDA reads position 0 as any other."""
    model, tokens, shown = tiny_llada(), [], []
    handle = model.model.transformer["wte"].register_forward_hook(
        lambda _module, inputs, _out: tokens.append(inputs[0].numel())
    )

    def progress(batches: Any) -> Any:
        shown.append(len(batches))
        return batches

    row = torch.tensor([MASK, 5, 6])
    found = score_rows(model, [row] * 5, [torch.tensor([0])] * 5, 2, progress=progress)
    handle.remove()
    assert tokens == [6, 6, 3]
    assert shown == [3]
    assert {int(x.tokens) for x in found} == set(
        slow_scores(model, row, torch.tensor([0]), "low_confidence", MASK)[0].tolist()
    )
    assert score_rows(model, [], [], 2) == []


def test_bad_input() -> None:
    model, row = tiny_llada(), torch.tensor([4, MASK, 5])
    where = torch.tensor([1])
    for message, arguments in (
        (r"batch_size=0; takes 1 or more", {"batch_size": 0}),
        (r"remasking='random'", {"remasking": "random"}),
        (r"positions\[0\] lie outside of 0 to 2", {"positions": [torch.tensor([3])]}),
    ):
        with pytest.raises(ValueError, match=message):
            score_rows(model, **{"rows": [row], "positions": [where], "batch_size": 1} | arguments)
    with pytest.raises(ValueError, match=r"positions\[0\] lie outside of 1 to 2"):
        score_rows(tiny_dream(), [row], [torch.tensor([0])], 1)
    with pytest.raises(ValueError, match="is not patched"):
        score_rows(tiny_llada(patched=False), [row], [where], 1)
    with torch.no_grad():
        model.model.transformer["wte"].weight[4] = torch.nan
    with pytest.raises(ValueError, match="logits: NaN or infinite"):
        score_rows(model, [row], [where], 1)


def test_fp8_pages_and_training_mode() -> None:
    """The pages are those that the patch asks for; the model is left as it was."""
    model, row, where = tiny_llada(), torch.tensor([4, MASK, 5, MASK]), torch.tensor([1, 3])
    plain = score_rows(model, [row], [where], 1)[0].confidence
    fd.patch(model, kv_cache_dtype="fp8").train()
    rounded = score_rows(model, [row], [where], 1)[0].confidence
    assert model.training
    assert 0 < float((plain - rounded).abs().max()) < 0.1
