"""The likelihood estimate against the model's own forward, over the same draws and over all subsets."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastdllm_ext as fd
from fastdllm_ext import likelihood, whole
from fastdllm_ext.forward import whole_rows
from fastdllm_ext.likelihood import draw_masks, mask_counts
from tiny import EOS, MASK, VOCAB, random_prompt, random_shape, tiny_dream, tiny_llada

FAMILIES = {"llada": tiny_llada, "dream": tiny_dream}
ROW = torch.tensor([[4, 5, 6]])


def error_of(answers: list[Tensor], cfg_scale: float = 0.0) -> Tensor:
    """Bound on an estimate's error in float32.

    Logits of size 10 carry some 1e-6 of that, guidance 1 + 2 w times it; the weights of a draw add up to the
    answer's length.
    """
    return torch.tensor([1e-5 * (1 + 2 * cfg_scale) * len(answer) for answer in answers])


@torch.no_grad()
def slow_sample(model: Any, prompt: Tensor, answer: Tensor, hidden: list[int], cfg_scale: float) -> float:
    """L / l times the sum of log p of the hidden tokens, from the model's own dense forward."""
    row = torch.cat((prompt, answer))
    positions = [len(prompt) + i for i in hidden]
    row[positions] = MASK
    logits = model(row[None]).logits[0].double()
    if cfg_scale:
        row[: len(prompt)] = MASK
        free = model(row[None]).logits[0].double()
        logits = free + (1 + cfg_scale) * (logits - free)
    shift = 1 if model.config.model_type.lower() == "dream" else 0
    found = [float(torch.log_softmax(logits[p - shift], -1)[answer[p - len(prompt)]]) for p in positions]
    return sum(found) * len(answer) / len(hidden)


def slow_exact(model: Any, prompt: Tensor, answer: Tensor, cfg_scale: float = 0.0) -> float:
    """The expectation: over the number of hidden tokens, the mean over all subsets of that size."""
    means = []
    for count in range(1, len(answer) + 1):
        subsets = list(itertools.combinations(range(len(answer)), count))
        found = [slow_sample(model, prompt, answer, list(s), cfg_scale) for s in subsets]
        means.append(sum(found) / len(found))
    return sum(means) / len(means)


def random_pairs(rng: random.Random, count: int) -> tuple[list[Tensor], list[Tensor]]:
    prompts = [random_prompt(rng) for _ in range(count)]
    return prompts, [random_prompt(rng, 1, rng.choice([1, 5, 40])) for _ in range(count)]


# --- The value -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg_scale", [0.0, 0.8])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(6))
def test_the_models_own_forward_gives_the_same(
    monkeypatch: pytest.MonkeyPatch, seed: int, family: str, cfg_scale: float
) -> None:
    """Over the same draws: random shapes, rows of several pairs in one forward, the head in small parts."""
    monkeypatch.setattr(likelihood, "HEAD_ROWS", 13)
    rng = random.Random(f"{family} {seed}")
    model = FAMILIES[family](seed, **random_shape(rng, family))
    prompts, answers = random_pairs(rng, rng.choice([1, 2, 4]))
    samples, batch_size = rng.choice([(1, 16), (7, 3), (5, 9), (6, 1)])
    settings: dict[str, Any] = {"samples": samples, "batch_size": batch_size, "cfg_scale": cfg_scale}
    found = fd.loglikelihood(model, prompts, answers, seed=seed, **settings)
    wanted = []
    for b, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        masks = draw_masks(len(answer), samples, batch_size, (seed, b))
        values = [slow_sample(model, prompt, answer, m.nonzero()[:, 0].tolist(), cfg_scale) for m in masks]
        wanted.append(sum(values) / samples)
    assert found.shape == (len(prompts),)
    assert found.dtype == torch.float32
    assert ((found - torch.tensor(wanted)).abs() < error_of(answers, cfg_scale)).all()


@pytest.mark.parametrize("batch_size", [1, 2, 16])
@pytest.mark.parametrize("family, cfg_scale", [("llada", 0.0), ("llada", 0.8), ("dream", 0.0)])
def test_without_bias(family: str, cfg_scale: float, batch_size: int) -> None:
    """The mean of many independent estimates is the expectation over all subsets, which 3 tokens allow.

    A batch of 2 does not go evenly into 3 counts, one of 16 neither.
    """
    model, runs = FAMILIES[family](3), 400
    prompt, answer = torch.tensor([5, 6, 7, 8]), torch.tensor([9, 10, 11])
    exact = slow_exact(model, prompt, answer, cfg_scale)
    found = fd.loglikelihood(
        model,
        [prompt] * runs,
        [answer] * runs,
        samples=batch_size,
        batch_size=batch_size,
        cfg_scale=cfg_scale,
        seed=17,
    ).double()
    error = float(found.std()) / math.sqrt(runs)
    assert 0 < error < 0.05 * abs(exact), "the check has no power"
    assert abs(float(found.mean()) - exact) < 4 * error


@pytest.mark.parametrize("family", FAMILIES)
def test_one_token_needs_one_sample(family: str) -> None:
    """Its one subset is all of it, so every estimate is exact."""
    model = FAMILIES[family]()
    prompts, answers = [torch.tensor([5, 6, 7])] * 2, [torch.tensor([9]), torch.tensor([EOS])]
    wanted = torch.tensor([slow_exact(model, p, a) for p, a in zip(prompts, answers, strict=True)])
    for samples in (1, 5):
        found = fd.loglikelihood(model, prompts, answers, samples=samples)
        assert ((found - wanted).abs() < error_of(answers)).all()


def test_an_empty_prompt() -> None:
    model, empty, answer = tiny_llada(), torch.zeros(0, dtype=torch.int64), torch.tensor([9, 10])
    for cfg_scale in (0.0, 1.0):  # a twin without a prompt is the row itself
        found = fd.loglikelihood(model, [empty], [answer], samples=40, seed=1, cfg_scale=cfg_scale)
        masks = draw_masks(2, 40, 16, (1, 0))
        values = [slow_sample(model, empty, answer, m.nonzero()[:, 0].tolist(), 0.0) for m in masks]
        assert abs(float(found) - sum(values) / 40) < error_of([answer], cfg_scale)
    with pytest.raises(ValueError, match=r"prompts\[1\] is empty; dream takes 1 token or more"):
        fd.loglikelihood(tiny_dream(), [answer, empty], [answer, answer])


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16(family: str) -> None:
    """Near the same weights in float32: bfloat16 has 8 bits, so that a logit of some 5 is off by some 0.05.

    The tokens' errors partly cancel; 0.1 a token leaves room.
    """
    prompts, answers = random_pairs(random.Random(2), 3)
    half = FAMILIES[family](1, dtype=torch.bfloat16)
    found = fd.loglikelihood(half, prompts, answers, samples=8, seed=4)
    wanted = fd.loglikelihood(half.float(), prompts, answers, samples=8, seed=4)
    assert found.dtype == torch.float32
    assert ((found - wanted).abs() < 0.1 * torch.tensor([len(a) for a in answers])).all()


@pytest.mark.parametrize("cfg_scale", [0.0, 0.8])
def test_what_follows_the_head_is_float32(cfg_scale: float) -> None:
    """In a model of bfloat16, whose own error would be some 0.02 of a log p of 5."""
    model = tiny_llada(1, dtype=torch.bfloat16)
    heads: list[Tensor] = []
    handle = model.model.transformer["ff_out"].register_forward_hook(
        lambda _module, _inputs, out: heads.append(out[0].double())
    )
    found = fd.loglikelihood(model, ROW, torch.tensor([[9]]), samples=1, cfg_scale=cfg_scale)
    handle.remove()
    logits = heads[-1] + (1 + cfg_scale) * (heads[0] - heads[-1])  # without guidance, the two are one
    wanted = float(torch.log_softmax(logits, -1)[9])
    assert abs(float(found) - wanted) < error_of([ROW[0, :1]], cfg_scale)


def test_the_layout_of_whole_rows() -> None:
    """Positions begin anew in each row; a constant added to them all would not show in any result (RoPE)."""
    cache = fd.PagedKVCache(1, 1, 8, num_pages=4, page_size=16)
    lengths = [3, 40]
    sequences = cache.add(lengths)
    layout = whole_rows(cache, sequences, lengths, [torch.tensor([1]), torch.tensor([0, 39])])
    assert layout.positions.tolist() == [*range(3), *range(40)]
    assert layout.slots.tolist() == [*range(3), *range(16, 56)]
    assert layout.block_table.tolist() == [[0, 0, 0], [1, 2, 3]]
    assert layout.kv_lens.tolist() == lengths
    assert layout.queries.cu.tolist() == [0, 3, 43]
    assert layout.queries.longest == 40
    assert layout.wanted.tolist() == [1, 3, 42]
    assert layout.outputs.cu.tolist() == [0, 1, 3]


# --- The draws -------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", range(1, 12))
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 16, 33])
def test_mask_counts_are_even_in_a_batch_and_uniform_over_the_starts(length: int, rows: int) -> None:
    starts = [mask_counts(length, rows, start) for start in range(length)]
    for counts in starts:
        hits = Counter(counts)
        assert all(rows // length <= hits[c] <= -(-rows // length) for c in range(1, length + 1))
        assert set(hits) <= set(range(1, length + 1))
        steps = {(b - a) % length for a, b in itertools.pairwise(counts)}
        assert steps <= {(length // rows) % length, -(-length // rows) % length}
    for row in zip(*starts, strict=True):
        assert sorted(row) == list(range(1, length + 1))


def test_draws_come_in_batches_and_hide_every_subset() -> None:
    masks = draw_masks(4, 5000, 16, (3, 0))
    assert masks.shape == (5000, 4)
    first = [int(m.sum()) for m in masks[:16]]
    assert first == mask_counts(4, 16, first[0] - 1)
    last = [int(m.sum()) for m in masks[-8:]]  # 5000 is 312 batches of 16, and 8
    assert last == mask_counts(4, 8, last[0] - 1)
    assert len({int(batch[0].sum()) for batch in masks.split(16)}) == 4, "each batch has its own start"
    seen = Counter(tuple(m.tolist()) for m in masks)
    for subset, count in seen.items():
        # As a count of independent draws; even counts within a batch only narrow it.
        p = 1 / (4 * math.comb(4, sum(subset)))
        assert abs(count - 5000 * p) < 5 * math.sqrt(5000 * p * (1 - p))
    assert len(seen) == 15


def test_seeds() -> None:
    model = tiny_llada()
    prompts, answers = [torch.tensor([5, 6, 7])] * 2, [torch.tensor([9, 10, 11, 12, 13])] * 2
    settings: dict[str, Any] = {"samples": 3}

    def run(seed: Any) -> list[float]:
        return fd.loglikelihood(model, prompts, answers, seed=seed, **settings).tolist()

    assert run(1) == run(1)
    assert run(1)[0] != run(1)[1], "pairs of one seed have their own streams"
    assert run(1) != run(2)
    assert run([8, 8])[0] == pytest.approx(run([8, 8])[1], abs=1e-4)
    assert run([8, 8])[0] != pytest.approx(run([9, 8])[0], abs=1e-4)
    assert run(1) != run(1 + 2**32), "all bits of a seed count"
    torch.manual_seed(5)
    drawn = run(None)
    assert drawn != run(None)
    torch.manual_seed(5)
    assert drawn == run(None)


@pytest.mark.parametrize("cfg_scale", [0.0, 0.8])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(4))
def test_a_pair_is_the_same_alone_and_in_every_batch(seed: int, family: str, cfg_scale: float) -> None:
    """To float32's error: how a matrix product adds up depends on how many rows it has."""
    rng = random.Random(f"{family} {seed}")
    model = FAMILIES[family](seed, **random_shape(rng, family))
    prompts, answers = random_pairs(rng, 5)
    seeds = [rng.randrange(2**63) for _ in prompts]
    settings: dict[str, Any] = {"samples": 6, "batch_size": 4, "cfg_scale": cfg_scale}

    def run(pairs: list[int]) -> Tensor:
        rows = [[x[b] for b in pairs] for x in (prompts, answers, seeds)]
        return fd.loglikelihood(model, rows[0], rows[1], seed=rows[2], **settings)

    bound = 2 * error_of(answers, cfg_scale)
    together = run([0, 1, 2, 3, 4])
    assert ((run([4, 2, 0, 1, 3])[[2, 3, 1, 4, 0]] - together).abs() < bound).all()
    for b in range(5):
        assert abs(float(run([b]) - together[b])) < bound[b]


# --- What it costs ---------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Rows of each tensor that an operation makes with the vocabulary as its last dimension."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.rows: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if not isinstance(x, Tensor) or x.dim() == 0 or x.shape[-1] != VOCAB:
                continue
            if x.untyped_storage().data_ptr() not in self.weights:  # a transposed weight is none
                self.rows.append(x.numel() // VOCAB)
        return out


@pytest.mark.parametrize("cfg_scale", [0.0, 0.8])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("most", [11, 1000])
def test_logits_of_masked_positions_alone(
    monkeypatch: pytest.MonkeyPatch, most: int, family: str, cfg_scale: float
) -> None:
    """And of no more than HEAD_ROWS at once."""
    monkeypatch.setattr(likelihood, "HEAD_ROWS", most)
    model = FAMILIES[family]()
    heads: list[int] = []
    head = model.lm_head if family == "dream" else model.model.transformer["ff_out"]
    handle = head.register_forward_hook(lambda _module, _inputs, out: heads.append(len(out)))
    prompts, answers = random_pairs(random.Random(3), 3)
    with Watch(model) as watch:
        fd.loglikelihood(model, prompts, answers, samples=6, batch_size=9, cfg_scale=cfg_scale, seed=1)
    handle.remove()
    masks = [draw_masks(len(a), 6, 9, (1, b)) for b, a in enumerate(answers)]
    per_row = torch.cat([m.sum(1) for m in masks])
    assert sum(heads) == int(per_row.sum()) * (2 if cfg_scale else 1)
    assert heads
    assert max(heads) <= max(watch.rows) <= min(most, max(int(n.sum()) for n in per_row.split(9)))


def test_rows_of_several_pairs_share_a_forward() -> None:
    model = tiny_llada()
    tokens: list[int] = []
    handle = model.model.transformer["wte"].register_forward_hook(
        lambda _module, inputs, _out: tokens.append(inputs[0].numel())
    )
    prompts, answers = [torch.tensor([5, 6])] * 5, [torch.tensor([9])] * 5
    fd.loglikelihood(model, prompts, answers, samples=1, batch_size=4)
    handle.remove()
    assert tokens == [12, 3]


@pytest.mark.parametrize("cfg_scale", [0.0, 0.8])
def test_all_layers_share_the_pages_of_one_forward(monkeypatch: pytest.MonkeyPatch, cfg_scale: float) -> None:
    made: list[fd.PagedKVCache] = []

    class Recorded(whole.Scratch):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(whole, "Scratch", Recorded)
    prompts, answers = [ROW[0], torch.arange(2, 42)], [ROW[0], ROW[0]]
    fd.loglikelihood(tiny_llada(n_layers=5), prompts, answers, samples=6, batch_size=4, cfg_scale=cfg_scale)
    (cache,) = made
    pages = 4 * 2 * (2 if cfg_scale else 1)  # 4 rows, with their twins, of 43 positions in pages of 32
    assert [storage.shape for storage in cache.storage] == [(1, 2, pages, 4, 32, 8)]
    assert (cache.stats.num_used, cache.stats.peak_used) == (0, pages)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_accelerate_moves_in_for_their_turn(family: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = fd.patch(FAMILIES[family](), runtime="modules")  # what runs where there are hooks
    prompts, answers = random_pairs(random.Random(1), 3)
    wanted = fd.loglikelihood(model, prompts, answers, samples=3, seed=1)
    leaves = [n for n, m in model.named_modules() if [*m.parameters(recurse=False)] and not [*m.children()]]
    places = {name: "disk" if i % 3 == 1 else "cpu" for i, name in enumerate(leaves)}
    model = accelerate.dispatch_model(model, places, offload_dir=tmp_path, main_device="cpu")
    assert any(p.device.type == "meta" for p in model.parameters())
    assert torch.equal(fd.loglikelihood(model, prompts, answers, samples=3, seed=1), wanted)


# --- The model is left as it was -------------------------------------------------------------------


def test_evaluation_mode_is_for_the_call_alone() -> None:
    model = tiny_llada()
    model.model.transformer["blocks"][1].train()
    before = [m.training for m in model.modules()]
    seen: list[bool] = []
    handle = model.model.transformer["blocks"][1].up_proj.register_forward_hook(
        lambda module, _inputs, _out: seen.append(module.training)
    )
    found = fd.loglikelihood(model, ROW, ROW, samples=1)
    handle.remove()
    assert not found.requires_grad
    assert seen == [False]
    assert [m.training for m in model.modules()] == before


@pytest.mark.parametrize(
    "error, message, arguments",
    [
        (ValueError, r"samples=0; takes 1 or more", {"samples": 0}),
        (TypeError, r"samples=2.0; takes an int", {"samples": 2.0}),
        (ValueError, r"batch_size=-1; takes 1 or more", {"batch_size": -1}),
        (TypeError, r"batch_size=None; takes an int", {"batch_size": None}),
        (ValueError, r"cfg_scale=-0.5; takes a number of 0 or more", {"cfg_scale": -0.5}),
        (ValueError, r"seed=-1; takes 0 to", {"seed": -1}),
        (TypeError, r"seed=0.5; takes an int", {"seed": 0.5}),
        (ValueError, r"seed holds 2 numbers for 1 rows", {"seed": [1, 2]}),
        (TypeError, r"^prompts=str; takes a \[B, P\] tensor or a list", {"prompts": "hello"}),
        (TypeError, r"^answers=str", {"answers": "hello"}),
        (ValueError, r"^answers has shape \[3\]", {"answers": ROW[0]}),
        (TypeError, r"^answers\[0\] has dtype torch.float32; takes torch.int64", {"answers": ROW.float()}),
        (ValueError, r"^prompts is on meta; takes the model's device, cpu", {"prompts": ROW.to("meta")}),
        (ValueError, rf"^answers\[0\] holds token {VOCAB}; takes 0 to {VOCAB - 1}",
         {"answers": ROW + VOCAB - 6}),
        (ValueError, rf"^prompts\[0\] holds the mask token {MASK}; takes none", {"prompts": ROW + MASK - 6}),
        (ValueError, rf"^answers\[0\] holds the mask token {MASK}; takes none", {"answers": ROW + MASK - 6}),
        (ValueError, r"^answers\[1\] is empty; llada takes 1 token or more",
         {"prompts": [ROW[0]] * 2, "answers": [ROW[0], ROW[0, :0]]}),
        (ValueError, r"^answers holds 2 rows for 1 prompts; takes one for each",
         {"answers": ROW.repeat(2, 1)}),
        (ValueError, r"^answers\[0\] of 254 tokens: with the prompt of 3 it exceeds .* 256 positions",
         {"answers": torch.full((1, 254), 5)}),
    ],
)  # fmt: skip
def test_bad_input(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    """The message names the argument, and the same model goes on as before."""
    model = tiny_llada()
    wanted = fd.loglikelihood(model, ROW, ROW, seed=1, samples=2)
    with pytest.raises(error, match=message):
        fd.loglikelihood(model, **{"prompts": ROW, "answers": ROW} | arguments)
    assert torch.equal(fd.loglikelihood(model, ROW, ROW, seed=1, samples=2), wanted)


def test_a_model_that_is_not_patched() -> None:
    with pytest.raises(ValueError, match=r"is not patched; call fastdllm_ext\.patch"):
        fd.loglikelihood(tiny_llada(patched=False), ROW, ROW)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_in_the_model_is_an_error_that_names_the_pairs(value: float) -> None:
    model = tiny_llada()
    with torch.no_grad():
        model.model.transformer["wte"].weight[7] = value
    model.train()
    rows = [ROW[0], torch.tensor([7]), ROW[0]]
    with pytest.raises(ValueError, match=r"logits: NaN or infinite in pairs \[1\]"):
        fd.loglikelihood(model, rows, [ROW[0]] * 3, samples=2)
    assert all(m.training for m in model.modules())
