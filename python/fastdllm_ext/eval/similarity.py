"""How alike keys and values are from step to step: why a cache works at all (Fast-dLLM, figure 3).

Every step of an uncached decode computes all keys and values anew. Of each layer, the cosine of a head's key
at one denoising step and at another is averaged over heads and positions, once over the prompt's positions
and once over those of the last block; likewise the values'. Keys are taken as they are stored, after RoPE:
it turns both by the same angle, so the cosine is that of the keys before it.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdllm_ext.cache import FP8, PagedKVCache
from fastdllm_ext.checks import check_count
from fastdllm_ext.decoder import Decoder
from fastdllm_ext.decoding import GenerationConfig
from fastdllm_ext.eval.steps import heading, require_greedy
from fastdllm_ext.generate import opened

__all__ = ["measure"]

KINDS = ("keys", "values")
REGIONS = ("prompt", "last_block")


@torch.no_grad()
def measure(
    model: nn.Module,
    prompts: Sequence[Tensor],
    *,
    name: str = "",
    snapshots: int = 32,
    max_prompts: int = 8,
    max_positions: int = 64,
    seed: int = 0,
    progress: Callable[..., Any] = iter,
    **settings: Any,
) -> dict[str, Any]:
    """Cosine similarity of keys and of values between denoising steps, of each layer.

    Prompts are decoded one at a time with ``cache="none"``, to the last mask. Of one prompt the snapshots are
    kept in memory, off the device: 2 x snapshots x layers x (positions of prompt and last block, at most
    ``max_positions`` each) x kv heads x head_dim numbers in the dtype of the pages (bfloat16 of fp8). With
    the defaults and blocks of 32 that is 1.6 GB for LLaDA-8B in bfloat16, and 0.2 GB for Dream-7B.

    Args:
        model: a patched model; with keys and values in fp8, those are what is compared.
        prompts: 1-D int64 each, of a token or more, on the model's device.
        name: of the model, for the result.
        snapshots: denoising steps that are compared, at most: every so many-th.
        max_prompts: the first so many are taken.
        max_positions: of a prompt, and of the last block, drawn from them where there are more.
        seed: of that draw.
        progress: wraps an iterable, as tqdm does.
        **settings: ``gen_length``, ``block_length``, ``steps`` (by default one token a step; no other rule,
            so that a step means the same in all rows), and what else a greedy, uncached decode takes.

    Returns:
        ``model``, ``conditions``; ``steps`` [S], the denoising steps compared, and ``blocks`` [S], the block
        that each filled; ``keys`` and ``values``, each with ``prompt`` and ``last_block``: [layers, S, S]
        cosines, the mean over prompts, to five decimals.

    Raises:
        ValueError: another rule, settings that sample or guide, an empty prompt, or none.
    """
    limits = {"snapshots": snapshots, "max_prompts": max_prompts, "max_positions": max_positions}
    for key, value in limits.items():
        check_count(key, value)
    config = _uncached(settings)
    rule = {} if settings.get("steps") else {"rule": "one a step"}
    prompts = list(prompts[:max_prompts])
    if not all(map(len, prompts)):
        raise ValueError("prompts: one is empty; takes 1 token or more each")
    total: Tensor | None = None
    for b, prompt in enumerate(progress(prompts)):
        rng = random.Random(f"{seed} {b}")
        with opened(Decoder, model, [prompt], None, config) as decoder:
            steps, blocks, cosines = _watch(decoder, snapshots, max_positions, rng)
        total = cosines if total is None else total + cosines
    if total is None:
        raise ValueError("prompts holds none; takes one or more")
    return {
        **heading("similarity", model, name, prompts, config, limits | {"seed": seed} | rule),
        "steps": steps,
        "blocks": blocks,
        **{
            kind: {region: _rounded(x) for region, x in zip(REGIONS, by_region, strict=True)}
            for kind, by_region in zip(KINDS, total / len(prompts), strict=True)
        },
    }


def _uncached(settings: dict[str, Any]) -> GenerationConfig:
    """The settings of a decode whose steps are the same for every row."""
    for key in ("cache", "stop_on_eos", "infill", "schedule"):
        if key in settings:
            raise ValueError(f"{key}={settings[key]!r}; is the analysis's own to set")
    config = GenerationConfig.build(None, {"cache": "none", "stop_on_eos": False} | settings)
    if not isinstance(config.gen_length, int):
        raise ValueError(f"gen_length={config.gen_length!r}; takes one for all rows")
    if config.threshold is not None or config.factor is not None:
        raise ValueError(f"threshold={config.threshold}, factor={config.factor}; takes steps")
    if config.steps is None:  # a short last block shares the steps evenly, and one each is all that it takes
        config = replace(config, steps=-(-config.gen_length // config.block_length) * config.block_length)
    require_greedy(config)
    return config


def _watch(
    decoder: Decoder, snapshots: int, max_positions: int, rng: random.Random
) -> tuple[list[int], list[int], Tensor]:
    """Decodes the one row: the steps looked at, the block of each, and [2, 2, layers, S, S] cosines."""
    (row,) = decoder.rows
    last = row.blocks[-1]
    regions = [
        _draw(rng, range(row.first), max_positions),
        _draw(rng, range(last.begin, last.end), max_positions),
    ]
    forwards = min(max(row.config.steps or 0, len(row.blocks)), row.end - row.first)  # or less
    stride = -(-forwards // snapshots)
    steps, blocks = [], []
    kept: list[list[Tensor]] = []  # of each snapshot, of each region
    for number in itertools.count():
        if row.done:
            break
        block = row.block
        decoder.turn()
        if number % stride == 0:
            steps.append(number)
            blocks.append(block)
            kept.append([read_pages(decoder.cache, row.sequences[0], where) for where in regions])
    cosines = [
        [
            torch.stack([_cosines([x[kind, layer] for x in region]) for layer in range(len(region[0][0]))])
            for region in zip(*kept, strict=True)
        ]
        for kind in range(len(KINDS))
    ]
    return steps, blocks, torch.stack([torch.stack(x) for x in cosines])


def _draw(rng: random.Random, positions: range, most: int) -> Tensor:
    return torch.tensor(sorted(rng.sample(positions, min(most, len(positions)))))


def read_pages(cache: PagedKVCache, sequence: int, positions: Tensor) -> Tensor:
    """[2, layers, P, kv heads, head_dim] on the CPU: keys and values as they are stored.

    Of fp8 the numbers without their scales, in bfloat16, which holds them exactly: a scale that a whole
    vector shares is nothing to its cosine.
    """
    slots = cache.slots(sequence, 0, int(positions.max()) + 1)[positions]
    page, offset = slots // cache.page_size, slots % cache.page_size
    found = []
    for stored in range(len(KINDS)):
        layers = []
        for layer in range(cache.geometry[0]):
            pages = cache.layer(layer)[stored]
            if pages.dtype == FP8:  # whose bytes can be indexed, but not it
                x = pages.view(torch.uint8)[page, :, offset].view(FP8).bfloat16()
            else:
                x = pages[page, :, offset]
            layers.append(x.cpu())
        found.append(torch.stack(layers))
    return torch.stack(found)


def _cosines(snapshots: Sequence[Tensor]) -> Tensor:
    """S times [P, heads, head_dim] -> [S, S] float64, the mean over positions and heads."""
    x = F.normalize(torch.stack(list(snapshots)).float(), dim=-1)
    flat = x.flatten(1)
    return (flat @ flat.T).double() / (x.shape[1] * x.shape[2])


def _rounded(x: Tensor) -> Any:
    return [[[round(value, 5) for value in line] for line in layer] for layer in x.tolist()]
