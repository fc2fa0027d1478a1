from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastdllm_ext as fd
from fastdllm_ext.decoder import Decoder
from fastdllm_ext.eval.steps import require_greedy
from fastdllm_ext.generate import opened
from fastdllm_ext.rules.base import Candidates, Filled, rank
from rule_cases import assert_as_stated, each_family
from slow_reference import SlowRule, slow_generate
from test_generate import CACHES, Recorder, assert_row
from tiny import EOS, MASK, PAD, tiny_dream, tiny_llada

RULE = "wino:draft=0.03:verify=0.3"  # takes much back of what a random model drafts


class SlowWino(SlowRule):
    verifies = True

    def __init__(self, rule: fd.rules.Wino) -> None:
        self.rule = rule
        self.revoked = 0

    def begin(self) -> None:
        self.last = 0

    def choose(self, found: dict[int, float], logits: dict[int, Tensor]) -> tuple[set[int], float]:
        most = min(max(len(found) * 7 // 10, 5), 20)
        ranked = sorted(found, key=lambda p: (-found[p], p))
        chosen = {p for p in ranked[:most] if found[p] >= self.rule.draft}
        gaps = [abs(c - self.rule.draft) for c in found.values()]
        if len(found) > most and found[ranked[most - 1]] >= self.rule.draft:
            gaps += [x for x in [found[ranked[most - 1]] - found[ranked[most]]] if x]
        return chosen, min(gaps)

    def revoke(self, held: dict[int, float], filled: int) -> tuple[set[int], float]:
        ranked = sorted(held, key=lambda p: (held[p], p))
        most = max(0, self.last - 1) if filled > 1 else 0
        self.last = filled
        back = {p for p in ranked[:most] if held[p] < self.rule.verify}
        gaps = [abs(p - self.rule.verify) for p in held.values()]
        if 0 < most < len(held):
            gaps.append(held[ranked[most]] - held[ranked[most - 1]])
        self.revoked += len(back)
        return back, min(gaps, default=1.0)


@each_family
@pytest.mark.parametrize("seed", [3, 4, 5])  # every cache mode
def test_as_stated(seed: int, family: str) -> None:
    assert_as_stated(
        family,
        seed,
        lambda rng: fd.rules.Wino(rng.choice([0.02, 0.05, 0.1, 0.2]), rng.choice([0.1, 0.3, 0.9])),
        SlowWino,
    )


@each_family
@pytest.mark.parametrize("cache, fp8", [*((cache, False) for cache in CACHES), ("dual", True)])
def test_tokens_are_taken_back(family: str, cache: str, fp8: bool) -> None:
    """As stated, where that happens often: low drafts, strict verification."""
    revoked = 0
    settings: dict[str, Any] = {"block_length": 11, "cache": cache}
    rule = fd.rules.Wino(0.03, 0.3)
    for seed in range(10):
        model = tiny_llada(seed) if family == "llada" else tiny_dream(seed)
        prompt = torch.arange(20, 20 + 25 + seed)  # blocks lie across the end of a page
        stated = SlowWino(rule)
        truth = slow_generate(model, prompt, gen_length=18, fp8=fp8, slow_rule=stated, **settings)
        if truth.closest > (1e-4 if fp8 else 1e-5):
            fd.patch(model, kv_cache_dtype="fp8" if fp8 else None)
            output = fd.generate(model, [prompt], gen_length=18, rule=rule, **settings)
            assert_row(output, 0, prompt, truth, 1e-4 if fp8 else 1e-5)
            revoked += stated.revoked
            if revoked >= 10:
                return
    raise AssertionError(f"{revoked} tokens were taken back in cases with one right answer")


def test_what_verifies_a_token_is_the_model_without_it() -> None:
    """The keys of one layer know of no other token: a shadow is the model's own forward with a mask there."""
    taken = 0
    for seed in range(2):
        model, rule = tiny_llada(seed, n_layers=1), fd.rules.Wino(0.03, 0.3)
        row, filled, slow, step = torch.tensor([9, 8, 7] + [MASK] * 16), set(), SlowWino(rule), 0
        slow.begin()
        while (row == MASK).any():
            p = probabilities(model, row)
            masks = [i for i in range(3, 19) if row[i] == MASK]
            best = {i: max((float(x), -v) for v, x in enumerate(p[i]) if v != MASK) for i in masks}
            chosen, _ = slow.choose({i: best[i][0] for i in masks}, {})
            chosen = chosen or {max(masks, key=lambda i: (best[i][0], -i))}
            held = {}
            for i in filled:
                hidden = row.clone()
                hidden[i] = MASK
                held[i] = float(probabilities(model, hidden)[i, row[i]])
            back, _ = slow.revoke(held, len(chosen))
            for i in chosen:
                row[i] = -best[i][1]
            for i in back:
                row[i] = MASK
            filled, step = (filled | chosen) - back, step + 1
        taken += slow.revoked
        settings: dict[str, Any] = {"gen_length": 16, "cache": "none", "stop_on_eos": False}
        output = fd.generate(model, torch.tensor([[9, 8, 7]]), rule=rule, **settings)
        assert output.sequences[0].tolist() == row.tolist()
        assert int(output.nfe[0]) == step
    assert taken >= 10


@each_family
def test_what_temperature_does_to_verification(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it does to confidence: nothing in LLaDA; Dream divides the logits by it."""
    model = tiny_llada(3, n_layers=1) if family == "llada" else tiny_dream(3, num_hidden_layers=1)
    shift = family == "dream"
    seen: list[Filled] = []
    revoked = fd.rules.Wino.revoked

    def record(self: fd.rules.Wino, step: Candidates, chosen: Tensor, filled: Filled) -> Tensor:
        seen.append(filled)
        return revoked(self, step, chosen, filled)

    monkeypatch.setattr(fd.rules.Wino, "revoked", record)
    config = fd.GenerationConfig(gen_length=8, rule=RULE, cache="none", temperature=0.5, seed=1)
    with opened(Decoder, model, torch.tensor([[5, 6, 7]]), None, config) as decoder, torch.no_grad():
        for _ in range(3):
            row = decoder.tokens[0].clone()
            decoder.turn()
    judged = seen[-1].confidence.isfinite()
    assert judged.sum() >= 2
    for i, found in zip(seen[-1].positions[judged], seen[-1].confidence[judged], strict=True):
        hidden = row.clone()
        hidden[i] = MASK
        logits = model(hidden[None]).logits[0, i - int(shift)]
        wanted = torch.softmax(logits / (0.5 if shift else 1), 0)[row[i]]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_how_many_a_step_fills() -> None:
    rule = "wino:draft=1e-6:verify=1e-30"  # everything, and nothing is taken back
    settings: dict[str, Any] = {"gen_length": 40, "block_length": 40, "stop_on_eos": False}
    output = fd.generate(tiny_llada(), torch.tensor([[5, 6, 7]]), rule=rule, **settings)
    assert torch.bincount(output.step_map[0]).tolist() == [20, 14, 5, 1]


def probabilities(model: Any, row: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.softmax(model(row[None]).logits[0].double(), -1)


@each_family
@pytest.mark.parametrize("cache", CACHES)
def test_a_block_takes_as_many_steps_as_masks_at_most(family: str, cache: str) -> None:
    """Even if every token is doubtful; and no more pages are taken than are asked for."""
    for block_length in (1, 7, 40):
        model = tiny_llada(1) if family == "llada" else tiny_dream(1)
        prompts = [torch.tensor([5, 6]), torch.arange(2, 33)]
        settings: dict[str, Any] = {"gen_length": [40, 33], "block_length": block_length, "cache": cache}
        shift = family == "dream"
        shadows = [block_length, min(block_length, 33)]
        needed = 2 + 2 + sum(shadows) + shift * sum(-(-n // 32) for n in shadows)
        pages = fd.PagedKVCache(2, 2 if shift else 4, 8, num_pages=needed)
        output = fd.generate(
            model, prompts, rule="wino:draft=1e-6:verify=1", stop_on_eos=False, kv_cache=pages, **settings
        )
        assert (output.sequences != MASK).all()
        assert (output.step_map[0] >= 0).all()
        for b, length in enumerate(settings["gen_length"]):
            steps = output.step_map[b, :length].split(block_length)
            begins = [0, *(int(block.max()) + 1 for block in steps)]
            assert begins[-1] == int(output.nfe[b])
            for begin, end, block in zip(begins, begins[1:], steps, strict=False):
                assert begin <= int(block.min())
                assert end - begin <= len(block)
        assert pages.stats.num_used == 0
        assert pages.stats.peak_used == needed


def test_pages_are_given_back_and_missed_by_name() -> None:
    model, prompt = tiny_llada(), torch.tensor([[5, 6, 7]])
    pages = fd.PagedKVCache(2, 4, 8, num_pages=17)
    settings: dict[str, Any] = {"gen_length": 20, "block_length": 16, "rule": RULE}
    wanted = fd.generate(model, prompt, kv_cache=pages, **settings).sequences
    small = fd.PagedKVCache(2, 4, 8, num_pages=16)
    with pytest.raises(fd.OutOfPages, match=r"17 .*16"):
        fd.generate(model, prompt, kv_cache=small, **settings)
    assert small.stats.num_used == 0

    class Broken:
        def on_commit(self, commit: fd.Commit) -> None:
            if commit.step == 2:
                raise RuntimeError("stop")

        def put(self, value: Tensor) -> None: ...

        def end(self) -> None: ...

    with pytest.raises(RuntimeError, match="stop"):
        fd.generate(model, prompt, kv_cache=pages, streamer=Broken(), **settings)
    assert pages.stats.num_used == 0
    assert torch.equal(fd.generate(model, prompt, kv_cache=pages, **settings).sequences, wanted)


def test_a_row_ends_at_an_eos_that_is_there_for_good() -> None:
    """An EOS that is taken back ends nothing."""
    came_and_went = stopped = 0
    for seed in range(4):
        model = tiny_llada(seed)
        with torch.no_grad():
            model.model.transformer["ff_out"].weight[EOS] *= 2.0
        settings: dict[str, Any] = {"gen_length": 48, "block_length": 12, "rule": RULE}
        recorder = Recorder()
        short = fd.generate(model, torch.tensor([[4, 5, 6]]), streamer=recorder, **settings)
        full = fd.generate(model, torch.tensor([[4, 5, 6]]), stop_on_eos=False, **settings)
        end = int(short.lengths[0])
        assert end == int(full.lengths[0])
        assert torch.equal(short.sequences[0, :end], full.sequences[0, :end])
        answer = short.sequences[0, 3:]
        came_and_went += sum(
            token == EOS and answer[p] not in (EOS, PAD)
            for commit in recorder.commits
            for p, token in zip(commit.positions, commit.tokens, strict=True)
        )
        stopped += int(short.nfe < full.nfe)
    assert came_and_went >= 2
    assert stopped >= 2


def test_streamers() -> None:
    """Later commits of a position replace earlier ones; finished blocks alone go to a plain streamer."""
    model, prompt, recorder = tiny_llada(2), torch.tensor([[4, 5, 6]]), Recorder()
    settings: dict[str, Any] = {"gen_length": 30, "block_length": 10, "rule": RULE, "eos_token_id": 62}
    output = fd.generate(model, prompt, streamer=recorder, **settings)
    tokens, steps, reported = [-1] * 30, [-1] * 30, 0
    for commit in recorder.commits:
        for p, token in zip(commit.positions, commit.tokens, strict=True):
            tokens[p], steps[p], reported = token, commit.step, reported + 1
    assert tokens == output.sequences[0, 3:].tolist()
    assert steps == output.step_map[0].tolist()
    assert reported > 30

    class Plain:
        def __init__(self) -> None:
            self.parts: list[list[int]] = []

        def put(self, value: Tensor) -> None:
            self.parts.append(value.tolist())

        def end(self) -> None: ...

    plain = Plain()
    fd.generate(model, prompt, streamer=plain, **settings)
    assert [len(part) for part in plain.parts[:-1]] == [3, 10, 10]
    assert [token for part in plain.parts for token in part] == output.sequences[0].tolist()


def test_given_tokens_stay() -> None:
    row = torch.tensor([[4, MASK, 5, MASK, MASK, 6, MASK, 7, MASK, MASK, MASK, 8, MASK]])
    given = row != MASK
    output = fd.generate(tiny_llada(), row, infill=True, rule="wino:draft=1e-6:verify=1")
    assert torch.equal(output.sequences[given], row[given])
    assert (output.sequences[~given] != MASK).all()
    assert int(output.nfe[0]) > 2


def test_what_it_does_not_go_with_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"cfg_scale=0.5: rule=wino:draft=0.6:verify=0.9 verifies without"):
        fd.GenerationConfig(rule="wino", cfg_scale=0.5)
    with pytest.raises(ValueError, match=r"rule=wino:draft=0.6:verify=0.9: takes no output_history"):
        tiny_dream().diffusion_generate(
            torch.tensor([[5]]), rule="wino", output_history=True, return_dict_in_generate=True
        )
    with pytest.raises(ValueError, match=r"rule=wino:draft=0.6:verify=0.9: takes tokens back; an analysis"):
        require_greedy(fd.GenerationConfig(rule="wino"))


def test_places_in_a_group() -> None:
    score = torch.tensor([0.5, 1.0, 1.0, 0.75, 2.25, 2.25])
    group = torch.tensor([0, 0, 0, 2, 2, 2])
    assert rank(score, group).tolist() == [2, 0, 1, 2, 0, 1]
