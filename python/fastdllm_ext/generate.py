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
from fastdllm_ext.decoder import Decoder, DecodingRow
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
from fastdllm_ext.shadows import pages_of_shadows

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
        output = _output(decoder)
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
    lengths = [len(row) for row in rows] * (2 if config.cfg_scale else 1)
    for prompt, row in zip(prompts, rows, strict=True):
        answer = len(row) - (0 if config.infill else len(prompt))
        lengths += [1] * pages_of_shadows(config, answer, family.shift)  # a page each
    kv_cache = open_cache(kv_cache, geometry, lengths, parts, patched_options(model))

    decoder = decoder_class(model, geometry, config, kv_cache, rows, row_seeds(config, len(rows)))
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


def _output(decoder: Decoder) -> GenerationOutput:
    """Cuts every row at its first EOS and gathers the results."""
    rows, device = decoder.rows, decoder.tokens.device
    first = torch.tensor([row.first for row in rows], device=device)
    total = torch.tensor([row.end for row in rows], device=device)
    position = torch.arange(decoder.tokens.shape[1], device=device)[None]
    answer = (position >= first[:, None]) & (position < total[:, None])
    eos_ids = () if decoder.config.infill else decoder.geometry.eos_ids
    eos = answer & torch.isin(decoder.tokens, torch.tensor(eos_ids, dtype=torch.int64, device=device))
    lengths = torch.where(eos.any(1), eos.int().argmax(1) + 1, total)
    if decoder.config.stop_on_eos:  # what lies behind an EOS is not part of the answer
        behind = answer & (position >= lengths[:, None])
        decoder.tokens[behind] = decoder.geometry.pad_id
        decoder.step_map[behind] = -1
        decoder.confidence[behind] = 0.0
    offsets = first[:, None] + torch.arange(max(row.end - row.first for row in rows), device=device)[None]
    inside = offsets < total[:, None]
    offsets = offsets.clamp(max=decoder.tokens.shape[1] - 1)
    return GenerationOutput(
        sequences=decoder.tokens,
        lengths=lengths,
        prompt_lengths=first,
        nfe=torch.tensor([row.nfe for row in rows], device=device),
        step_map=decoder.step_map.gather(1, offsets).masked_fill(~inside, -1),
        confidence=decoder.confidence.gather(1, offsets).masked_fill(~inside, 0.0),
        timings=decoder.timings.read(),
    )


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
        for row in active:
            for step in range(self.steps[row.index], row.nfe):
                self._commit(row, step)
            self.steps[row.index] = row.nfe

    def _commit(self, row: DecodingRow, step: int) -> None:
        b = row.index
        where = (self.decoder.step_map[b] == step).nonzero().squeeze(1)
        tokens, confidence = self.decoder.tokens[b, where], self.decoder.confidence[b, where]
        positions = (where - row.first).tolist()
        self.on_commit(Commit(b, step, positions, tokens.tolist(), confidence.tolist()))

    def end(self, output: GenerationOutput) -> None:
        if self.on_commit is None:
            self._put(int(output.lengths[0]))
        self.streamer.end()

    def _put(self, end: int) -> None:
        if end > self.sent:
            self.streamer.put(self.decoder.tokens[0, self.sent : end].cpu())
            self.sent = end
