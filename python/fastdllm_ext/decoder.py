"""The decoding loop (Fast-dLLM, Algorithm 1), once, for every family, cache mode and rule.

    for each block of a row:
        refresh:    forward over the whole row; commit inside the block
        block step: forward over the cache mode's queries; commit; until the block holds no mask

Its heart is :meth:`Decoder.turn`: the active rows, each of which either refreshes or takes a block
step, form one ragged forward; then `unmask` commits in all of them, and the rows advance.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from fastdllm_ext import ops
from fastdllm_ext.cache import PagedKVCache
from fastdllm_ext.decoding import REMASKING, GenerationConfig, Timings
from fastdllm_ext.forward import Attention, Layout, Runs, dtype_of
from fastdllm_ext.ops import Knob, Row, Rule
from fastdllm_ext.patching.family import Family, Geometry
from fastdllm_ext.patching.registry import patched_family, patched_options
from fastdllm_ext.rules.base import Candidates, Filled, Memory, TorchRule, first_best
from fastdllm_ext.runtime import Fused, Modules, make_runtime
from fastdllm_ext.runtime.block import STATE, BlockShape, BlockStep, addresses, graphs_of, guided
from fastdllm_ext.runtime.graphs import batch_bucket, page_bucket
from fastdllm_ext.shadows import Shadows, pages_of_shadows, private_pages


@dataclass(frozen=True)
class Block:
    """Positions [begin, end) that are filled together; the first and the last of them are masks."""

    begin: int
    end: int
    masks: int


@dataclass(frozen=True)
class Step:
    """What one forward of a row computes: the data by which cache modes and refresh policies differ.

    Attributes:
        queries: positions computed, whose keys and values are written.
        visible: positions attended to: [0, visible).
        candidates: where a mask may be filled.
        verified: where a token may be taken back, if the rule does that; they have shadows.
    """

    queries: tuple[int, int]
    visible: int
    candidates: tuple[int, int]
    verified: tuple[int, int] = (0, 0)

    @property
    def is_refresh(self) -> bool:
        """All that is attended to is computed."""
        return self.queries == (0, self.visible)


@dataclass
class DecodingRow:
    """The host's view of one row: where it stands, and where its keys lie.

    Attributes:
        index: its row in the decoder's tensors.
        sequences: its number in the cache; with guidance, that of its prompt-less twin too; with a rule that
            verifies, that of its shadows' pages.
        first, end: positions of the answer, from the first mask to the end of the row.
        blocks: those that hold masks, from left to right.
        block: the block being filled.
        fresh: the next step is the block's first.
        masks_left: masks of the block.
        nfe: forwards taken.
        done: finished.
    """

    index: int
    sequences: tuple[int, ...]
    first: int
    end: int
    blocks: list[Block]
    block: int = 0
    fresh: bool = True
    masks_left: int = 0
    nfe: int = 0
    done: bool = False

    def next_step(self, config: GenerationConfig, shift: bool) -> Step:
        """The row's next forward (docs/decoding.md has the table)."""
        every = config.refresh if isinstance(config.refresh, int) else 1
        block, visible = self.blocks[self.block], self.end
        if config.suffix is not None:
            served = min(self.block - self.block % every + every, len(self.blocks)) - 1
            visible = min(visible, self.blocks[served].end + config.suffix)
        whole = (block.begin, block.end)
        verified = whole if config.selection.verifies and not self.fresh else (0, 0)
        if config.cache == "none":
            return Step((0, visible), visible, whole, verified)
        # Where the logits of a block's first position come from the one before it, which the later steps do
        # not compute, the first step fills that position and no other, for good.
        fills = (block.begin, block.begin + 1) if self.fresh and shift else whole
        if self.fresh and self.block % every == 0:
            return Step((0, visible), visible, fills)
        if shift and verified != (0, 0):
            verified = (block.begin + 1, block.end)
        before, after = config.window
        begin = max(0, block.begin - before)
        if self.fresh:  # no refresh: the keys of the block before are those of its masks, and are made anew
            begin = min(begin, self.blocks[self.block - 1].begin)
        end = visible if config.cache == "prefix" else min(visible, block.end + after)
        return Step((begin, end), visible, fills, verified)


class TimeSteps:
    """Dream's time steps 1 = t_0 > t_1 > ... > t_S = eps of a block: how many masks each step fills.

    Step i fills a share 1 - t_(i+1) / t_i of the masks that are left, rounded down, and the last step all
    of them; with ``chance``, each mask with that probability. A step that fills nothing needs no forward.
    """

    def __init__(self, steps: int, eps: float, chance: random.Random | None) -> None:
        times = torch.linspace(1, eps, steps + 1)
        self.shares = 1 - times[1:] / times[:-1]
        self.chance = chance
        self.step = 0

    def quota(self, masks: int, candidates: int) -> int:
        """How many of the masks left the next step fills: at least one, and just one of one candidate."""
        if candidates == 1:
            self.step += 1
            return 1
        while self.step < len(self.shares) - 1:
            share, self.step = self.shares[self.step], self.step + 1
            if self.chance is None:
                count = int(masks * share)  # in float32, as published
            else:
                count = sum(self.chance.random() < float(share) for _ in range(masks))
            if count > 0:
                return count
        return masks


@dataclass(frozen=True)
class Plan:
    """Index tensors of one ragged forward; the same for every step of a block.

    With guidance, the rows' twins follow them in the same order, so that T is twice the rows' queries. Where
    the rule verifies, their shadows do.

    Attributes:
        steps: what each row of the decoder computes.
        tokens: [T] int64, the queries' places in the flattened tokens.
        layout: positions, slots and offsets for the attention; it wants the outputs that the candidates'
            logits come from, in their order (with guidance, then those of the twins), and the shadows'.
        candidates: [S] int64, positions that may be filled, as places in the flattened tokens.
        positions: [S] int64, the same positions within their rows.
        hidden: [V] int64, queries that see a mask whatever stands at their places: shadows.
        shape: of the graph that can take its steps; None where none can.
    """

    steps: dict[int, Step]
    tokens: Tensor
    layout: Layout
    candidates: Tensor
    positions: Tensor
    hidden: Tensor
    shape: BlockShape | None

    @property
    def has_refresh(self) -> bool:
        """Some row refreshes."""
        return any(step.is_refresh for step in self.steps.values())


class Decoder:
    """Tensors of a batch of rows, and the turn that advances them.

    Attributes:
        wants_all: the logits of every query are computed, not of the candidates alone.

    Args:
        model: a patched model.
        geometry: its sizes and token ids.
        config: block length, cache mode, rule and temperature, shared by the rows.
        cache: where keys and values go.
        rows: 1-D int64 tensors, masks where tokens are to be generated.
        seeds: (seed, stream) of each row.
    """

    wants_all = False

    def __init__(
        self,
        model: nn.Module,
        geometry: Geometry,
        config: GenerationConfig,
        cache: PagedKVCache,
        rows: Sequence[Tensor],
        seeds: Sequence[tuple[int, int]],
    ) -> None:
        self.model, self.geometry, self.config, self.cache = model, geometry, config, cache
        self.family: Family = patched_family(model)
        self.parts = self.family.parts(model)
        self.runtime = make_runtime(patched_options(model), self.family, self.parts)
        self.seeds, self.rule = seeds, config.selection
        lengths = [len(row) for row in rows]
        self.attention = Attention(self.geometry, cache, max(lengths), dtype_of(self.parts))
        device = rows[0].device
        self.graphs = None if self.wants_all else graphs_of(model, self.runtime, device)
        self.timings = Clock(device)

        count, width = len(rows), max(lengths)
        self.tokens = torch.full((count, width), self.geometry.pad_id, dtype=torch.int64, device=device)
        for b, row in enumerate(rows):
            self.tokens[b, : len(row)] = row
        self.given = self.tokens != self.geometry.mask_id
        self.step_map = torch.full((count, width), -1, dtype=torch.int32, device=device)
        self.confidence = torch.zeros((count, width), dtype=torch.float32, device=device)
        self.stop_ids = self.geometry.eos_ids if config.stop_on_eos and not config.infill else ()
        self.eos_ids = torch.tensor(self.stop_ids, dtype=torch.int64, device=device)
        self.knobs = self._knobs().repeat(count, 1).to(device)
        self.filtered = config.top_p not in (None, 1) or config.top_k is not None

        masks = [(row == self.geometry.mask_id).nonzero()[:, 0].tolist() for row in rows]
        blocks = [split_blocks(positions, config.block_length) for positions in masks]
        state = torch.zeros((count, len(Row)), dtype=torch.int64)
        for b, length in enumerate(lengths):
            state[b, Row.RULE], state[b, Row.SCORE] = self.rule.op, REMASKING[config.ranks_by]
            state[b, Row.SEED], state[b, Row.STREAM] = seeds[b]
            state[b, Row.FIRST], state[b, Row.END] = blocks[b][0].begin, length
            state[b, Row.EOS_AT] = -1
        self.state = state.to(device)
        # Every step fills a mask or more, so a block has as many steps as masks at most.
        steps = max(b.masks for b in itertools.chain(*blocks)) if self.rule.op == Rule.QUOTA else 1
        self.quotas = torch.ones((count, steps), dtype=torch.int32, device=device)
        longest = max(b.end - b.begin for b in itertools.chain(*blocks))
        self.memory = Memory(count, longest, device)  # of a TorchRule
        self.block_begin = torch.zeros(count, dtype=torch.int64, device=device)  # likewise
        self._plan: Plan | None = None
        self.rows: list[DecodingRow] = []
        twins = 2 if config.cfg_scale else 1
        shadows = [
            pages_of_shadows(config, length - b[0].begin, self.family.shift, cache.page_size)
            for b, length in zip(blocks, lengths, strict=True)
        ]
        needed = lengths * twins + [pages * cache.page_size for pages in shadows if pages]
        sequences = cache.add(needed)  # last: from here on close() gives the pages back
        for b, length in enumerate(lengths):
            self.rows.append(
                DecodingRow(b, tuple(sequences[b::count]), blocks[b][0].begin, length, blocks[b])
            )
            self._enter_block(self.rows[b])

    def close(self) -> None:
        """Gives the rows' pages back."""
        for row in self.rows:
            for sequence in row.sequences:
                self.cache.free(sequence)
        self.rows = []

    @torch.no_grad()
    def turn(self) -> list[DecodingRow]:
        """One forward of every row that is not done; returns the rows that took part.

        On CUDA as many as there are until a row has filled its block, where they are of one shape.
        """
        active = [row for row in self.rows if not row.done]
        plan = self._make_plan(active)
        if self.graphs is None or plan.shape is None:
            self._take_step(plan)
        else:
            self._take_steps(plan, plan.shape, active)
        state = self.state.tolist()  # the turn's one wait for the device
        if any(state[row.index][Row.BAD_LOGITS] for row in active):
            raise ValueError(self._describe_bad_logits(plan, state))
        for row in active:
            self._advance(row, state[row.index])
        return active

    def _take_step(self, plan: Plan) -> None:
        """One step of the plan, launch by launch."""
        counts = [0] * len(self.rows)  # masks among the candidates, for each row of the decoder
        for index, step in plan.steps.items():
            counts[index] = min(self.rows[index].masks_left, step.candidates[1] - step.candidates[0])
        with self.timings.phase("refresh" if plan.has_refresh else "block_steps"):
            logits, positions = self._forward(plan, sum(counts))
        with self.timings.phase("selection"):
            if isinstance(self.rule, TorchRule):
                self._choose(self.rule, plan, logits, positions, counts)
            else:
                self._unmask(logits, positions, counts)

    def _unmask(self, logits: Tensor, positions: Tensor, counts: list[int]) -> None:
        ops.unmask(
            logits,
            Runs.of(counts).to(logits.device).cu,
            positions,
            self.tokens,
            self.step_map,
            self.confidence,
            self.state,
            self.knobs,
            self.quotas,
            self.eos_ids,
            self.geometry.mask_id,
            self.filtered,
        )

    def _choose(
        self, rule: TorchRule, plan: Plan, logits: Tensor, positions: Tensor, counts: list[int]
    ) -> None:
        """Lets `unmask` fill what it may, and takes back what the rule does not choose, or revokes."""
        filled = self._filled(plan, logits[len(positions) :]) if rule.verifies else None
        logits = logits[: len(positions)]
        index = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(logits.device)
        step = Candidates(
            logits=logits,
            rows=index,
            positions=positions,
            slots=positions - self.block_begin[index],
            mask_id=self.geometry.mask_id,
            memory=self.memory,
            confidence=self.confidence[index, positions],
        )
        self._unmask(rule.fused(step), positions, counts)
        step.confidence = self.confidence[index, positions]
        chosen = rule.chosen(step)
        if chosen is not None:
            some = index.new_zeros(len(counts)).index_add_(0, index, chosen.long()) > 0
            chosen = chosen | (first_best(step.confidence, index, len(counts)) & ~some[index])
            self._take_back(index, positions, ~chosen)
            if filled is not None:
                self._take_back(filled.rows, filled.positions, rule.revoked(step, chosen, filled))

    def _filled(self, plan: Plan, logits: Tensor) -> Filled:
        """The positions that have shadows, and what their logits [V, vocab] say of the tokens there."""
        places, width = plan.tokens[plan.hidden], self.tokens.shape[1]
        rows, positions = places // width, places % width
        tokens = self.tokens[rows, positions]
        log_p = logits.float() / self.knobs[rows, Knob.SOFTMAX_TEMPERATURE, None]
        p = (log_p.gather(1, tokens[:, None])[:, 0] - log_p.logsumexp(1)).exp()
        stays = self.given[rows, positions] | (tokens == self.geometry.mask_id)
        return Filled(rows, positions, p.masked_fill(stays, torch.inf))

    def _take_back(self, rows: Tensor, positions: Tensor, where: Tensor) -> None:
        """Makes masks again of positions, those ``where`` is true."""
        for kept, empty in ((self.tokens, self.geometry.mask_id), (self.step_map, -1), (self.confidence, 0)):
            kept[rows, positions] = kept[rows, positions].masked_fill(where, empty)
        self.state[:, Row.MASKS_LEFT].index_add_(0, rows, where.long())
        if self.stop_ids:
            position = torch.arange(self.tokens.shape[1], device=rows.device)
            inside = (position >= self.state[:, Row.FIRST, None]) & (position < self.state[:, Row.END, None])
            mask = self.tokens == self.geometry.mask_id
            stop = (inside & (mask | torch.isin(self.tokens, self.eos_ids))).int()
            first = stop.argmax(1, keepdim=True)
            is_eos = (stop.gather(1, first) > 0) & ~mask.gather(1, first)
            self.state[:, Row.EOS_AT] = torch.where(is_eos, first, -1)[:, 0]

    def _take_steps(self, plan: Plan, shape: BlockShape, active: list[DecodingRow]) -> None:
        """Steps of the plan until a row needs the host, as graphs."""
        assert self.graphs is not None
        assert isinstance(self.runtime, Fused)
        runtime = self.runtime
        state = {name: getattr(self, "state" if name == "rows" else name) for name in STATE}
        key = (shape, *addresses(runtime, self.attention))
        index = torch.tensor([row.index for row in active], device=self.tokens.device)
        with self.graphs.lock, self.timings.phase("block_steps"):
            taken = self.graphs.run(
                key,
                lambda: BlockStep(shape, self.cache.page_size, self.tokens.device),
                lambda step: step.load(runtime, self.attention, state, index, plan.layout, plan.positions),
                shape.candidates,
            )
            taken.step.store(state, index)

    def _knobs(self) -> Tensor:
        c, knobs = self.config, torch.zeros(len(Knob), dtype=torch.float32)
        knobs[Knob.VALUE], knobs[Knob.TEMPERATURE] = self.rule.value, c.temperature
        knobs[Knob.SOFTMAX_TEMPERATURE] = (
            c.temperature if self.family.samples_first and c.temperature else 1.0
        )
        knobs[Knob.TOP_P] = 1.0 if c.top_p is None else c.top_p
        knobs[Knob.TOP_K] = c.top_k or 0
        knobs[Knob.RANK_TEMPERATURE] = c.alg_temp
        return knobs

    def _forward(self, plan: Plan, masks: int) -> tuple[Tensor, Tensor]:
        """Logits [masks, vocab] of the masks among the candidates, and their positions [masks].

        Behind these logits, those of the shadows.
        """
        flat = self.tokens.view(-1)
        inputs = flat[plan.tokens]
        if self.config.cfg_scale:  # a twin sees nothing of what was given
            twins = inputs.view(2, -1)[1]
            twins.masked_fill_(self.given.view(-1)[plan.tokens].view(2, -1)[1], self.geometry.mask_id)
        if len(plan.hidden):
            inputs[plan.hidden] = self.geometry.mask_id
        self.attention.attend_over(plan.layout)
        hidden = self.runtime.hidden(inputs, self.attention)
        masked = flat[plan.candidates] == self.geometry.mask_id
        chosen = torch.nonzero_static(masked, size=masks).squeeze(1)  # the count is known: no wait
        return self._logits(hidden, plan, chosen).to(self.tokens.device), plan.positions[chosen]

    def _logits(self, hidden: Tensor, plan: Plan, chosen: Tensor) -> Tensor:
        """[R, vocab] of the candidates chosen; with guidance, u + (1 + scale)(c - u), u being the twin's.

        [R + V, vocab] with V shadows.
        """
        chosen = chosen.to(hidden.device)
        if len(plan.hidden):
            shadows = torch.arange(len(plan.candidates), len(hidden), device=hidden.device)
            return self.runtime.head(hidden[torch.cat((chosen, shadows))])
        hidden, twins = hidden[: len(plan.candidates)], hidden[len(plan.candidates) :]
        return guided(
            self.runtime.head,
            hidden[chosen],
            twins[chosen] if self.config.cfg_scale else twins,
            self.config.cfg_scale,
        )

    def _make_plan(self, active: list[DecodingRow]) -> Plan:
        """The rows' next forward."""
        steps = {row.index: row.next_step(self.config, self.family.shift) for row in active}
        if self._plan is None or steps != self._plan.steps:
            self._plan = self._build_plan(active, steps)
        return self._plan

    def _build_plan(self, active: list[DecodingRow], steps: dict[int, Step]) -> Plan:
        device, width = self.tokens.device, self.tokens.shape[1]
        tokens, positions, slots, candidates, candidate_positions, wanted = [], [], [], [], [], []
        sequences: list[int] = []
        lengths: list[int] = []
        outputs: list[int] = []
        for lane in range(2 if self.config.cfg_scale else 1):
            for row in active:
                step, sequence = steps[row.index], row.sequences[lane]
                begin, end = step.queries
                self.cache.prepare_write(sequence, begin, end)
                where = torch.arange(begin, end)
                tokens.append(where + row.index * width)
                positions.append(where)
                slots.append(self.cache.slots(sequence, begin, end))
                sequences.append(sequence)
                fill = torch.arange(*step.candidates)
                # With a shift the block's first position has no source here, once it is filled: any will do.
                sources = (
                    where - begin if self.wants_all else (fill - int(self.family.shift) - begin).clamp(min=0)
                )
                wanted.append(sources + sum(lengths))
                outputs.append(len(sources))
                lengths.append(end - begin)
                if lane == 0:
                    candidates.append(fill + row.index * width)
                    candidate_positions.append(fill)
        visible = [steps[row.index].visible for row in active] * (len(sequences) // len(active))
        tables = [self.cache.block_table(sequences)]
        shadows = self._shadows_of(active, steps, tables[0]) if self.rule.verifies else []
        hidden = [torch.arange(0)]
        for row, shadow in zip(active, shadows, strict=False):
            count, each = shadow.positions.shape
            first = torch.arange(count) * each + sum(lengths)
            tokens.append((shadow.positions + row.index * width).flatten())
            positions.append(shadow.positions.flatten())
            slots.append(shadow.slots.flatten())
            tables.append(shadow.tables)
            visible += [steps[row.index].visible] * count
            wanted.append(first)
            outputs += [1] * count
            lengths += [each] * count
            hidden.append(first + each - 1)
        layout = Layout(
            positions=torch.cat(positions),
            slots=torch.cat(slots),
            block_table=torch.cat(tables),
            kv_lens=torch.tensor(visible, dtype=torch.int32),
            queries=Runs.of(lengths),
            wanted=torch.cat(wanted),
            outputs=Runs.of(outputs),
            is_fresh=all(step.is_refresh for step in steps.values()) and len(hidden) == 1,
            private=private_pages(shadows, self.cache.page_size),
        ).to(device)
        flat, fills, filled, masked = (
            torch.cat(x).to(device) for x in (tokens, candidates, candidate_positions, hidden)
        )
        return Plan(steps, flat, layout, fills, filled, masked, self._shape(active, layout))

    def _shadows_of(self, active: list[DecodingRow], steps: dict[int, Step], tables: Tensor) -> list[Shadows]:
        """Of each row."""
        return [
            Shadows.of(
                steps[row.index].verified,
                self.family.shift,
                table,
                self.cache.block_table(row.sequences[1:])[0].cpu(),
                self.cache.page_size,
            )
            for row, table in zip(active, tables.cpu(), strict=True)
        ]

    def _shape(self, active: list[DecodingRow], layout: Layout) -> BlockShape | None:
        """Of block steps after a block's first, if those of all rows are of one length; else None."""
        queries, candidates = (
            {b - a for a, b in itertools.pairwise(runs.offsets)} for runs in (layout.queries, layout.outputs)
        )
        same = len(queries) == len(candidates) == 1
        graphs = self.config.cache == "dual" and not isinstance(self.rule, TorchRule)
        if not graphs or any(row.fresh for row in active) or not same:
            return None
        return BlockShape(
            rows=batch_bucket(len(active)),
            lanes=2 if self.config.cfg_scale else 1,
            queries=queries.pop(),
            candidates=candidates.pop(),
            pages=page_bucket(layout.block_table.shape[1]),
            quota_steps=self.quotas.shape[1],
            eos_ids=self.stop_ids,
            mask_id=self.geometry.mask_id,
            pad_id=self.geometry.pad_id,
            filtered=self.filtered,
            cfg_scale=self.config.cfg_scale,
        )

    def _advance(self, row: DecodingRow, state: list[int]) -> None:
        """Takes over what the device says of a row: block filled, row finished."""
        row.nfe, row.masks_left, row.fresh = state[Row.STEP], state[Row.MASKS_LEFT], False
        if state[Row.EOS_AT] >= 0 and (row.masks_left == 0 or not self.rule.verifies):
            row.done = True
        elif row.masks_left == 0:
            row.block += 1
            if row.block == len(row.blocks):
                row.done = True
            else:
                self._enter_block(row)

    def _enter_block(self, row: DecodingRow) -> None:
        """Sets the state of the row's next block: all masks, no step taken, how many each step fills."""
        row.fresh, row.masks_left = True, row.blocks[row.block].masks
        values = {Row.BLOCK_STEP: 0, Row.MASKS_LEFT: row.masks_left}
        self.state[row.index, list(values)] = torch.tensor(list(values.values()), device=self.state.device)
        if isinstance(self.rule, TorchRule):
            self.block_begin[row.index] = row.blocks[row.block].begin
            self.memory.forget(row.index)
        if self.rule.op == Rule.QUOTA:
            quotas = torch.tensor(self._quotas_of_block(row), dtype=torch.int32)
            self.quotas[row.index, : len(quotas)] = quotas.to(self.quotas.device)

    def _quotas_of_block(self, row: DecodingRow) -> list[int]:
        """How many masks each step of the row's block fills, from its first step to its last."""
        begin, end = row.next_step(self.config, self.family.shift).candidates
        # Where the first step has one candidate, the others share the rest.
        alone = int(end - begin == 1 < row.masks_left)
        times = self._time_steps(row)
        if times is None:
            steps = max(1, self._steps_of_block(row) - alone)
            return [1] * alone + share_evenly(row.masks_left - alone, steps)
        quotas: list[int] = []
        left = row.masks_left
        while left > 0:
            quotas.append(times.quota(left, 1 if alone and not quotas else left))
            left -= quotas[-1]
        return quotas

    def _steps_of_block(self, row: DecodingRow) -> int:
        share, rest = divmod(self.config.steps or 0, len(row.blocks))
        return max(1, share + (row.block < rest))

    def _time_steps(self, row: DecodingRow) -> TimeSteps | None:
        """Those of the row's block, from the first on, where the schedule has them."""
        if self.config.schedule == "even":
            return None
        seed, stream = self.seeds[row.index]
        chance = random.Random(f"{seed} {stream} {row.block}")
        independent = self.config.schedule == "independent"
        return TimeSteps(self._steps_of_block(row), self.config.eps, chance if independent else None)

    def _describe_bad_logits(self, plan: Plan, state: list[list[int]]) -> str:
        """Which rows, and the first module whose output went wrong: the same forward once more, watched."""
        found: list[str] = []

        def watch(name: str, module: nn.Module) -> Any:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                first = output[0] if isinstance(output, tuple) else output
                if not found and isinstance(first, Tensor) and not bool(first.isfinite().all()):
                    found.append(name)

            return module.register_forward_hook(hook)

        self.runtime = Modules(self.family, self.parts)  # whose modules hooks can watch
        handles = [watch(name, module) for name, module in self.model.named_modules() if name]
        try:
            masked = self.tokens.view(-1)[plan.candidates] == self.geometry.mask_id
            self._forward(plan, int(masked.sum()))
        finally:
            for handle in handles:
                handle.remove()
        rows = [b for b, fields in enumerate(state) if fields[Row.BAD_LOGITS]]
        where = f"the output of {found[0]}" if found else "the logits"
        return (
            f"logits: NaN or infinite in rows {rows} at step {state[rows[0]][Row.STEP]}; first in {where}. "
            "Nothing was committed"
        )


def share_evenly(masks: int, steps: int) -> list[int]:
    """How many masks each step fills, the first ones the remainder; no step fills none."""
    share, rest = divmod(masks, steps)
    return [share + (i < rest) for i in range(min(steps, masks))]


def split_blocks(masks: Sequence[int], block_length: int) -> list[Block]:
    """The blocks of a row from the positions of its masks: runs of ``block_length`` from the first mask on.

    A run without a mask is no block; one that has some is cut to them.
    """
    runs = itertools.groupby(masks, key=lambda position: (position - masks[0]) // block_length)
    found = [list(run) for _, run in runs]
    return [Block(run[0], run[-1] + 1, len(run)) for run in found]


class Clock:
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
        """What happens within it counts as this phase."""
        begin = self._now()
        yield
        self._spans.append((name, begin, self._now()))

    def read(self) -> Timings:
        """Seconds so far."""
        if self._cuda:
            torch.cuda.synchronize()
        timings = Timings(total=perf_counter() - self._start)
        for name, begin, end in self._spans:
            seconds = begin.elapsed_time(end) / 1e3 if self._cuda else end - begin
            setattr(timings, name, getattr(timings, name) + seconds)
        return timings
