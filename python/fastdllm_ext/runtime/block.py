"""The steps of a block on tensors that stay where they are, so that a graph can hold one (graphs.py).

Rows whose blocks are of one length take their steps side by side, filled up to one of few batch sizes by rows
that do nothing: there is no mask in their tokens, no key that they attend to and no slot that they write.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastdllm_ext import ops
from fastdllm_ext.forward import Attention, Layout, Runs
from fastdllm_ext.ops import Row
from fastdllm_ext.runtime.fused import Fused
from fastdllm_ext.runtime.graphs import CudaGraphs, Rung, StepGraphs

__all__ = ["STATE", "BlockShape", "BlockStep", "addresses", "graphs_of", "guided"]

# What is known of every row, [rows, ...] each: `unmask` has them, but for the tokens that were given.
STATE = ("tokens", "given", "step_map", "confidence", "rows", "knobs", "quotas")


@dataclass(frozen=True)
class BlockShape:
    """All that a captured step has built in, but for addresses.

    Attributes:
        rows: of the batch, those that fill it up among them.
        lanes: 2 with guidance, whose rows have twins; else 1.
        queries, candidates: of each row.
        pages: columns of the block table.
        quota_steps: columns of the quotas.
        eos_ids, mask_id, pad_id, filtered, cfg_scale: as in the decoder.
    """

    rows: int
    lanes: int
    queries: int
    candidates: int
    pages: int
    quota_steps: int
    eos_ids: tuple[int, ...]
    mask_id: int
    pad_id: int
    filtered: bool
    cfg_scale: float


def guided(head: Callable[[Tensor], Tensor], hidden: Tensor, twins: Tensor, cfg_scale: float) -> Tensor:
    """Logits of hidden states; with guidance u + (1 + scale)(c - u), u being those of the twins."""
    conditional = head(hidden)
    if not cfg_scale:
        return conditional
    free = head(twins)
    # In place: two tensors of logits, the largest of a block step, and not four.
    return conditional.sub_(free).mul_(cfg_scale + 1).add_(free)


class BlockStep:
    """One step of a block: ``graphs.StaticStep``.

    Attributes:
        tokens, given, step_map, confidence, rows, knobs, quotas: :data:`STATE`; the first four are as wide as
            the pages have positions.
    """

    def __init__(self, shape: BlockShape, page_size: int, device: torch.device) -> None:
        def zeros(*sizes: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(sizes, dtype=dtype, device=device)

        self.shape = shape
        b, lanes, q, s = shape.rows, shape.lanes, shape.queries, shape.candidates
        width = shape.pages * page_size
        self.tokens = zeros(b, width)
        self.given = zeros(b, width, dtype=torch.bool)
        self.step_map = zeros(b, width, dtype=torch.int32)
        self.confidence = zeros(b, width, dtype=torch.float32)
        self.rows = zeros(b, len(Row))
        self.idle = zeros(len(Row))
        self.idle[Row.MASKS_LEFT] = 1  # of rows that fill up: nothing changes it, and it stops no loop
        self.knobs = zeros(b, len(ops.Knob), dtype=torch.float32)
        self.quotas = zeros(b, shape.quota_steps, dtype=torch.int32)
        self.eos_ids = torch.tensor(shape.eos_ids, dtype=torch.int64, device=device)
        self.row_of = torch.arange(b, device=device).repeat_interleave(q).repeat(lanes)
        self.positions = torch.arange(s, device=device).repeat(b)  # of the candidates
        self.cu_rows = Runs.of([s] * b).to(device).cu
        self.first_query = torch.arange(lanes * b, device=device)[:, None] * q
        self.layout = Layout(
            positions=zeros(lanes * b * q),
            slots=zeros(lanes * b * q),
            block_table=zeros(lanes * b, shape.pages, dtype=torch.int32),
            kv_lens=zeros(lanes * b, dtype=torch.int32),
            queries=Runs.of([q] * (lanes * b)).to(device),
            wanted=zeros(lanes * b * s),
            outputs=Runs.of([s] * (lanes * b)).to(device),
            is_fresh=False,
        )
        self.runtime: Fused | None = None
        self.attention: Attention | None = None

    def load(
        self,
        runtime: Fused,
        attention: Attention,
        state: Mapping[str, Tensor],
        index: Tensor,
        layout: Layout,
        positions: Tensor,
    ) -> None:
        """Copies rows, and where their queries and keys lie, into the step's tensors.

        Args:
            runtime, attention: what computes the step.
            state: :data:`STATE` by name, of all rows.
            index: [n] int64, the rows that take the step.
            layout: of the queries of these alone.
            positions: [n * candidates] int64, of the candidates in their rows.
        """
        n, lanes = len(index), self.shape.lanes
        self.runtime, self.attention = runtime, attention
        self.tokens.fill_(self.shape.pad_id)
        self.rows.copy_(self.idle)
        self.layout.slots.fill_(-1)
        self.layout.kv_lens.zero_()
        for name in STATE:
            mine, theirs = getattr(self, name), state[name]
            mine[:n, : theirs.shape[1]] = theirs[index, : mine.shape[1]]
        self.positions.view(self.shape.rows, -1)[:n] = positions.view(n, -1)
        for name in ("positions", "slots", "block_table", "kv_lens"):
            mine, theirs = getattr(self.layout, name), getattr(layout, name)
            mine, theirs = (x.view(lanes, rows, -1) for x, rows in ((mine, self.shape.rows), (theirs, n)))
            mine[:, :n, : theirs.shape[2]] = theirs
        # Queries that are wanted, counted from the first of each sequence, here and there.
        wanted = layout.wanted.view(lanes * n, -1) - self.first_query[: lanes * n]
        first = self.first_query.view(lanes, -1, 1)[:, :n]
        self.layout.wanted.view(lanes, self.shape.rows, -1)[:, :n] = wanted.view(lanes, n, -1) + first

    def store(self, state: Mapping[str, Tensor], index: Tensor) -> None:
        """Copies the results back, and lets go of what is the caller's."""
        for name in ("tokens", "step_map", "confidence", "rows"):
            mine, theirs = getattr(self, name), state[name]
            width = min(mine.shape[1], theirs.shape[1])
            theirs[index, :width] = mine[: len(index), :width]
        # What is captured knows the pages by their address: it must not keep them from being freed.
        self.runtime = self.attention = None

    def __call__(self) -> None:
        """One forward of all rows, and what it fills."""
        shape, layout = self.shape, self.layout
        assert self.runtime is not None
        assert self.attention is not None
        inputs = self.tokens[self.row_of, layout.positions]
        if shape.cfg_scale:
            twins = inputs.view(2, -1)[1]
            twins.masked_fill_(self.given[self.row_of, layout.positions].view(2, -1)[1], shape.mask_id)
        self.attention.attend_over(layout)
        hidden = self.runtime.hidden(inputs, self.attention)
        hidden, twins = hidden[: len(self.positions)], hidden[len(self.positions) :]
        ops.unmask(
            guided(self.runtime.head, hidden, twins, shape.cfg_scale),
            self.cu_rows,
            self.positions,
            self.tokens,
            self.step_map,
            self.confidence,
            self.rows,
            self.knobs,
            self.quotas,
            self.eos_ids,
            shape.mask_id,
            shape.filtered,
        )


def addresses(runtime: Fused, attention: Attention) -> tuple[int, ...]:
    """Where everything lies that a captured step reads or writes beside its own tensors."""
    tables, cache = [table for pair in attention.tables.values() for table in pair], attention.cache
    return (*runtime.addresses, *(x.data_ptr() for x in (*tables, *cache.storage, *cache.scale_storage)))


_GRAPHS: WeakKeyDictionary[nn.Module, StepGraphs[BlockStep]] = WeakKeyDictionary()


def graphs_of(model: nn.Module, runtime: object, device: torch.device) -> StepGraphs[BlockStep] | None:
    """The model's captured steps; None where steps are not captured: on a CPU, through modules, or split.

    The environment variable ``FASTDLLM_GRAPHS`` says how they run on CUDA: ``block`` (one launch a block, the
    default), ``replay`` (one launch a step) or ``eager``.
    """
    asked = os.environ.get("FASTDLLM_GRAPHS", "block")
    if asked.upper() not in Rung.__members__:
        raise ValueError(f"FASTDLLM_GRAPHS={asked!r}; takes one of {', '.join(Rung.__members__).lower()}")
    rung = Rung[asked.upper()]
    if device.type != "cuda" or not isinstance(runtime, Fused) or runtime.group or rung == Rung.EAGER:
        return None
    if model not in _GRAPHS:
        _GRAPHS[model] = StepGraphs(CudaGraphs(device), first=rung)
    return _GRAPHS[model]
