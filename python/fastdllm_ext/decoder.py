"""The decoding loop (Fast-dLLM, Algorithm 1), once, for every family, cache mode and rule.

    for each block of a row:
        refresh:    forward over the whole row; commit inside the block
        block step: forward over the cache mode's queries; commit; until the block holds no mask

Its heart is :meth:`Decoder.turn`: the active rows, each of which either refreshes or takes a block
step, form one ragged forward; then `unmask` commits in all of them, and the rows advance.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdllm_ext import ops
from fastdllm_ext.cache import OutOfPages, PagedKVCache
from fastdllm_ext.decoding import REMASKING, GenerationConfig, Timings
from fastdllm_ext.forward import Attention, Layout, Runs, device_of, dtype_of
from fastdllm_ext.ops import Knob, Row, Rule
from fastdllm_ext.patching.family import Family, Geometry
from fastdllm_ext.patching.registry import patched_family, patched_options
from fastdllm_ext.rope import table_length
from fastdllm_ext.rows import Content, DecodingRow, Step
from fastdllm_ext.rules.base import Candidates, Filled, Memory, TorchRule, first_best
from fastdllm_ext.runtime import Fused, Modules, make_runtime
from fastdllm_ext.runtime.block import STATE, BlockShape, BlockStep, addresses, graphs_of, guided
from fastdllm_ext.runtime.graphs import batch_bucket, page_bucket
from fastdllm_ext.shadows import Shadows, private_pages
from fastdllm_ext.shards import group_of


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
        computed: rows of the decoder whose queries these are, in the order of their candidates.
        origins: for each row of ``steps``, in its order, the place in ``computed`` of the one whose logits
            are its own: where two rows hold the same, one is computed.
        shape: of the graph that can take its steps; None where none can.
    """

    steps: dict[int, Step]
    tokens: Tensor
    layout: Layout
    candidates: Tensor
    positions: Tensor
    hidden: Tensor
    computed: list[int]
    origins: list[int]
    shape: BlockShape | None

    @property
    def has_refresh(self) -> bool:
        """Some row refreshes."""
        return any(step.is_refresh for step in self.steps.values())


class Common(NamedTuple):
    """What the rows of a decoder have in common; everything else is each row's own."""

    geometry: Geometry
    rule: TorchRule | None
    cfg_scale: float
    stop_ids: tuple[int, ...]

    @staticmethod
    def of(geometry: Geometry, config: GenerationConfig) -> Common:
        """Of rows decoded so, geometry being that with the token ids that the settings name."""
        rule = config.selection
        stops = config.stop_on_eos and not config.infill
        return Common(
            geometry,
            rule if isinstance(rule, TorchRule) else None,
            config.cfg_scale,
            geometry.eos_ids if stops else (),
        )

    @property
    def verifies(self) -> bool:
        """The rule takes tokens back."""
        return self.rule is not None and self.rule.verifies


class BadLogits(ValueError):
    """NaN or infinite logits; what the ``rows`` would have filled stays open."""

    def __init__(self, message: str, rows: Sequence[DecodingRow]) -> None:
        super().__init__(message)
        self.rows = rows


class Decoder:
    """Rows in tensors, and the turn that advances them. Rows may come and go between turns.

    Attributes:
        wants_all: the logits of every query are computed, not of the candidates alone.
        rows: those that are here.
        tokens, given, step_map, confidence: [slots, width], int64, bool, int32 and float32: of row r at
            ``r.index``. ``given`` are tokens that no step has filled.
        state, knobs, quotas: [slots, ...], as ``ops.unmask`` takes them.
        shared: forwards of rows that were read off another's.

    Args:
        model: a patched model.
        common: what the rows have in common.
        cache: where keys and values go.
        rows: to begin with.

    Raises:
        OutOfPages: the rows need more than are free.
    """

    wants_all = False

    tokens: Tensor
    given: Tensor
    step_map: Tensor
    confidence: Tensor
    state: Tensor
    knobs: Tensor
    quotas: Tensor
    block_begin: Tensor

    def __init__(
        self, model: nn.Module, common: Common, cache: PagedKVCache, rows: Sequence[DecodingRow] = ()
    ) -> None:
        self.model, self.common, self.cache = model, common, cache
        self.geometry = common.geometry
        self.family: Family = patched_family(model)
        self.parts = self.family.parts(model)
        self.runtime = make_runtime(patched_options(model), self.family, self.parts)
        self.device = device_of(self.parts.embedding)
        self.graphs = None if self.wants_all else graphs_of(model, self.runtime, self.device)
        self.timings = Clock(self.device)
        self.eos_ids = torch.tensor(common.stop_ids, dtype=torch.int64, device=self.device)
        self.rows: list[DecodingRow] = []
        # Of each tensor: the dtype, and what stands where there is no row.
        self._tensors = {
            "tokens": (torch.int64, self.geometry.pad_id),
            "given": (torch.bool, True),
            "step_map": (torch.int32, -1),
            "confidence": (torch.float32, 0.0),
            "state": (torch.int64, 0),
            "knobs": (torch.float32, 0.0),
            "quotas": (torch.int32, 1),
            "block_begin": (torch.int64, 0),
        }
        self._free: list[int] = []
        self._sizes = {"slots": 0, "width": 0, "steps": 1, "block": 0}
        self.memory = Memory(0, 0, self.device)  # of a TorchRule
        self._plan: Plan | None = None
        self.shared = 0
        self.enter(rows)

    def enter(self, rows: Sequence[DecodingRow]) -> None:
        """Takes rows in, all or none; they have ``content``.

        One that is ``like`` another gets its pages when it first takes part in a turn; one may bring some.

        Raises:
            OutOfPages: the rows need more than are free.
        """
        self._make_room(rows)
        needed = [[] if row.like or row.sequences else self._page_lengths(row) for row in rows]
        sequences = iter(self.cache.add(list(itertools.chain(*needed))))
        for row, lengths in zip(rows, needed, strict=True):
            row.sequences = row.sequences or tuple(itertools.islice(sequences, len(lengths)))
            row.index = self._free.pop()
            self.rows.append(row)
        for row in rows:
            self._write(row)
        self._plan = None

    def leave(self, row: DecodingRow) -> None:
        """Gives a row's pages and its place back."""
        for sequence in row.sequences:
            self.cache.free(sequence)
        row.sequences = ()
        self.rows.remove(row)
        self._free.append(row.index)
        self.state[row.index] = 0
        row.index = -1
        self._plan = None

    def put_aside(self, row: DecodingRow) -> None:
        """As :meth:`leave`, but so that it can enter again: it keeps what stood in it at its last refresh.

        What it then fills is what it had filled since, if logits have the same bits.
        """
        tensors = (self.tokens, self.step_map, self.confidence)
        tokens, steps, confidence = (x[row.index, : row.end].clone() for x in tensors)
        row.roll_back()
        void = steps >= row.nfe
        row.content = Content(
            tokens.masked_fill(void, self.geometry.mask_id),
            steps.masked_fill(void, -1),
            confidence.masked_fill(void, 0.0),
        )
        self.leave(row)

    def close(self) -> None:
        """Gives all pages back."""
        for row in list(self.rows):
            self.leave(row)

    def _page_lengths(self, row: DecodingRow) -> list[int]:
        return row.page_lengths(self.family.shift, self.cache.page_size)

    def _make_room(self, rows: Sequence[DecodingRow]) -> None:
        """Makes the tensors as large as these rows need beside those that are here."""
        if not rows:
            return
        have = self._sizes
        slots = len(self.rows) + len(rows)
        quota = any(row.config.selection.op == Rule.QUOTA for row in rows)
        blocks = list(itertools.chain(*(row.blocks for row in rows)))
        sizes = {
            "slots": max(slots, 2 * have["slots"]) if slots > have["slots"] else have["slots"],
            "width": max(have["width"], *(row.end for row in rows)),
            # Every step fills a mask or more, so a block has as many steps as masks at most.
            "steps": max(have["steps"], *(b.masks for b in blocks)) if quota else have["steps"],
            "block": max(have["block"], *(b.end - b.begin for b in blocks)),
        }
        if sizes == have:
            return
        second = {"state": [len(Row)], "knobs": [len(Knob)], "quotas": [sizes["steps"]], "block_begin": []}
        for name, (dtype, empty) in self._tensors.items():
            shape = [sizes["slots"], *second.get(name, [sizes["width"]])]
            larger = torch.full(shape, empty, dtype=dtype, device=self.device)
            if self.rows:
                old = getattr(self, name)
                larger[tuple(map(slice, old.shape))] = old
            setattr(self, name, larger)
        self.memory.grow(sizes["slots"], sizes["block"])
        if table_length(sizes["width"]) != table_length(max(1, have["width"])) or not have["width"]:
            dtype = dtype_of(self.parts)
            self.attention = Attention(self.geometry, self.cache, sizes["width"], dtype)
        self._free = [*range(sizes["slots"] - 1, have["slots"] - 1, -1), *self._free]
        self._sizes = sizes

    def _write(self, row: DecodingRow) -> None:
        """Puts what is known of a row into the tensors."""
        b, content = row.index, row.content
        assert content is not None
        row.content = None
        given = (content.tokens != self.geometry.mask_id) & (content.step_map < 0)
        for name, new in (vars(content) | {"given": given}).items():
            tensor = getattr(self, name)[b]
            tensor[: row.end], tensor[row.end :] = new, self._tensors[name][1]
        config, state = row.config, [0] * len(Row)
        state[Row.RULE], state[Row.SCORE] = config.selection.op, REMASKING[config.ranks_by]
        state[Row.SEED], state[Row.STREAM] = row.seed
        state[Row.FIRST], state[Row.END], state[Row.STEP], state[Row.EOS_AT] = row.first, row.end, row.nfe, -1
        self.state[b] = torch.tensor(state, device=self.device)
        self.knobs[b] = self._knobs(config).to(self.device)
        self._enter_block(row, row.block)

    @torch.no_grad()
    def turn(self, rows: Sequence[DecodingRow] | None = None) -> list[DecodingRow]:
        """One forward of every row that is not done, or of those given; returns the rows that took part.

        On CUDA as many as there are until a row has filled its block, where they are of one shape.

        Raises:
            BadLogits: after the other rows have advanced.
            OutOfPages: a row's pages are shared and there are none to take instead; no row has advanced.
        """
        active = sorted(
            (row for row in (self.rows if rows is None else rows) if not row.done), key=lambda row: row.index
        )
        plan = self._make_plan(active)
        if self.graphs is None or plan.shape is None:
            self._take_step(plan, active)
        else:
            self._take_steps(plan, plan.shape, active)
        state = self.state.tolist()  # the turn's one wait for the device
        bad = [row for row in active if state[row.index][Row.BAD_LOGITS]]
        for row in active:
            if row not in bad:
                self._advance(row, state[row.index])
        if bad:
            steps = {row.index: plan.steps[row.index] for row in bad}
            raise BadLogits(self._describe_bad_logits(bad, steps, state[bad[0].index][Row.STEP]), bad)
        return active

    def _take_step(self, plan: Plan, active: list[DecodingRow]) -> None:
        """One step of the plan, launch by launch."""
        counts = [0] * len(self.state)  # masks among the candidates, of each row of the tensors
        for row in active:
            begin, end = plan.steps[row.index].candidates
            counts[row.index] = min(row.masks_left, end - begin)
        with self.timings.phase("refresh" if plan.has_refresh else "block_steps"):
            logits, positions = self._forward(plan, [counts[index] for index in plan.computed])
        with self.timings.phase("selection"):
            if self.common.rule is not None:
                self._choose(self.common.rule, plan, logits, positions, counts)
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
            any(row.config.filters for row in self.rows),
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
        if self.common.stop_ids:
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

    def _knobs(self, config: GenerationConfig) -> Tensor:
        knobs = [0.0] * len(Knob)
        knobs[Knob.VALUE], knobs[Knob.TEMPERATURE] = config.selection.value, config.temperature
        knobs[Knob.SOFTMAX_TEMPERATURE] = (self.family.samples_first and config.temperature) or 1.0
        knobs[Knob.TOP_P] = 1.0 if config.top_p is None else config.top_p
        knobs[Knob.TOP_K] = config.top_k or 0
        knobs[Knob.RANK_TEMPERATURE] = config.alg_temp
        return torch.tensor(knobs, dtype=torch.float32)

    def _forward(self, plan: Plan, masks: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Logits [R, vocab] of the masks among the candidates, row by row, and their positions [R].

        Behind these logits, those of the shadows. ``masks``: how many each of the rows computed has.
        """
        flat = self.tokens.view(-1)
        inputs = flat[plan.tokens]
        if self.common.cfg_scale:  # a twin sees nothing of what was given
            twins = inputs.view(2, -1)[1]
            twins.masked_fill_(self.given.view(-1)[plan.tokens].view(2, -1)[1], self.geometry.mask_id)
        if len(plan.hidden):
            inputs[plan.hidden] = self.geometry.mask_id
        self.attention.attend_over(plan.layout)
        hidden = self.runtime.hidden(inputs, self.attention)
        masked = flat[plan.candidates] == self.geometry.mask_id
        chosen = torch.nonzero_static(masked, size=sum(masks)).squeeze(1)  # the count is known: no wait
        logits, positions = self._logits(hidden, plan, chosen).to(self.device), plan.positions[chosen]
        if len(plan.origins) > len(plan.computed):
            parts = torch.arange(sum(masks)).split(list(masks))
            index = torch.cat([parts[origin] for origin in plan.origins]).to(self.device)
            logits, positions = logits[index], positions[index]
        return logits, positions

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
            twins[chosen] if self.common.cfg_scale else twins,
            self.common.cfg_scale,
        )

    def _make_plan(self, active: list[DecodingRow]) -> Plan:
        """The rows' next forward."""
        steps = {row.index: row.next_step(self.family.shift) for row in active}
        if self._plan is not None and steps == self._plan.steps:
            return self._plan
        plan = self._build_plan(active, steps)
        self._plan = plan if len(plan.computed) == len(active) else None  # what serves several does so once
        self.shared += len(active) - len(plan.computed)
        return plan

    def _provide(self, active: list[DecodingRow], steps: dict[int, Step]) -> dict[int, int]:
        """Gives rows the pages they write to; returns those that another serves, with that."""
        served = {}
        for row in active:
            like = row.like
            if row.sequences:
                continue
            if like in active and row.nfe == like.nfe == 0 and steps[row.index] == steps[like.index]:
                served[row.index] = like.index
            else:
                row.sequences = tuple(
                    self.cache.add(row.page_lengths(self.family.shift, self.cache.page_size))
                )
        for row in active:
            if row.index not in served:
                for sequence in row.sequences[: 2 if self.common.cfg_scale else 1]:
                    self.cache.prepare_write(sequence, *steps[row.index].queries)
        for row in active:
            if row.index in served and row.like is not None:
                row.sequences = tuple(map(self.cache.fork, row.like.sequences))
        return served

    def _build_plan(self, active: list[DecodingRow], steps: dict[int, Step]) -> Plan:
        served = self._provide(active, steps)
        order = [row.index for row in active if row.index not in served]
        origins = [order.index(served.get(row.index, row.index)) for row in active]
        active = [row for row in active if row.index not in served]
        device, width = self.device, self.tokens.shape[1]
        tokens, positions, slots, candidates, candidate_positions, wanted = [], [], [], [], [], []
        sequences: list[int] = []
        lengths: list[int] = []
        outputs: list[int] = []
        for lane in range(2 if self.common.cfg_scale else 1):
            for row in active:
                step, sequence = steps[row.index], row.sequences[lane]
                begin, end = step.queries
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
        shadows = self._shadows_of(active, steps, tables[0]) if self.common.verifies else []
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
            is_fresh=all(steps[index].is_refresh for index in order) and len(hidden) == 1,
            private=private_pages(shadows, self.cache.page_size),
        ).to(device)
        flat, fills, filled, masked = (
            torch.cat(x).to(device) for x in (tokens, candidates, candidate_positions, hidden)
        )
        shape = self._shape(active, layout) if not served else None
        return Plan(steps, flat, layout, fills, filled, masked, order, origins, shape)

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
        graphs = self.common.rule is None and all(row.config.cache == "dual" for row in active)
        if not graphs or any(row.fresh for row in active) or not same:
            return None
        return BlockShape(
            rows=batch_bucket(len(active)),
            lanes=2 if self.common.cfg_scale else 1,
            queries=queries.pop(),
            candidates=candidates.pop(),
            pages=page_bucket(layout.block_table.shape[1]),
            quota_steps=self.quotas.shape[1],
            eos_ids=self.common.stop_ids,
            mask_id=self.geometry.mask_id,
            pad_id=self.geometry.pad_id,
            filtered=any(row.config.filters for row in active),
            cfg_scale=self.common.cfg_scale,
        )

    def _advance(self, row: DecodingRow, state: list[int]) -> None:
        """Takes over what the device says of a row: block filled, row finished."""
        row.nfe, row.masks_left, row.fresh = state[Row.STEP], state[Row.MASKS_LEFT], False
        if state[Row.EOS_AT] >= 0 and (row.masks_left == 0 or not self.common.verifies):
            row.done = True
        elif row.masks_left == 0:
            row.done = row.block + 1 == len(row.blocks)
            if not row.done:
                self._enter_block(row, row.block + 1)

    def _enter_block(self, row: DecodingRow, block: int) -> None:
        """Sets the state of a row's block: all masks, no step taken, how many each step fills."""
        row.enter_block(block)
        values = {Row.BLOCK_STEP: 0, Row.MASKS_LEFT: row.masks_left}
        self.state[row.index, list(values)] = torch.tensor(list(values.values()), device=self.device)
        if self.common.rule is not None:
            self.block_begin[row.index] = row.blocks[block].begin
            self.memory.forget(row.index)
        if row.config.selection.op == Rule.QUOTA:
            quotas = torch.tensor(row.quotas(self.family.shift), dtype=torch.int32)
            self.quotas[row.index, : len(quotas)] = quotas.to(self.device)

    def _describe_bad_logits(self, bad: list[DecodingRow], steps: dict[int, Step], number: int) -> str:
        """Which rows, and the first module whose output went wrong: their forward once more, watched."""
        found: list[str] = []

        def watch(name: str, module: nn.Module) -> Any:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                first = output[0] if isinstance(output, tuple) else output
                if not found and isinstance(first, Tensor) and not bool(first.isfinite().all()):
                    found.append(name)

            return module.register_forward_hook(hook)

        if group_of(self.parts) is None:  # modules of a split model compute nothing by themselves
            self._watch_forward(bad, steps, watch)
        rows = [row.index for row in bad]
        where = f"the output of {found[0]}" if found else "the logits"
        return (
            f"logits: NaN or infinite in rows {rows} at step {number}; first in {where}. "
            "Nothing was committed"
        )

    def _watch_forward(
        self, rows: list[DecodingRow], steps: dict[int, Step], watch: Callable[[str, nn.Module], Any]
    ) -> None:
        """A forward of some rows, through modules that are watched."""
        runtime = self.runtime
        self.runtime = Modules(self.family, self.parts)
        handles = [watch(name, module) for name, module in self.model.named_modules() if name]
        masked = self.tokens == self.geometry.mask_id
        try:
            plan = self._build_plan(rows, steps)
            self._forward(plan, [int(masked[b, slice(*steps[b].candidates)].sum()) for b in plan.computed])
        except OutOfPages:
            pass  # rows share pages, and cannot be watched one by one
        finally:
            self.runtime = runtime
            for handle in handles:
                handle.remove()


class Clock:
    """Adds up seconds by phase: wall time on the CPU, events on a GPU (read late: none is waited for)."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._start = perf_counter()
        self._timings = Timings()
        self._spans: deque[tuple[str, Any, Any]] = deque()

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
        while self._spans and (not self._cuda or len(self._spans) > 1000):  # of which the first are long over
            self._add(*self._spans.popleft())

    def read(self) -> Timings:
        """Seconds so far."""
        if self._cuda:
            torch.cuda.synchronize()
        while self._spans:
            self._add(*self._spans.popleft())
        return replace(self._timings, total=perf_counter() - self._start)

    def _add(self, name: str, begin: Any, end: Any) -> None:
        seconds = begin.elapsed_time(end) / 1e3 if self._cuda else end - begin
        setattr(self._timings, name, getattr(self._timings, name) + seconds)
