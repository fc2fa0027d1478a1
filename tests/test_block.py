"""A block's steps as graphs beneath the decoding loop, with a device that only pretends, and a real one."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import fastdllm_ext as fd
from fastdllm_ext import decoder
from fastdllm_ext.rules import RULES
from fastdllm_ext.rules.base import TorchRule
from fastdllm_ext.runtime.block import BlockStep
from fastdllm_ext.runtime.graphs import Rung, StepGraphs
from test_generate import CACHES, random_rows, random_settings, random_tiny
from test_graphs import Pretended
from tiny import MASK, random_prompt, tiny_llada


def pretend(monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> StepGraphs[BlockStep]:
    """Steps of every model are captured, on a device on which graphs are the steps themselves."""
    graphs: StepGraphs[BlockStep] = StepGraphs(Pretended(), **arguments)
    monkeypatch.setattr(decoder, "graphs_of", lambda *_: graphs)
    return graphs


def assert_same(found: fd.GenerationOutput, wanted: fd.GenerationOutput) -> None:
    for name in ("sequences", "lengths", "nfe", "step_map"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    torch.testing.assert_close(found.confidence, wanted.confidence, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first", list(Rung)[:2])
@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("seed", range(120))
def test_tokens_are_those_of_single_steps(
    family: str, seed: int, first: Rung, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random configurations, in which rows of a batch fill their blocks at different steps."""
    rng = random.Random(f"{family} {seed}")
    model = random_tiny(rng, seed, family)
    settings = random_settings(rng, seed, 70, family == "dream") | {"cache": "dual"}
    settings["temperature"] = rng.choice([0.0, 0.0, 0.7])
    prompts, lengths = random_rows(rng, rng.choice([1, 2, 3, 5]), settings["infill"])
    settings["block_length"] = rng.choice([4, 8, 16])
    if rng.random() < 0.5:  # rows whose blocks are of one length
        lengths = [settings["block_length"] * rng.randint(1, 3) for _ in prompts]
    count = {} if settings["infill"] else {"gen_length": lengths}
    seeds = [rng.randrange(2**40) for _ in prompts]
    wanted = fd.generate(model, prompts, seed=seeds, **settings, **count)
    pretend(monkeypatch, first=first)
    assert_same(fd.generate(model, prompts, seed=seeds, **settings, **count), wanted)


def test_a_block_is_one_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for its refresh, one for all other steps; of one shape for blocks and contexts of one bucket."""
    graphs = pretend(monkeypatch)
    turns: list[int] = []
    turn = decoder.Decoder.turn

    def counted(self: Any) -> Any:
        turns.append(1)
        return turn(self)

    monkeypatch.setattr(decoder.Decoder, "turn", counted)
    output = fd.generate(
        tiny_llada(), torch.full((1, 9), 5), gen_length=64, block_length=16, steps=64, stop_on_eos=False
    )
    assert int(output.nfe) == 64
    assert len(turns) == 8
    assert len(graphs) == 1


@pytest.mark.parametrize("name", RULES)
def test_rules_of_unmask_are_captured_and_no_others(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = tiny_llada(), [torch.full((9,), 5), torch.full((3,), 6)]
    settings: dict[str, Any] = {"gen_length": 32, "block_length": 16, "rule": name}
    wanted = fd.generate(model, prompts, **settings)
    graphs = pretend(monkeypatch)
    assert_same(fd.generate(model, prompts, **settings), wanted)
    assert bool(len(graphs)) != issubclass(RULES[name], TorchRule)


def test_what_is_captured_keeps_no_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step refers to them by address alone, and is made anew for others."""
    graphs = pretend(monkeypatch)
    model = tiny_llada()
    caches = [fd.PagedKVCache(2, 4, 8, num_pages=9) for _ in range(2)]
    for cache in (*caches, caches[0]):
        fd.generate(model, torch.full((1, 9), 5), gen_length=32, block_length=16, steps=32, kv_cache=cache)
        for entry in graphs._entries.values():
            assert entry.step.attention is None
            assert entry.step.runtime is None
    assert len(graphs) == 2


def test_a_captured_step_of_fp8_pages_knows_their_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives the tokens of single steps, and is made anew where pages or scales lie elsewhere."""
    model, prompt = tiny_llada(), torch.full((1, 9), 5)
    cache = fd.PagedKVCache(2, 4, 8, num_pages=9, dtype=torch.float8_e4m3fn)
    settings = {"gen_length": 32, "block_length": 16, "steps": 32, "kv_cache": cache}
    wanted = fd.generate(model, prompt, **settings)
    graphs = pretend(monkeypatch)
    for _ in range(2):
        assert_same(fd.generate(model, prompt, **settings), wanted)
    assert len(graphs) == 1
    cache.scale_storage = [x.clone() for x in cache.scale_storage]
    cache._scales = list(cache.scale_storage[0])
    assert_same(fd.generate(model, prompt, **settings), wanted)
    assert len(graphs) == 2


def test_weights_that_moved_are_captured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = pretend(monkeypatch)
    model, cache = tiny_llada(), fd.PagedKVCache(2, 4, 8, num_pages=9)
    settings = {"gen_length": 32, "block_length": 16, "steps": 32, "kv_cache": cache}
    prompt = torch.full((1, 9), 5)
    for _ in range(2):
        fd.generate(model, prompt, **settings)
    assert len(graphs) == 1
    norm = model.model.transformer["blocks"][0].attn_norm
    norm.weight.data = norm.weight.detach() * 1.5
    found = fd.generate(model, prompt, **settings)
    assert len(graphs) == 2
    monkeypatch.undo()
    assert_same(found, fd.generate(model, prompt, **settings))


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("runtime", ["fused", "modules"])
def test_what_cannot_be_captured_takes_single_steps(
    cache: str, runtime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fd.patch(tiny_llada(), runtime=runtime)
    prompts = [random_prompt(random.Random(b)) for b in range(3)]
    settings = {"gen_length": [32, 20, 9], "block_length": 8, "steps": 20, "cache": cache}
    wanted = fd.generate(model, prompts, **settings)
    if runtime == "fused":
        pretend(monkeypatch)
    assert_same(fd.generate(model, prompts, **settings), wanted)


def test_bad_logits_are_described_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a step within a block: a token that the model fills in has a bad embedding."""
    model = tiny_llada()
    prompt = torch.full((1, 9), 5)
    first = fd.generate(model, prompt, gen_length=16, block_length=16, steps=16, stop_on_eos=False)
    token = int(first.sequences[0, 9:][first.step_map[0] == 1][0])
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = torch.nan
    with pytest.raises(ValueError, match="logits: NaN or infinite in rows") as wanted:
        fd.generate(model, prompt, gen_length=16, block_length=16, steps=16)
    pretend(monkeypatch)
    with pytest.raises(ValueError, match="logits: NaN or infinite in rows") as found:
        fd.generate(model, prompt, gen_length=16, block_length=16, steps=16)
    assert str(found.value) == str(wanted.value)


def test_a_streamer_hears_of_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    class Diary:
        def __init__(self) -> None:
            self.seen: list[tuple] = []

        def on_commit(self, commit: fd.Commit) -> None:
            self.seen.append((commit.row, commit.step, commit.positions, commit.tokens))

        def end(self) -> None: ...

    model = tiny_llada()
    prompts = [random_prompt(random.Random(b)) for b in range(3)]
    diaries = [Diary(), Diary()]
    for diary in diaries:
        fd.generate(model, prompts, gen_length=32, block_length=8, threshold=0.1, streamer=diary)
        pretend(monkeypatch)
    assert sorted(diaries[0].seen) == sorted(diaries[1].seen)
    assert len(diaries[0].seen) > 12


def test_the_environment_names_a_rung(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdllm_ext.runtime.block import graphs_of

    model = tiny_llada()
    assert graphs_of(model, None, torch.device("cpu")) is None
    monkeypatch.setenv("FASTDLLM_GRAPHS", "all")
    with pytest.raises(ValueError, match="FASTDLLM_GRAPHS='all'; takes one of block, replay, eager"):
        fd.generate(model, torch.tensor([[4, 5]]), gen_length=2)


@pytest.mark.cuda
@pytest.mark.parametrize("rung", ["block", "replay", "eager"])
@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("seed", range(12))
def test_on_a_gpu_too(family: str, seed: int, rung: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, beside the CPU; twice, so that a captured step is met again."""
    rng = random.Random(f"{family} {seed}")
    model = random_tiny(rng, seed, family)
    prompts = [random_prompt(rng, 2, 40) for _ in range(rng.choice([1, 2, 5]))]
    settings = {
        "gen_length": 32,
        "block_length": 8,
        "steps": rng.choice([11, 32]),
        "cfg_scale": rng.choice([0.0, 0.5]),
    }
    wanted = fd.generate(model, prompts, **settings)
    monkeypatch.setenv("FASTDLLM_GRAPHS", rung)
    model.cuda()
    for _ in range(2):
        found = fd.generate(model, [p.cuda() for p in prompts], **settings)
        assert found.sequences.cpu().tolist() == wanted.sequences.tolist()
        assert found.nfe.tolist() == wanted.nfe.tolist()
    assert not (found.sequences == MASK).any()
