"""What a generation is given, checked: every message names the argument, what came and what is allowed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastdllm_ext.cache import FP8, PAGE_SIZE, PagedKVCache
from fastdllm_ext.decoding import GenerationConfig, Streamer
from fastdllm_ext.forward import dtype_of, place_of_keys
from fastdllm_ext.patching.family import Family, Geometry, Parts
from fastdllm_ext.patching.registry import Options, patched_family


def check_model(model: nn.Module) -> None:
    """One device and one dtype, unless accelerate or a quantisation arranges that.

    A module that stands in the place of a linear one, with linear ones inside (adapters), may hold any dtype.
    """
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return  # accelerate places the weights, and moves what goes in
    devices = {p.device for p in model.parameters()}
    if len(devices) > 1:
        raise ValueError(f"model: parameters on mixed devices {sorted(map(str, devices))}; takes one")
    parts = patched_family(model).parts(model)
    modules = [parts.embedding, parts.norm, parts.head]
    modules += [module for layer in parts.layers for module in vars(layer).values()]
    own = [p for module in modules for p in module.parameters(recurse=False)]
    floating = {p.dtype for p in own if p.is_floating_point()}
    if len(floating) > 1 and getattr(model.config, "quantization_config", None) is None:
        raise ValueError(f"model: parameters of mixed dtypes {sorted(map(str, floating))}; takes one")


def read_prompts(
    input_ids: Tensor | Sequence[Tensor],
    attention_mask: Tensor | None,
    geometry: Geometry,
    device: torch.device,
    name: str = "input_ids",
) -> list[Tensor]:
    """The rows' prompts without padding: 1-D int64 on the model's device, in the vocabulary."""
    if isinstance(input_ids, Tensor):
        if input_ids.dim() != 2:
            raise ValueError(
                f"{name} has shape {list(input_ids.shape)}; takes [B, P] or a list of 1-D tensors"
            )
        prompts = list(input_ids)
    elif isinstance(input_ids, (list, tuple)):
        if attention_mask is not None:
            raise ValueError(
                f"attention_mask: takes {name} of shape [B, P]; a list of prompts has no padding"
            )
        prompts = list(input_ids)
    else:
        raise TypeError(f"{name}={type(input_ids).__name__}; takes a [B, P] tensor or a list of 1-D tensors")
    if not prompts:
        raise ValueError(f"{name} holds no row; takes one or more")
    for b, prompt in enumerate(prompts):
        if not isinstance(prompt, Tensor):
            raise TypeError(f"{name}[{b}]={type(prompt).__name__}; takes a 1-D int64 tensor")
        if prompt.dim() != 1:
            raise ValueError(f"{name}[{b}] has shape {list(prompt.shape)}; takes 1-D")
        if prompt.dtype != torch.int64:
            raise TypeError(f"{name}[{b}] has dtype {prompt.dtype}; takes torch.int64")
        if prompt.device != device:
            raise ValueError(f"{name} is on {prompt.device}; takes the model's device, {device}")
    if attention_mask is not None:
        prompts = _without_padding(prompts, attention_mask, input_ids.shape)  # type: ignore[union-attr]
    for b, prompt in enumerate(prompts):
        low, high = (int(prompt.min()), int(prompt.max())) if len(prompt) else (0, 0)
        if low < 0 or high >= geometry.vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(f"{name}[{b}] holds token {wrong}; takes 0 to {geometry.vocab_size - 1}")
    return prompts


def check_tokens(prompts: Sequence[Tensor], geometry: Geometry, family: Family, infill: bool) -> None:
    """Masks where they may be, and a token to start from where the family needs one."""
    for b, prompt in enumerate(prompts):
        masks = prompt == geometry.mask_id
        if infill and not bool(masks.any()):
            raise ValueError(
                f"input_ids[{b}] holds no mask token {geometry.mask_id}; infill takes one or more"
            )
        if not infill and bool(masks.any()):
            raise ValueError(
                f"input_ids[{b}] holds the mask token {geometry.mask_id}; takes a prompt without masks, "
                "or infill=True"
            )
        if family.needs_prompt and len(prompt) == 0:
            raise ValueError(
                f"input_ids[{b}] is empty; {family.model_type} takes a prompt of 1 token or more"
            )
        if family.needs_prompt and infill and bool(masks[0]):
            raise ValueError(
                f"input_ids[{b}] begins with a mask; {family.model_type} takes a token before it"
            )


def check_settings(
    family: Family,
    geometry: Geometry,
    config: GenerationConfig,
    prompts: Sequence[Tensor],
    rows: Sequence[Tensor],
    streamer: Streamer | None,
) -> None:
    """Settings against the model and the rows."""
    for b, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        if len(row) > geometry.max_positions:
            what = f"gen_length={len(row) - len(prompt)}: with row {b}'s prompt of {len(prompt)} tokens it"
            what = f"input_ids[{b}] of {len(row)} tokens" if config.infill else what
            raise ValueError(f"{what} exceeds the model's {geometry.max_positions} positions")
    if not family.samples_first and (config.top_p is not None or config.top_k is not None):
        raise ValueError(
            f"top_p={config.top_p}, top_k={config.top_k}: {family.model_type} takes neither; use temperature"
        )
    if streamer is not None and not hasattr(streamer, "on_commit") and len(rows) > 1:
        raise ValueError(f"streamer: takes one row, got {len(rows)}; one with on_commit takes any number")


def with_token_ids(geometry: Geometry, config: GenerationConfig) -> Geometry:
    """The geometry with the token ids that the settings name. ValueError outside of the vocabulary."""
    eos = config.eos_token_id
    tokens: dict[str, Any] = {
        "mask_id": ("mask_token_id", config.mask_token_id),
        "eos_ids": ("eos_token_id", (eos,) if isinstance(eos, int) else None if eos is None else tuple(eos)),
        "pad_id": ("pad_token_id", config.pad_token_id),
    }
    found = {}
    for name, (argument, value) in tokens.items():
        if value is None:
            continue
        for token in value if isinstance(value, tuple) else (value,):
            if token >= geometry.vocab_size:
                raise ValueError(f"{argument}={token}; takes 0 to {geometry.vocab_size - 1}")
        found[name] = value
    return replace(geometry, **found)


def append_masks(prompts: Sequence[Tensor], config: GenerationConfig, geometry: Geometry) -> list[Tensor]:
    """Each prompt with as many masks behind it as are to be generated."""
    counts = _per_row("gen_length", config.gen_length, len(prompts))
    return [
        torch.cat((prompt, prompt.new_full((n,), geometry.mask_id)))
        for prompt, n in zip(prompts, counts, strict=True)
    ]


def _without_padding(prompts: list[Tensor], attention_mask: Tensor, shape: torch.Size) -> list[Tensor]:
    if not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask={type(attention_mask).__name__}; takes a tensor")
    if attention_mask.shape != shape:
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}; takes input_ids' shape {list(shape)}"
        )
    kept = []
    for b, (prompt, mask) in enumerate(zip(prompts, attention_mask.to(prompts[0].device), strict=True)):
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError(f"attention_mask[{b}] holds other values than 0 and 1")
        where = mask.nonzero().squeeze(1)
        if len(where) and int(where[-1] - where[0]) + 1 != len(where):
            raise ValueError(
                f"attention_mask[{b}] has zeros inside the prompt; takes padding at its ends only"
            )
        kept.append(prompt[where])
    return kept


def _per_row(name: str, value: int | Sequence[int], rows: int) -> list[int]:
    if isinstance(value, int):
        return [value] * rows
    if len(value) != rows:
        raise ValueError(f"{name} holds {len(value)} numbers for {rows} rows; takes one, or one for each row")
    return list(value)


def row_seeds(config: GenerationConfig, rows: int) -> list[tuple[int, int]]:
    """(Philox key, stream) of each row."""
    if config.seed is None:
        sampled = config.temperature > 0 or config.alg_temp > 0 or config.remasking == "random"
        seed = int(torch.randint(2**62, ()).item()) if sampled else 0
        return [(seed, b) for b in range(rows)]
    if isinstance(config.seed, int):
        return [(config.seed, b) for b in range(rows)]
    return [(seed, 0) for seed in _per_row("seed", config.seed, rows)]


def open_cache(
    cache: PagedKVCache | None,
    geometry: Geometry,
    lengths: Callable[[int], Sequence[int]],
    parts: Parts,
    options: Options,
) -> PagedKVCache:
    """The cache that was given, if it fits the model; else one of as many pages as the rows need.

    ``lengths``: from the positions a page holds, those of the sequences they need.

    One that was given holds the model's own dtype or fp8, whatever the options ask for.
    """
    shape, dtype, devices = place_of_keys(geometry, parts, options)
    if cache is None:
        pages = PagedKVCache.pages_for(lengths(PAGE_SIZE))
        return PagedKVCache(*shape, num_pages=pages, dtype=dtype, device=devices)
    if not isinstance(cache, PagedKVCache):
        raise TypeError(f"kv_cache={type(cache).__name__}; takes a fastdllm_ext.PagedKVCache")
    dtypes = (dtype_of(parts), FP8)
    if (cache.geometry, cache.devices) != (shape, devices) or cache.dtype not in dtypes:
        raise ValueError(
            f"kv_cache holds (layers, kv heads, head_dim) {cache.geometry} in {cache.dtype} on "
            f"{_names(cache.devices)}; takes {shape} in {dtypes[0]} or {FP8} on {_names(devices)}"
        )
    return cache


def _names(devices: Sequence[torch.device]) -> str:
    return ", ".join(map(str, dict.fromkeys(devices)))
