"""``generate``: arguments in, turns of the decoder until every row is done, results out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from fastdllm_ext.arguments import (
    append_masks,
    check_model,
    check_settings,
    check_tokens,
    open_cache,
    read_prompts,
    row_seeds,
    with_token_ids,
)
from fastdllm_ext.cache import PagedKVCache
from fastdllm_ext.decoder import Common, Decoder
from fastdllm_ext.decoding import (
    CONFIG_KEY,
    Commit,
    GenerationConfig,
    GenerationOutput,
    Streamer,
    takes_config_fields,
)
from fastdllm_ext.forward import device_of, evaluating
from fastdllm_ext.patching.registry import patched_family, patched_options, unwrapped
from fastdllm_ext.rows import DecodingRow

__all__ = ["generate"]

Prompts = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


@overload
def generate(
    model: nn.Module,
    input_ids: Prompts,
    *,
    attention_mask: Tensor | None = None,
    config: GenerationConfig | None = None,
    streamer: Streamer | None = None,
    kv_cache: PagedKVCache | None = None,
    return_dict_in_generate: Literal[True] = True,
    **arguments: Any,
) -> GenerationOutput: ...


@overload
def generate(
    model: nn.Module,
    input_ids: Prompts,
    *,
    attention_mask: Tensor | None = None,
    config: GenerationConfig | None = None,
    streamer: Streamer | None = None,
    kv_cache: PagedKVCache | None = None,
    return_dict_in_generate: Literal[False],
    **arguments: Any,
) -> Tensor: ...


@takes_config_fields
def generate(
    model: nn.Module,
    input_ids: Prompts,
    *,
    attention_mask: Tensor | None = None,
    config: GenerationConfig | None = None,
    streamer: Streamer | None = None,
    kv_cache: PagedKVCache | None = None,
    return_dict_in_generate: bool = True,
    **arguments: Any,
) -> GenerationOutput | Tensor:
    """Fills each row's answer by iterative unmasking (Fast-dLLM, arXiv 2505.22618, Algorithm 1).

    Args:
        model: a patched model.
        input_ids: [B, P] int64, or a list of 1-D int64 tensors of unequal length, or what a tokenizer
            returns (a mapping with ``input_ids`` and perhaps ``attention_mask``).
        attention_mask: [B, P], 0 at padding, to the left or the right of a row's prompt.
        config: a :class:`GenerationConfig`; keyword arguments are laid over it. Without one, what the
            checkpoint's generation_config.json says (:func:`defaults_of`).
        streamer: HuggingFace's streamer protocol (one row: finished tokens from left to right), or an
            object with ``on_commit(commit)``, which sees every commit of every row.
        kv_cache: pages to use, in the model's dtype or torch.float8_e4m3fn; by default as many as the rows
            need, for this call, in what :func:`fastdllm_ext.patch` was told.
        return_dict_in_generate: False returns ``sequences`` alone.
        **arguments: the fields of :class:`GenerationConfig`: ``gen_length``, ``block_length``,
            ``steps``, ``threshold``, ``factor``, ``rule``, ``temperature``, ``cache``, ``seed``, ...

    Returns:
        A :class:`GenerationOutput`. Each row's tokens are those that it gets alone.

    Raises:
        TypeError: an unknown argument, or one of the wrong type.
        ValueError: one that is out of range; the message names it, what came and what is allowed. A
            model that is not patched. NaN or infinite logits. OutOfPages: ``kv_cache`` is too small.
    """
    if not isinstance(return_dict_in_generate, bool):
        raise TypeError(f"return_dict_in_generate={return_dict_in_generate!r}; takes True or False")
    arguments.pop("token_type_ids", None)  # from **tokenizer(...): tokenizers make it, no model here reads it
    output = run(
        Decoder,
        model,
        input_ids,
        attention_mask=attention_mask,
        config=GenerationConfig.build(defaults_of(model) if config is None else config, arguments),
        streamer=streamer,
        kv_cache=kv_cache,
    )
    return output if return_dict_in_generate else output.sequences


def run(
    decoder_class: Callable[..., Decoder],
    model: nn.Module,
    input_ids: Prompts,
    *,
    attention_mask: Tensor | None,
    config: GenerationConfig,
    streamer: Streamer | None,
    kv_cache: PagedKVCache | None,
) -> GenerationOutput:
    """Checks arguments, then takes turns until every row is done. See :func:`generate`."""
    with opened(decoder_class, model, input_ids, attention_mask, config, streamer, kv_cache) as decoder:
        report = _Reporter(streamer, decoder) if streamer is not None else None
        while any(not row.done for row in decoder.rows):
            active = decoder.turn()
            if report is not None:
                report(active)
        output = output_of(decoder, decoder.rows)
        if report is not None:
            report.end(output)
    return output


@contextmanager
def opened(
    decoder_class: Callable[..., Decoder],
    model: nn.Module,
    input_ids: Prompts,
    attention_mask: Tensor | None,
    config: GenerationConfig,
    streamer: Streamer | None = None,
    kv_cache: PagedKVCache | None = None,
) -> Iterator[Decoder]:
    """A decoder whose arguments are checked and whose pages are given back: for those who take its turns."""
    family, model = patched_family(model), unwrapped(model)
    geometry, parts = with_token_ids(family.geometry(model), config), family.parts(model)
    check_model(model)
    if isinstance(input_ids, Mapping):
        attention_mask = input_ids.get("attention_mask") if attention_mask is None else attention_mask
        if "input_ids" not in input_ids:
            raise ValueError(f"input_ids holds {sorted(input_ids)}; takes a mapping with 'input_ids'")
        input_ids = input_ids["input_ids"]
    prompts = read_prompts(input_ids, attention_mask, geometry, device_of(parts.embedding))
    check_tokens(prompts, geometry, family, config.infill)
    rows = prompts if config.infill else append_masks(prompts, config, geometry)
    check_settings(family, geometry, config, prompts, rows, streamer)
    if not geometry.eos_ids:
        config = replace(config, stop_on_eos=False)
    decoding = [
        DecodingRow.of(row, config, seed, geometry.mask_id)
        for row, seed in zip(rows, row_seeds(config, len(rows)), strict=True)
    ]

    def lengths(page_size: int) -> list[int]:
        return [n for row in decoding for n in row.page_lengths(family.shift, page_size)]

    kv_cache = open_cache(kv_cache, geometry, lengths, parts, patched_options(model))
    decoder = decoder_class(model, Common.of(geometry, config), kv_cache, decoding)
    try:
        with evaluating(model):
            yield decoder
    finally:
        decoder.close()


def defaults_of(model: nn.Module) -> GenerationConfig:
    """The settings that a model's own ``generation_config`` asks for, where it has one.

    What :meth:`GenerationConfig.save_pretrained` wrote counts before all. Otherwise HuggingFace's keys:
    ``max_new_tokens``, and where ``do_sample`` is set, ``temperature`` (and, in families that have them,
    ``top_p`` and ``top_k``). The ids of EOS, padding and mask are taken from it in any case.
    """
    family = patched_family(model)
    theirs: Any = getattr(unwrapped(model), "generation_config", None)
    ours = getattr(theirs, CONFIG_KEY, None)
    if ours is not None:
        return GenerationConfig.from_dict(ours)
    values: dict[str, Any] = {}
    if getattr(theirs, "max_new_tokens", None) is not None:
        values["gen_length"] = theirs.max_new_tokens
    if getattr(theirs, "do_sample", False):
        values["temperature"] = 1.0 if theirs.temperature is None else theirs.temperature
        if family.samples_first:
            values |= {"top_p": theirs.top_p, "top_k": theirs.top_k or None}
    return GenerationConfig(**values)


def output_of(decoder: Decoder, rows: Sequence[DecodingRow]) -> GenerationOutput:
    """What stands in rows, each cut at its first EOS."""
    device = decoder.device
    index = torch.tensor([row.index for row in rows], device=device)
    first = torch.tensor([row.first for row in rows], device=device)
    total = torch.tensor([row.end for row in rows], device=device)
    position = torch.arange(max(row.end for row in rows), device=device)[None]
    tokens, steps, confidence = (
        x[index, : position.shape[1]] for x in (decoder.tokens, decoder.step_map, decoder.confidence)
    )
    answer = (position >= first[:, None]) & (position < total[:, None])
    ids = torch.tensor(decoder.geometry.eos_ids, dtype=torch.int64, device=device)
    infill = torch.tensor([row.config.infill for row in rows], device=device)
    eos = answer & torch.isin(tokens, ids) & ~infill[:, None]
    lengths = torch.where(eos.any(1), eos.int().argmax(1) + 1, total)
    stops = torch.tensor([row.config.stop_on_eos for row in rows], device=device)
    # What lies behind an EOS is not part of the answer.
    behind = position >= torch.where(stops, lengths, total)[:, None]
    offsets = first[:, None] + torch.arange(max(row.end - row.first for row in rows), device=device)[None]
    outside = offsets >= total[:, None]
    offsets = offsets.clamp(max=position.shape[1] - 1)
    return GenerationOutput(
        sequences=tokens.masked_fill(behind, decoder.geometry.pad_id),
        lengths=lengths,
        prompt_lengths=first,
        nfe=torch.tensor([row.nfe for row in rows], device=device),
        step_map=steps.masked_fill(behind, -1).gather(1, offsets).masked_fill(outside, -1),
        confidence=confidence.masked_fill(behind, 0.0).gather(1, offsets).masked_fill(outside, 0.0),
        timings=decoder.timings.read(),
    )


def commits_of(decoder: Decoder, rows: Sequence[DecodingRow], since: Sequence[int]) -> list[list[Commit]]:
    """Of each row, what its steps from ``since`` on have filled, one by one; ``Commit.row`` is its index."""
    if not rows:
        return []
    index = torch.tensor([row.index for row in rows], device=decoder.device)
    steps = decoder.step_map[index]
    where = steps >= torch.tensor(since, device=decoder.device)[:, None]
    places = where.nonzero()
    at = (index[places[:, 0]], places[:, 1])
    found = [
        {step: Commit(row.index, step, [], [], []) for step in range(first, row.nfe)}
        for row, first in zip(rows, since, strict=True)
    ]
    for r, position, step, token, confidence in zip(
        *places.T.tolist(),
        steps[where].tolist(),
        decoder.tokens[at].tolist(),
        decoder.confidence[at].tolist(),
        strict=True,
    ):
        commit = found[r][step]
        commit.positions.append(position - rows[r].first)
        commit.tokens.append(token)
        commit.confidence.append(confidence)
    return [list(commits.values()) for commits in found]


class _Reporter:
    """Feeds a streamer: every commit, or the finished tokens of the one row from left to right."""

    def __init__(self, streamer: Streamer, decoder: Decoder) -> None:
        self.streamer, self.decoder = streamer, decoder
        self.on_commit: Any = getattr(streamer, "on_commit", None)
        self.sent = decoder.rows[0].first
        self.steps = [0] * len(decoder.rows)  # of each row that were reported
        if self.on_commit is None:
            streamer.put(decoder.tokens[0, : self.sent].cpu())

    def __call__(self, active: list[DecodingRow]) -> None:
        if self.on_commit is None:
            row = self.decoder.rows[0]
            if not row.done:
                self._put(row.blocks[row.block].begin)
            return
        for row, commits in zip(
            active, commits_of(self.decoder, active, [self.steps[row.index] for row in active]), strict=True
        ):
            for commit in commits:
                self.on_commit(commit)
            self.steps[row.index] = row.nfe

    def end(self, output: GenerationOutput) -> None:
        if self.on_commit is None:
            self._put(int(output.lengths[0]))
        self.streamer.end()

    def _put(self, end: int) -> None:
        if end > self.sent:
            self.streamer.put(self.decoder.tokens[0, self.sent : end].cpu())
            self.sent = end
