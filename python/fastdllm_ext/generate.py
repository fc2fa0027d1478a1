"""The decoding loop (Fast-dLLM, Algorithm 1), once, for every family, cache mode and rule.

    for each block of a row:
        refresh:    forward over the whole row; commit inside the block
        block step: forward over the cache mode's queries; commit; until the block holds no mask

Its heart is :meth:`Decoder.turn`: the active rows, each of which either refreshes or takes a block
step, form one ragged forward; then `unmask` commits in all of them, and the rows advance.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastdllm_ext import ops
from fastdllm_ext.cache import PagedKVCache
from fastdllm_ext.decoding import (
    REMASKING,
    Commit,
    GenerationConfig,
    GenerationOutput,
    Streamer,
    Timings,
    takes_config_fields,
)
from fastdllm_ext.ops import Row
from fastdllm_ext.patching import registry
from fastdllm_ext.patching.family import Attention, Family, Geometry, Layout, attending
from fastdllm_ext.patching.registry import patched_family

__all__ = ["Decoder", "generate", "patch"]


@dataclass
class DecodingRow:
    """The host's view of one row: where it stands, and where its keys lie.

    Attributes:
        index: its row in the decoder's tensors.
        sequence: its number in the cache.
        prompt_length, gen_length: P and G.
        bounds: the blocks' boundaries as positions, N + 1 numbers from P to P + G.
        block: the block being filled.
        fresh: the next step is the block's first: a refresh.
        masks_left: masks of the block.
        nfe: forwards taken.
        done: finished.
    """

    index: int
    sequence: int
    prompt_length: int
    gen_length: int
    bounds: list[int]
    block: int = 0
    fresh: bool = True
    masks_left: int = 0
    nfe: int = 0
    done: bool = False

    @property
    def end(self) -> int:
        """One past the last position."""
        return self.prompt_length + self.gen_length

    def queries(self, cache: str) -> tuple[int, int]:
        """Positions that the next forward computes."""
        if self.fresh or cache == "none":
            return 0, self.end
        begin, end = self.bounds[self.block], self.bounds[self.block + 1]
        return (begin, self.end) if cache == "prefix" else (begin, end)


@dataclass(frozen=True)
class Plan:
    """Index tensors of one ragged forward; the same for every step of a block.

    Attributes:
        tokens: [T] int64, the queries' places in the flattened tokens.
        layout: positions, slots and offsets for the attention.
        block_tokens: [S] int64, the blocks' positions, as places in the flattened tokens.
        block_queries: [S] int64, the same positions, as places among the queries.
        block_positions: [S] int64, the same, within their rows.
    """

    tokens: Tensor
    layout: Layout
    block_tokens: Tensor
    block_queries: Tensor
    block_positions: Tensor


class Decoder:
    """Tensors of a batch of rows, and the turn that advances them.

    Args:
        model: a patched model.
        config: block length, cache mode, rule and temperature, shared by the rows.
        cache: where keys and values go.
        prompts: one 1-D int64 tensor a row.
        gen_lengths: one number a row.
        seeds: (seed, stream) of each row.
    """

    def __init__(
        self,
        model: nn.Module,
        config: GenerationConfig,
        cache: PagedKVCache,
        prompts: Sequence[Tensor],
        gen_lengths: Sequence[int],
        seeds: Sequence[tuple[int, int]],
    ) -> None:
        self.model, self.config, self.cache = model, config, cache
        self.family: Family = patched_family(model)
        self.geometry: Geometry = self.family.geometry(model)
        self.attention = Attention(self.geometry, cache)
        device = cache.storage.device
        self.timings = _Clock(device)

        totals = [len(p) + g for p, g in zip(prompts, gen_lengths, strict=True)]
        count, width = len(totals), max(totals)
        self.tokens = torch.full((count, width), self.geometry.pad_id, dtype=torch.int64, device=device)
        self.step_map = torch.full((count, width), -1, dtype=torch.int32, device=device)
        self.confidence = torch.zeros((count, width), dtype=torch.float32, device=device)
        self.eos_ids = torch.tensor(
            self.geometry.eos_ids if config.stop_on_eos else (), dtype=torch.int64, device=device
        )
        self.knobs = torch.tensor(
            [[config.value, config.temperature, 1.0, 1.0, 0.0]] * count, dtype=torch.float32, device=device
        )
        state = torch.zeros((count, len(Row)), dtype=torch.int64)
        for b, (prompt, total) in enumerate(zip(prompts, totals, strict=True)):
            self.tokens[b, : len(prompt)] = prompt
            self.tokens[b, len(prompt) : total] = self.geometry.mask_id
            state[b, Row.RULE] = config.rule
            state[b, Row.SCORE] = REMASKING[config.remasking]
            state[b, Row.SEED], state[b, Row.STREAM] = seeds[b]
            state[b, Row.FIRST], state[b, Row.END] = len(prompt), total
            state[b, Row.EOS_AT] = -1
        self.state = state.to(device)
        self._plan_key: list[tuple[int, int, int, int]] | None = None
        self._plan: Plan | None = None
        self.rows: list[DecodingRow] = []
        for b, sequence in enumerate(cache.add(totals)):  # last: from here on close() gives the pages back
            first = len(prompts[b])
            bounds = [*range(first, totals[b], config.block_length), totals[b]]
            self.rows.append(DecodingRow(b, sequence, first, gen_lengths[b], bounds))
            self._enter_block(self.rows[b])

    def close(self) -> None:
        """Gives the rows' pages back."""
        for row in self.rows:
            self.cache.free(row.sequence)
        self.rows = []

    @torch.no_grad()
    def turn(self) -> list[DecodingRow]:
        """One forward of every row that is not done; returns the rows that took part."""
        active = [row for row in self.rows if not row.done]
        refreshing = any(row.fresh or self.config.cache == "none" for row in active)
        plan = self._make_plan(active)
        with self.timings.phase("refresh" if refreshing else "block_steps"):
            logits, positions = self._forward(plan, sum(row.masks_left for row in active))
        with self.timings.phase("selection"):
            counts = [0] * len(self.rows)
            for row in active:
                counts[row.index] = row.masks_left
            cu_rows = torch.tensor(
                [0, *itertools.accumulate(counts)], dtype=torch.int32, device=logits.device
            )
            ops.unmask(
                logits,
                cu_rows,
                positions,
                self.tokens,
                self.step_map,
                self.confidence,
                self.state,
                self.knobs,
                self.eos_ids,
                self.geometry.mask_id,
            )
            state = self.state.tolist()  # the turn's one wait for the device
        if any(state[row.index][Row.BAD_LOGITS] for row in active):
            raise ValueError(self._describe_bad_logits(plan, state))
        for row in active:
            self._advance(row, state[row.index])
        return active

    def _forward(self, plan: Plan, masks: int) -> tuple[Tensor, Tensor]:
        """Logits [masks, vocab] of the blocks' masked positions, and those positions [masks]."""
        flat = self.tokens.view(-1)
        self.attention.layout = plan.layout
        with attending(self.attention):
            hidden = self.family.hidden(self.model, flat[plan.tokens])
        masked = flat[plan.block_tokens] == self.geometry.mask_id
        chosen = torch.nonzero_static(masked, size=masks).squeeze(1)  # the count is known: no wait
        logits = self.family.logits(self.model, hidden[plan.block_queries[chosen]])
        return logits, plan.block_positions[chosen]

    def _make_plan(self, active: list[DecodingRow]) -> Plan:
        key = [(row.index, row.block, *row.queries(self.config.cache)) for row in active]
        if self._plan is None or key != self._plan_key:
            self._plan, self._plan_key = self._build_plan(active), key
        return self._plan

    def _build_plan(self, active: list[DecodingRow]) -> Plan:
        device, width = self.tokens.device, self.tokens.shape[1]
        tokens, positions, slots, offsets = [], [], [], [0]
        block_tokens, block_queries, block_positions = [], [], []
        for row in active:
            begin, end = row.queries(self.config.cache)
            self.cache.prepare_write(row.sequence, begin, end)
            where = torch.arange(begin, end)
            tokens.append(where + row.index * width)
            positions.append(where)
            slots.append(self.cache.slots(row.sequence, begin, end))
            block = torch.arange(row.bounds[row.block], row.bounds[row.block + 1])
            block_tokens.append(block + row.index * width)
            block_queries.append(block - begin + offsets[-1])
            block_positions.append(block)
            offsets.append(offsets[-1] + end - begin)
        layout = Layout(
            positions=torch.cat(positions).to(device),
            slots=torch.cat(slots).to(device),
            block_table=self.cache.block_table([row.sequence for row in active]),
            kv_lens=torch.tensor([row.end for row in active], dtype=torch.int32, device=device),
            cu_seqlens_q=torch.tensor(offsets, dtype=torch.int32, device=device),
            max_seqlen_q=max(b - a for a, b in itertools.pairwise(offsets)),
        )
        indices = (torch.cat(x).to(device) for x in (tokens, block_tokens, block_queries, block_positions))
        flat, block_flat, queries, block_where = indices
        return Plan(flat, layout, block_flat, queries, block_where)

    def _advance(self, row: DecodingRow, state: list[int]) -> None:
        """Takes over what the device says of a row: block filled, row finished."""
        row.nfe, row.masks_left, row.fresh = state[Row.STEP], state[Row.MASKS_LEFT], False
        if state[Row.EOS_AT] >= 0:
            row.done = True
        elif row.masks_left == 0:
            row.block += 1
            if row.block == len(row.bounds) - 1:
                row.done = True
            else:
                self._enter_block(row)

    def _enter_block(self, row: DecodingRow) -> None:
        """Sets the state of the row's next block: all masks, no step taken, its share of the steps."""
        row.fresh = True
        row.masks_left = row.bounds[row.block + 1] - row.bounds[row.block]
        share, rest = divmod(self.config.steps or 0, len(row.bounds) - 1)
        steps = max(1, share + (row.block < rest))
        first, last = Row.BLOCK_STEP, Row.MASKS_LEFT
        values = [0, row.masks_left, steps, row.masks_left]  # BLOCK_STEP, _MASKS, _STEPS, MASKS_LEFT
        self.state[row.index, first : last + 1] = torch.tensor(values, device=self.state.device)

    def _describe_bad_logits(self, plan: Plan, state: list[list[int]]) -> str:
        """Which rows, and the first module whose output went wrong: the same forward once more, watched."""
        found: list[str] = []

        def watch(name: str, module: nn.Module) -> Any:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                first = output[0] if isinstance(output, tuple) else output
                if not found and isinstance(first, Tensor) and not bool(first.isfinite().all()):
                    found.append(name)

            return module.register_forward_hook(hook)

        handles = [watch(name, module) for name, module in self.model.named_modules() if name]
        try:
            self._forward(plan, sum(row.masks_left for row in self.rows if not row.done))
        finally:
            for handle in handles:
                handle.remove()
        rows = [b for b, fields in enumerate(state) if fields[Row.BAD_LOGITS]]
        where = f"the output of {found[0]}" if found else "the logits"
        return (
            f"logits: NaN or infinite in rows {rows} at step {state[rows[0]][Row.STEP]}; first in {where}. "
            "Nothing was committed"
        )


class _Clock:
    """Adds up seconds by phase: wall time on the CPU, events on a GPU (read once, at the end)."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._start = perf_counter()
        self._spans: list[tuple[str, Any, Any]] = []

    def _now(self) -> Any:
        if not self._cuda:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begin = self._now()
        yield
        self._spans.append((name, begin, self._now()))

    def read(self) -> Timings:
        if self._cuda:
            torch.cuda.synchronize()
        timings = Timings(total=perf_counter() - self._start)
        for name, begin, end in self._spans:
            seconds = begin.elapsed_time(end) / 1e3 if self._cuda else end - begin
            setattr(timings, name, getattr(timings, name) + seconds)
        return timings


@takes_config_fields
def generate(
    model: nn.Module,
    input_ids: Tensor | Sequence[Tensor],
    *,
    attention_mask: Tensor | None = None,
    config: GenerationConfig | None = None,
    streamer: Streamer | None = None,
    kv_cache: PagedKVCache | None = None,
    **arguments: Any,
) -> GenerationOutput:
    """Fills each row's answer by iterative unmasking (Fast-dLLM, arXiv 2505.22618, Algorithm 1).

    Args:
        model: a patched model.
        input_ids: [B, P] int64, or a list of 1-D int64 tensors of unequal length.
        attention_mask: [B, P], 0 at padding, to the left or the right of a row's prompt.
        config: a :class:`GenerationConfig`; keyword arguments are laid over it.
        streamer: HuggingFace's streamer protocol (one row: finished tokens from left to right), or an
            object with ``on_commit(commit)``, which sees every commit of every row.
        kv_cache: pages to use; by default as many as the rows need, for this call.
        **arguments: the fields of :class:`GenerationConfig`: ``gen_length``, ``block_length``,
            ``steps``, ``threshold``, ``factor``, ``temperature``, ``cache``, ``stop_on_eos``, ``seed``, ...

    Returns:
        A :class:`GenerationOutput`. Each row's tokens are those that it gets alone.

    Raises:
        TypeError: an unknown argument, or one of the wrong type.
        ValueError: one that is out of range; the message names it, what came and what is allowed. A
            model that is not patched. NaN or infinite logits. OutOfPages: ``kv_cache`` is too small.
    """
    family = patched_family(model)
    config = GenerationConfig.build(config, arguments)
    geometry = family.geometry(model)
    embedding: Tensor = cast(Any, model).get_input_embeddings().weight
    _check_model(model)
    prompts = _prompts(input_ids, attention_mask, geometry, family, embedding.device)
    gen_lengths = _per_row("gen_length", config.gen_length, len(prompts))
    for b, (prompt, gen_length) in enumerate(zip(prompts, gen_lengths, strict=True)):
        if len(prompt) + gen_length > geometry.max_positions:
            raise ValueError(
                f"gen_length={gen_length}: with row {b}'s prompt of {len(prompt)} tokens it exceeds the "
                f"model's {geometry.max_positions} positions"
            )
    if config.top_p is not None or config.top_k is not None:
        raise ValueError(
            f"top_p={config.top_p}, top_k={config.top_k}: {family.name} takes neither; use temperature"
        )
    if streamer is not None and not hasattr(streamer, "on_commit") and len(prompts) > 1:
        raise ValueError(f"streamer: takes one row, got {len(prompts)}; one with on_commit takes any number")
    if not geometry.eos_ids:
        config = replace(config, stop_on_eos=False)
    lengths = [len(p) + g for p, g in zip(prompts, gen_lengths, strict=True)]
    kv_cache = _cache(kv_cache, geometry, lengths, embedding)

    decoder = Decoder(model, config, kv_cache, prompts, gen_lengths, _seeds(config, len(prompts)))
    try:
        report = _Reporter(streamer, decoder) if streamer is not None else None
        while any(not row.done for row in decoder.rows):
            active = decoder.turn()
            if report is not None:
                report(active)
        output = _output(decoder)
        if report is not None:
            report.end(output)
        return output
    finally:
        decoder.close()


def patch(model: nn.Module) -> nn.Module:
    """Makes a model generate fast; its own call keeps working, bit for bit. Idempotent.

    Args:
        model: a LLaDA model: ours (:func:`fastdllm_ext.load`), the Hub's remote code, or NVlabs' copy.

    Returns:
        The same model, with a method ``generate`` that takes :func:`generate`'s arguments.

    Raises:
        TypeError, ValueError: not a supported model, or a configuration that its family does not cover;
            the message lists what is supported. The model is then as it was.
    """
    return registry.patch(model, generate)


def _output(decoder: Decoder) -> GenerationOutput:
    """Cuts every row at its first EOS and gathers the results."""
    rows, g = decoder.rows, decoder.geometry
    device = decoder.tokens.device
    first = torch.tensor([row.prompt_length for row in rows], device=device)
    total = torch.tensor([row.end for row in rows], device=device)
    position = torch.arange(decoder.tokens.shape[1], device=device)[None]
    answer = (position >= first[:, None]) & (position < total[:, None])
    eos = answer & torch.isin(decoder.tokens, torch.tensor(g.eos_ids, dtype=torch.int64, device=device))
    lengths = torch.where(eos.any(1), eos.int().argmax(1) + 1, total)
    if decoder.config.stop_on_eos:  # what lies behind an EOS is not part of the answer
        behind = answer & (position >= lengths[:, None])
        decoder.tokens[behind] = g.pad_id
        decoder.step_map[behind] = -1
        decoder.confidence[behind] = 0.0
    longest = max(row.gen_length for row in rows)
    offsets = first[:, None] + torch.arange(longest, device=device)[None]
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
        self.on_commit = getattr(streamer, "on_commit", None)
        self.sent = decoder.rows[0].prompt_length
        if self.on_commit is None:
            streamer.put(decoder.tokens[0, : self.sent].cpu())

    def __call__(self, active: list[DecodingRow]) -> None:
        if self.on_commit is None:
            row = self.decoder.rows[0]
            finished = row.bounds[row.block]
            if not row.done and finished > self.sent:
                self._put(finished)
            return
        for row in active:
            b, step = row.index, row.nfe - 1
            where = (self.decoder.step_map[b] == step).nonzero().squeeze(1)
            tokens, confidence = self.decoder.tokens[b, where], self.decoder.confidence[b, where]
            positions = (where - row.prompt_length).tolist()
            self.on_commit(Commit(b, step, positions, tokens.tolist(), confidence.tolist()))

    def end(self, output: GenerationOutput) -> None:
        if self.on_commit is None:
            self._put(int(output.lengths[0]))
        self.streamer.end()

    def _put(self, end: int) -> None:
        if end > self.sent:
            self.streamer.put(self.decoder.tokens[0, self.sent : end].cpu())
            self.sent = end


# --------------------------------------------------------------------------------------------------
# Arguments
# --------------------------------------------------------------------------------------------------


def _check_model(model: nn.Module) -> None:
    floating = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if len(floating) > 1:
        raise ValueError(f"model: parameters of mixed dtypes {sorted(map(str, floating))}; takes one")
    devices = {p.device for p in model.parameters()}
    if len(devices) > 1:
        raise ValueError(f"model: parameters on mixed devices {sorted(map(str, devices))}; takes one")


def _prompts(
    input_ids: Tensor | Sequence[Tensor],
    attention_mask: Tensor | None,
    geometry: Geometry,
    family: Family,
    device: torch.device,
) -> list[Tensor]:
    """The rows' prompts without padding, checked: 1-D int64 on the model's device."""
    if isinstance(input_ids, Tensor):
        if input_ids.dim() != 2:
            raise ValueError(
                f"input_ids has shape {list(input_ids.shape)}; takes [B, P] or a list of 1-D tensors"
            )
        prompts = list(input_ids)
    elif isinstance(input_ids, (list, tuple)):
        if attention_mask is not None:
            raise ValueError(
                "attention_mask: takes input_ids of shape [B, P]; a list of prompts has no padding"
            )
        prompts = list(input_ids)
    else:
        raise TypeError(
            f"input_ids={type(input_ids).__name__}; takes a [B, P] tensor or a list of 1-D tensors"
        )
    if not prompts:
        raise ValueError("input_ids holds no row; takes one or more")
    for b, prompt in enumerate(prompts):
        if not isinstance(prompt, Tensor):
            raise TypeError(f"input_ids[{b}]={type(prompt).__name__}; takes a 1-D int64 tensor")
        if prompt.dim() != 1:
            raise ValueError(f"input_ids[{b}] has shape {list(prompt.shape)}; takes 1-D")
        if prompt.dtype != torch.int64:
            raise TypeError(f"input_ids[{b}] has dtype {prompt.dtype}; takes torch.int64")
        if prompt.device != device:
            raise ValueError(f"input_ids is on {prompt.device}; takes the model's device, {device}")
    if attention_mask is not None:
        prompts = _without_padding(prompts, attention_mask, input_ids.shape)  # type: ignore[union-attr]
    for b, prompt in enumerate(prompts):
        if len(prompt) == 0:
            if family.needs_prompt:
                raise ValueError(f"input_ids[{b}] is empty; {family.name} takes a prompt of 1 token or more")
            continue
        low, high = int(prompt.min()), int(prompt.max())
        if low < 0 or high >= geometry.vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(f"input_ids[{b}] holds token {wrong}; takes 0 to {geometry.vocab_size - 1}")
        if bool((prompt == geometry.mask_id).any()):
            raise ValueError(
                f"input_ids[{b}] holds the mask token {geometry.mask_id}; takes a prompt without masks"
            )
    return prompts


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


def _seeds(config: GenerationConfig, rows: int) -> list[tuple[int, int]]:
    """(Philox key, stream) of each row."""
    if config.seed is None:
        sampled = config.temperature > 0 or config.remasking == "random"
        seed = int(torch.randint(2**62, ()).item()) if sampled else 0
        return [(seed, b) for b in range(rows)]
    if isinstance(config.seed, int):
        return [(config.seed, b) for b in range(rows)]
    return [(seed, 0) for seed in _per_row("seed", config.seed, rows)]


def _cache(
    cache: PagedKVCache | None, geometry: Geometry, lengths: Sequence[int], like: Tensor
) -> PagedKVCache:
    shape = (geometry.num_layers, geometry.num_kv_heads, geometry.head_dim)
    if cache is None:
        pages = PagedKVCache.pages_for(lengths)
        return PagedKVCache(*shape, num_pages=pages, dtype=like.dtype, device=like.device)
    if not isinstance(cache, PagedKVCache):
        raise TypeError(f"kv_cache={type(cache).__name__}; takes a fastdllm_ext.PagedKVCache")
    found = (cache.geometry, cache.storage.dtype, cache.storage.device)
    if found != (shape, like.dtype, like.device):
        raise ValueError(
            f"kv_cache holds (layers, kv heads, head_dim) {found[0]} in {found[1]} on {found[2]}; "
            f"takes {shape} in {like.dtype} on {like.device}"
        )
    return cache
