"""The operations: typed wrappers over ``torch.ops.fastdllm_ext``, with shapes, dtypes and fake versions.

All tensors of a call lie on one device (CPU or CUDA). ``T`` counts query tokens of all sequences
together (ragged, no padding), ``B`` sequences. Bad shapes, dtypes and devices are a RuntimeError that
names the operation and the argument; on the CPU index values are checked as well.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from fastdllm_ext import _C

__all__ = ["Row", "Rule", "Score", "copy_pages", "paged_attention", "rope_write_kv", "unmask"]

_ops = torch.ops.fastdllm_ext


class Rule(IntEnum):
    """Selection rule of a row (semantics: Fast-dLLM, Algorithm 1 and Theorem 1)."""

    QUOTA = 0
    THRESHOLD = 1
    FACTOR = 2


class Score(IntEnum):
    """What the masked positions of a row are ranked by."""

    PROBABILITY = 0
    RANDOM = 1


class Row(IntEnum):
    """Columns of the ``rows`` tensor of :func:`unmask`: a sequence's decoding state (core/params.h)."""

    RULE = 0
    SCORE = 1
    SEED = 2
    STREAM = 3
    FIRST = 4
    END = 5
    STEP = 6
    BLOCK_STEP = 7
    BLOCK_MASKS = 8
    BLOCK_STEPS = 9
    MASKS_LEFT = 10
    EOS_AT = 11
    BAD_LOGITS = 12


assert {field.name.lower(): field.value for field in Row} == _C.ROW_COLUMNS


def rope_write_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
) -> Tensor:
    """Rotates q and k (half-split RoPE) and stores rotated k, and v, into pages, in place.

    Args:
        q: [T, q_heads, head_dim] float32, bfloat16 (float16 on CUDA); tokens may be strided.
        k, v: [T, kv_heads, head_dim], the same dtype.
        cos, sin: [positions, rotary_dim / 2] float32; dimensions past ``rotary_dim`` are not rotated.
        positions: [T] int64, row of the table for each token.
        slots: [T] int64, ``page * page_size + offset``; negative stores nothing.
        k_pages, v_pages: [pages, kv_heads, page_size, head_dim]; page_size 16, 32 or 64.

    Returns:
        Rotated q, [T, q_heads, head_dim] contiguous.
    """
    return _ops.rope_write_kv(q, k, v, cos, sin, positions, slots, k_pages, v_pages)


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    kv_lens: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    scale: float,
) -> Tensor:
    """Bidirectional attention softmax(scale q Kᵀ) V of ragged queries over paged keys and values.

    Args:
        q: [T, q_heads, head_dim] contiguous; head_dim a multiple of 8 up to 256.
        k_pages, v_pages: [pages, kv_heads, page_size, head_dim]; kv_heads divides q_heads (GQA).
        block_table: [B, max_blocks] int32, the pages of each sequence in order.
        kv_lens: [B] int32, keys of each sequence. What lies behind them in the last page is not read.
        cu_seqlens_q: [B + 1] int32; queries of sequence b are ``q[cu[b]:cu[b + 1]]``.
        max_seqlen_q: at least the longest query run.
        scale: usually ``head_dim ** -0.5``.

    Returns:
        [T, q_heads, head_dim]; zeros for a sequence without keys. The bits of a sequence do not
        depend on the others.
    """
    return _ops.paged_attention(q, k_pages, v_pages, block_table, kv_lens, cu_seqlens_q, max_seqlen_q, scale)


def unmask(
    logits: Tensor,
    cu_rows: Tensor,
    positions: Tensor,
    tokens: Tensor,
    step_map: Tensor,
    confidence: Tensor,
    rows: Tensor,
    knobs: Tensor,
    eos_ids: Tensor,
    mask_id: int,
) -> None:
    """Confidence, candidate, selection, commit, masks left and EOS state, in place and without host sync.

    Fast-dLLM section 3.3: of the masked positions given, commits those that each sequence's rule
    selects, at least one. A sequence with no logits is left as it is.

    Args:
        logits: [R, vocab] float32, bfloat16 (float16 on CUDA): one row a masked position.
        cu_rows: [B + 1] int32; rows of sequence b are ``logits[cu[b]:cu[b + 1]]``.
        positions: [R] int64, the position of each row in its sequence, ascending.
        tokens: [B, width] int64, changed at the committed positions; likewise
        step_map: [B, width] int32, set to the step that committed; and
        confidence: [B, width] float32, set to the softmax probability (without noise or temperature).
        rows: [B, len(Row)] int64, the decoding state (:class:`Row`), advanced by one step.
        knobs: [B, 2] float32: threshold or factor, temperature (0 is greedy).
        eos_ids: [E] int64, may be empty: then ``Row.EOS_AT`` stays -1.
        mask_id: never a candidate.
    """
    _ops.unmask(logits, cu_rows, positions, tokens, step_map, confidence, rows, knobs, eos_ids, mask_id)


def copy_pages(pages: Tensor, src: Tensor, dst: Tensor) -> None:
    """Copies page ``src[i]`` over page ``dst[i]`` in each of the outer pools, in place.

    Args:
        pages: [outer, num_pages, ...] contiguous, any dtype.
        src, dst: [pairs] int64; destinations are distinct and none is a source.
    """
    _ops.copy_pages(pages, src, dst)


@torch.library.register_fake("fastdllm_ext::rope_write_kv")
def _(q, k, v, cos, sin, positions, slots, k_pages, v_pages):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape)


@torch.library.register_fake("fastdllm_ext::paged_attention")
def _(q, k_pages, v_pages, block_table, kv_lens, cu_seqlens_q, max_seqlen_q, scale):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape)


@torch.library.register_fake("fastdllm_ext::unmask")
def _(logits, cu_rows, positions, tokens, step_map, confidence, rows, knobs, eos_ids, mask_id):  # type: ignore[no-untyped-def]
    return None


@torch.library.register_fake("fastdllm_ext::copy_pages")
def _(pages, src, dst):  # type: ignore[no-untyped-def]
    return None
