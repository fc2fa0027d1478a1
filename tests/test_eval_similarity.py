"""Similarity of keys and values against what hooks on the model's own forward see."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastdllm_ext as fd
from fastdllm_ext.eval import similarity
from fastdllm_ext.patching.registry import patched_family
from test_eval_drift import demo_prompts, some_prompts
from test_eval_uncached import FAMILIES
from tiny import MASK

SHAPE: dict[str, Any] = {"gen_length": 12, "block_length": 5}
ERROR = 2e-5  # five decimals, and float32's of a cosine
LAYERS = 2


@torch.no_grad()
def hooked(model: Any, row: Tensor) -> dict[str, list[Tensor]]:
    """Keys before RoPE and values of every layer, [P, heads, head_dim] each."""
    family = patched_family(model)
    head_dim = family.geometry(model).head_dim
    found: dict[str, list[Tensor]] = {"keys": [], "values": []}
    handles = [
        module.register_forward_hook(
            lambda _module, _inputs, out, kind=kind: found[kind].append(out[0].unflatten(-1, (-1, head_dim)))
        )
        for layer in family.parts(model).layers
        for kind, module in (("keys", layer.k), ("values", layer.v))
    ]
    model(row[None])
    for handle in handles:
        handle.remove()
    return found


def slow_similarity(model: Any, prompt: Tensor, steps: int, rate: int) -> dict[str, dict[str, Tensor]]:
    """One prompt: the row of every step from the step map, then vector by vector."""
    output = fd.generate(model, [prompt], cache="none", stop_on_eos=False, steps=steps, **SHAPE)
    first, seen = len(prompt), []
    for step in range(0, int(output.nfe[0]), rate):
        row = output.sequences[0].clone()
        row[first:][output.step_map[0] >= step] = MASK
        seen.append(hooked(model, row))
    places = {"prompt": range(first), "last_block": range(first + 10, first + 12)}

    def mean_cosine(a: Tensor, b: Tensor, where: range) -> Tensor:
        return torch.stack([F.cosine_similarity(a[p], b[p], dim=-1) for p in where]).mean()

    def table(kind: str, layer: int, where: range) -> Tensor:
        found = [mean_cosine(a[kind][layer], b[kind][layer], where) for a in seen for b in seen]
        return torch.stack(found).view(len(seen), len(seen))

    return {
        kind: {
            region: torch.stack([table(kind, layer, where) for layer in range(LAYERS)])
            for region, where in places.items()
        }
        for kind in ("keys", "values")
    }


@pytest.mark.parametrize("steps, rate, snapshots", [(None, 1, 32), (None, 3, 4), (6, 1, 32)])
@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_see_the_same(family: str, steps: int | None, rate: int, snapshots: int) -> None:
    """Keys before RoPE give the cosines of those after it."""
    model, prompts = FAMILIES[family](4), some_prompts(9, 2)
    result = similarity.measure(model, prompts, snapshots=snapshots, **SHAPE, steps=steps)
    slow = [slow_similarity(model, prompt, steps or 15, rate) for prompt in prompts]
    assert result["steps"] == list(range(0, steps or 12, rate))
    for kind in ("keys", "values"):
        for region in ("prompt", "last_block"):
            found = torch.tensor(result[kind][region])
            wanted = (slow[0][kind][region] + slow[1][kind][region]) / 2
            assert (found - wanted).abs().max() < ERROR
            assert (found.diagonal(0, 1, 2) - 1).abs().max() < ERROR
            assert found.min() < 0.99, "the check has no power"
    json.dumps(result)


def test_blocks_and_conditions() -> None:
    result = similarity.measure(FAMILIES["llada"](), some_prompts(1, 3), max_prompts=2, name="tiny", **SHAPE)
    assert result["blocks"] == [0] * 5 + [1] * 5 + [2] * 2
    assert (result["model"], result["conditions"]["prompts"], result["conditions"]["rule"]) == (
        "tiny", 2, "one a step",
    )  # fmt: skip


def test_positions_are_few_and_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the prompt and of the last block, so that memory is bounded."""
    asked: list[list[int]] = []
    read = similarity.read_pages

    def watched(cache: Any, sequence: int, positions: Tensor) -> Tensor:
        asked.append(positions.tolist())
        return read(cache, sequence, positions)

    monkeypatch.setattr(similarity, "read_pages", watched)
    model, prompt = FAMILIES["llada"](), torch.arange(2, 42)

    def run(seed: int) -> Any:
        settings = {"gen_length": 16, "block_length": 8, "snapshots": 4}
        return similarity.measure(model, [prompt], max_positions=6, seed=seed, **settings)

    assert run(1) == run(1)
    first, last = asked[0], asked[1]
    assert (len(set(first)), len(set(last))) == (6, 6)
    assert set(first) <= set(range(40))
    assert set(last) <= set(range(48, 56))
    assert asked[:8] == [first, last] * 4
    assert run(1)["keys"]["prompt"] != run(2)["keys"]["prompt"]


@pytest.mark.parametrize("family", FAMILIES)
def test_fp8_pages(family: str) -> None:
    """Near what the same model gives without: an e4m3 number is off by 1/16 of itself at most."""
    model, prompts = FAMILIES[family](4), some_prompts(9, 1)
    plain = similarity.measure(model, prompts, **SHAPE)
    fp8 = similarity.measure(fd.patch(model, kv_cache_dtype="fp8"), prompts, **SHAPE)
    assert fp8["conditions"]["kv_cache_dtype"] == "float8_e4m3fn"
    for kind in ("keys", "values"):
        a, b = (torch.tensor(x[kind]["prompt"]) for x in (plain, fp8))
        assert (b.diagonal(0, 1, 2) - 1).abs().max() < ERROR
        # Layer 0's keys and values of the prompt are its tokens', which never change.
        assert (b[0] - 1).abs().max() < ERROR
        assert 0 < float((a - b).abs().max()) < 0.2


def test_read_pages_reads_positions_across_pages() -> None:
    cache = fd.PagedKVCache(2, 3, 8, num_pages=4, page_size=16)
    other, sequence = cache.add([10, 40])
    for layer in range(2):
        for stored, pages in enumerate(cache.layer(layer)):
            pages.copy_(torch.arange(pages.numel()).view_as(pages) + 10_000 * (2 * layer + stored))
    found = similarity.read_pages(cache, sequence, torch.tensor([0, 15, 16, 39]))
    assert found.shape == (2, 2, 4, 3, 8)
    slots = cache.slots(sequence, 0, 40)
    for i, position in enumerate([0, 15, 16, 39]):
        page, offset = divmod(int(slots[position]), 16)
        for layer in range(2):
            for stored in range(2):
                assert torch.equal(found[stored, layer, i], cache.layer(layer)[stored][page, :, offset])
    cache.free(other)


def test_the_demo_model_keeps_its_prompt() -> None:
    """What the paper's figure 3 shows of LLaDA, on a model of six layers."""
    model, prompts = demo_prompts(1)
    result = similarity.measure(model, prompts, gen_length=32, block_length=16, snapshots=8)
    keys = torch.tensor(result["keys"]["prompt"])
    assert keys.shape == (6, 8, 8)
    assert 0.9 < float(keys.mean()) < 1
    assert float(torch.tensor(result["keys"]["last_block"]).min()) < float(keys.min())


@pytest.mark.parametrize(
    "message, arguments",
    [
        ("cache='dual'", {"cache": "dual"}),
        ("stop_on_eos=True", {"stop_on_eos": True}),
        ("threshold=0.9, factor=None; takes steps", {"threshold": 0.9}),
        ("temperature=0.5", {"temperature": 0.5}),
        ("snapshots=0", {"snapshots": 0}),
        (r"gen_length=\[4\]", {"gen_length": [4]}),
        ("prompts: one is empty", {"prompts": [torch.zeros(0, dtype=torch.int64)]}),
        ("prompts holds none", {"prompts": []}),
    ],
)
def test_bad_input(message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        similarity.measure(FAMILIES["llada"](), **{"prompts": [torch.tensor([4, 5])]} | arguments)
