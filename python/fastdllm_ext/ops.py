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

__all__ = [
    "Knob",
    "Row",
    "Rule",
    "Score",
    "add_rms_norm",
    "copy_pages",
    "linear",
    "linear_silu_mul",
    "paged_attention",
    "quantize_fp8",
    "rms_norm",
    "rope_write_kv",
    "silu_mul",
    "unmask",
]

_ops = torch.ops.fastdllm_ext


class Rule(IntEnum):
    """Selection rule of a row: what :func:`unmask` commits (core/select.h has the inequalities).

    Of Fast-dLLM (Algorithm 1 and Theorem 1): a number of positions; those whose score reaches a threshold;
    the longest prefix with (n + 1)(1 - c_n) <= factor. Two that add up what the prefix costs, exactly, in
    multiples of 2⁻³²: FRECHET bounds Σ (1 - c) + (1 - c_n), ENTROPY_BOUND the sum of the entropies -c of all
    but the last, c being ``Score.ENTROPY``.
    """

    QUOTA = 0
    THRESHOLD = 1
    FACTOR = 2
    FRECHET = 3
    ENTROPY_BOUND = 4


class Score(IntEnum):
    """What the masked positions of a row are ranked by, up to noise; the stored confidence too.

    With p the softmax over the kept tokens: the candidate's p; uniform noise; the largest p minus the second
    (without the mask); the negative entropy Σ p log p, at most 0 (Dream's ``margin`` and ``entropy``).
    """

    PROBABILITY = 0
    RANDOM = 1
    MARGIN = 2
    ENTROPY = 3


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
    MASKS_LEFT = 8
    EOS_AT = 9
    BAD_LOGITS = 10
    ARRIVALS = 11


class Knob(IntEnum):
    """Columns of the ``knobs`` tensor of :func:`unmask`.

    Attributes:
        VALUE: threshold, factor or bound; a threshold on ``Score.ENTROPY`` is negative.
        TEMPERATURE: of the noise that candidates are sampled with; 0 is greedy.
        SOFTMAX_TEMPERATURE: what the confidence divides the logits by: 1 for LLaDA, Dream's temperature.
        TOP_P: 0 and 1 are off.
        TOP_K: 0 is off.
        RANK_TEMPERATURE: of the noise that positions are ranked with (Dream's ``alg_temp``); 0 is none.
    """

    VALUE = 0
    TEMPERATURE = 1
    SOFTMAX_TEMPERATURE = 2
    TOP_P = 3
    TOP_K = 4
    RANK_TEMPERATURE = 5


assert {field.name.lower(): field.value for field in Row} == _C.ROW_COLUMNS
assert {field.name.lower(): field.value for field in Knob} == _C.KNOB_COLUMNS


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
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """Rotates q and k (half-split RoPE) and stores rotated k, and v, into pages, in place.

    Arithmetic is in float32, rounded once: what LLaDA computes. Dream rounds cos and sin to the activations'
    dtype first, which a table rounded so (and stored as float32) gives as well; it then rounds both products
    and their sum. In float32 that is the same, bit for bit. In bfloat16 this operation leaves the products
    as they are, and lies within 3 · 2⁻⁸ (|a cos| + |b sin|) of Dream's modules.

    Pages of float8_e4m3fn hold each head's vector x as x / s, s = max |x| / 448 being its scale (1 where that
    is 0): x in float32, after RoPE and not rounded to its dtype, the quotient rounded to the nearest number
    of e4m3, ties to the even one. A vector with NaN or infinity has the scale NaN, and may have any numbers.
    All else has the same bits on every device.

    Args:
        q: [T, q_heads, head_dim] float32, bfloat16 (float16 on CUDA); tokens may be strided.
        k, v: [T, kv_heads, head_dim], the same dtype.
        cos, sin: [positions, rotary_dim / 2] float32; dimensions past ``rotary_dim`` are not rotated.
        positions: [T] int64, row of the table for each token.
        slots: [T] int64, ``page * page_size + offset``; negative stores nothing.
        k_pages, v_pages: [pages, kv_heads, page_size, head_dim]; page_size 16, 32 or 64; q's dtype or
            float8_e4m3fn.
        k_scales, v_scales: [pages, kv_heads, page_size] float32 where the pages are float8_e4m3fn, else None.

    Returns:
        Rotated q, [T, q_heads, head_dim] contiguous.
    """
    return _ops.rope_write_kv(q, k, v, cos, sin, positions, slots, k_pages, v_pages, k_scales, v_scales)


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    kv_lens: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    scale: float,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """Bidirectional attention softmax(scale q Kᵀ) V of ragged queries over paged keys and values.

    Of pages of float8_e4m3fn, keys and values are the numbers times the scale of their vector. In arithmetic
    the scales stay apart: the numbers, exact in every dtype, are multiplied as q's dtype, scores in float32
    with the scales of keys, weights with those of values. A NaN of e4m3 itself is read as 480; what is bad
    has a NaN as its scale (:func:`rope_write_kv`).

    Args:
        q: [T, q_heads, head_dim] contiguous; head_dim a multiple of 8 up to 256.
        k_pages, v_pages: [pages, kv_heads, page_size, head_dim]; kv_heads divides q_heads (GQA); q's dtype or
            float8_e4m3fn.
        block_table: [B, max_blocks] int32, the pages of each sequence in order.
        kv_lens: [B] int32, keys of each sequence. What lies behind them in the last page is not read.
        cu_seqlens_q: [B + 1] int32; queries of sequence b are ``q[cu[b]:cu[b + 1]]``.
        max_seqlen_q: at least the longest query run.
        scale: usually ``head_dim ** -0.5``.
        k_scales, v_scales: [pages, kv_heads, page_size] float32 where the pages are float8_e4m3fn, else None.

    Returns:
        [T, q_heads, head_dim]; zeros for a sequence without keys. The bits of a sequence do not
        depend on the others.
    """
    return _ops.paged_attention(
        q, k_pages, v_pages, block_table, kv_lens, cu_seqlens_q, max_seqlen_q, scale, k_scales, v_scales
    )


def unmask(
    logits: Tensor,
    cu_rows: Tensor,
    positions: Tensor,
    tokens: Tensor,
    step_map: Tensor,
    confidence: Tensor,
    rows: Tensor,
    knobs: Tensor,
    quotas: Tensor,
    eos_ids: Tensor,
    mask_id: int,
    filtered: bool = False,
) -> None:
    """Confidence, candidate, selection, commit, masks left and EOS state, in place and without host sync.

    Fast-dLLM section 3.3: of the masked positions given, commits those that each sequence's rule
    selects, at least one. A sequence with no logits is left as it is.

    Positions are ranked by their score c, or by c / R + Gumbel noise where the rank temperature R is above 0:
    then the first n are a sample of n positions from softmax(c / R) without replacement. Ties: the lowest
    position. The rules compare c, which has no noise, and the rank; the first is always committed.

    Top-p and top-k keep every token whose logit reaches a floor, so that equal logits stay or go together and
    no order of sorting matters. With z = logits / softmax temperature: top-p keeps a token if all tokens with
    larger logits together have at most the probability top_p; of those, top-k keeps one if fewer than k have
    larger logits. The mask counts as any token in this; where it alone would be kept, the floor is lowered to
    the best candidate. Candidates and the confidence are those of the kept tokens.

    Rows of logits at positions whose token is not ``mask_id`` are ignored: not read, not counted, not ranked,
    not bad. So all positions of a block may be given on every step, with the same shapes. A sequence none of
    whose positions holds a mask is left as it is, like one without rows.

    Args:
        logits: [R, vocab] float32, bfloat16 (float16 on CUDA): one row a position.
        cu_rows: [B + 1] int32; rows of sequence b are ``logits[cu[b]:cu[b + 1]]``.
        positions: [R] int64, the position of each row in its sequence, ascending.
        tokens: [B, width] int64, changed at the committed positions; likewise
        step_map: [B, width] int32, set to the step that committed; and
        confidence: [B, width] float32, set to the score (:class:`Score`), which has no noise.
        rows: [B, len(Row)] int64, the decoding state (:class:`Row`), advanced by one step; ``Row.ARRIVALS``
            begins at 0.
        knobs: [B, len(Knob)] float32 (:class:`Knob`).
        quotas: [B, K] int32, K > 0: step i of a block, ``Row.BLOCK_STEP`` being i, commits ``quotas[b, i]``
            positions where the rule is a quota, or ``quotas[b, K - 1]`` where i >= K; at least one. Other
            rules ignore it.
        eos_ids: [E] int64, may be empty: then ``Row.EOS_AT`` stays -1.
        mask_id: never a candidate.
        filtered: whether any row has top-p or top-k; without it they are ignored, and cost nothing.
    """
    _ops.unmask(
        logits, cu_rows, positions, tokens, step_map, confidence, rows, knobs, quotas, eos_ids, mask_id,
        filtered,
    )  # fmt: skip


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight · (x / sqrt(mean x² + eps)) of each row, rounded where LLaDA's and Llama's modules round.

    Statistics in float32; the normalised value is rounded to x's dtype, the product again.

    Args:
        x: [..., hidden] float32, bfloat16 (float16 on CUDA); rows may be strided, evenly.
        weight: [hidden], the same dtype.
        eps: added to the mean square.

    Returns:
        [..., hidden] contiguous. The bits of a row do not depend on the others.
    """
    return _ops.rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``residual += x`` in place, rounded to the dtype, then ``rms_norm(residual, weight, eps)``.

    Args:
        x: [..., hidden] as for :func:`rms_norm`.
        residual: [..., hidden] contiguous, x's shape and dtype; shares no memory with x.
        weight: [hidden], the same dtype.
        eps: added to the mean square.

    Returns:
        [..., hidden] contiguous.
    """
    return _ops.add_rms_norm(x, residual, weight, eps)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, silu(x) = x / (1 + exp(-x)): in float32 and rounded, then the product rounded again.

    Args:
        gate, up: [..., n] float32, bfloat16 (float16 on CUDA), one shape and dtype; rows may be strided,
            evenly: the halves of one fused [..., 2 n] tensor.

    Returns:
        [..., n] contiguous.
    """
    return _ops.silu_mul(gate, up)


def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row as 8-bit floats and one scale: x ≈ values · scales, scales = max |x| / 448 of the row.

    A value is x / scale, divided in float32 and rounded to the nearest, ties to even: value · scale lies
    within 2⁻⁴ |x| of x, or within 2⁻¹⁰ scale where that is more, unless all of the row is below 6e-36. A row
    of zeros has the scale 1, as has one below 3e-43, which becomes zeros. A NaN or an infinity in a row makes
    its scale and its values NaN, and so every product with the row. The bits are the same on every device,
    and those of a row depend on nothing else.

    Two matrices are multiplied by ``torch._scaled_mm(values, w_values.t(), scale_a=scales,
    scale_b=w_scales.t(), out_dtype=torch.bfloat16)``.

    Args:
        x: [..., k] float32, bfloat16 (float16 on CUDA), k at least 1; rows may be strided, evenly.

    Returns:
        values [..., k] float8_e4m3fn and scales [..., 1] float32, both contiguous.
    """
    return _ops.quantize_fp8(x)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, scales: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias, summed in float32 and rounded once, after the bias.

    On the CPU, up to 64 rows of float32 and 128 of bfloat16 (a block step has 32) are multiplied by a kernel
    that reads the weight once and as it lies. There the bits of a row depend on nothing but the row, the
    weight, the bias and the instruction set: not on the other rows, how many there are, or the threads. The
    tile unit and vdpbf16ps take denormal numbers as zero. More rows, float16 and CUDA go to torch's own
    ``linear``.

    With scales the weight is int8, row j standing for ``scales[j] * weight[j]``; on the CPU, for float32
    and bfloat16, any number of rows. On the tile unit, and with vpdpbusd, x is rounded first to two bytes, by
    at most 1/65,278 of its row's largest magnitude, and the rest is exact up to the last rounding.

    Args:
        x: [..., k] float32, bfloat16 or float16, k at least 1; rows may be strided, evenly.
        weight: [n, k], the same dtype, or int8; rows may be strided: some rows of a fused weight.
        bias: [n] or None, x's dtype.
        scales: [n] float32 where the weight is int8, which then has at most 2¹⁶ columns.

    Returns:
        [..., n] contiguous.
    """
    return _ops.linear(x, weight, bias, scales)


def linear_silu_mul(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, scales: Tensor | None = None
) -> Tensor:
    """silu(gate) · up of the halves of ``linear(x, weight, bias)``, without writing those.

    gate and up are rounded to the dtype, then everything is as in :func:`silu_mul`. The bits are those of the
    two operations one after the other; what :func:`linear` says of them and of other devices holds here.

    Args:
        x: [..., k] float32, bfloat16 (float16 on CUDA), k at least 1; rows may be strided, evenly.
        weight: [2 n, k], the same dtype or int8: the n rows of the gate, then those of the up.
        bias: [2 n] or None, x's dtype.
        scales: [2 n] float32 where the weight is int8.

    Returns:
        [..., n] contiguous.
    """
    return _ops.linear_silu_mul(x, weight, bias, scales)


def copy_pages(pages: Tensor, src: Tensor, dst: Tensor) -> None:
    """Copies page ``src[i]`` over page ``dst[i]`` in each of the outer pools, in place.

    Args:
        pages: [outer, num_pages, ...] contiguous, any dtype.
        src, dst: [pairs] int64; destinations are distinct and none is a source.
    """
    _ops.copy_pages(pages, src, dst)


@torch.library.register_fake("fastdllm_ext::rope_write_kv")
def _(  # type: ignore[no-untyped-def]
    q, k, v, cos, sin, positions, slots, k_pages, v_pages, k_scales=None, v_scales=None
):
    return q.new_empty(q.shape)


@torch.library.register_fake("fastdllm_ext::paged_attention")
def _(  # type: ignore[no-untyped-def]
    q, k_pages, v_pages, block_table, kv_lens, cu_seqlens_q, max_seqlen_q, scale, k_scales=None, v_scales=None
):
    return q.new_empty(q.shape)


@torch.library.register_fake("fastdllm_ext::unmask")
def _(  # type: ignore[no-untyped-def]
    logits, cu_rows, positions, tokens, step_map, confidence, rows, knobs, quotas, eos_ids, mask_id,
    filtered=False,
):  # fmt: skip
    return None


@torch.library.register_fake("fastdllm_ext::rms_norm")
def _(x, weight, eps):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


@torch.library.register_fake("fastdllm_ext::add_rms_norm")
def _(x, residual, weight, eps):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


@torch.library.register_fake("fastdllm_ext::silu_mul")
def _(gate, up):  # type: ignore[no-untyped-def]
    return gate.new_empty(gate.shape)


@torch.library.register_fake("fastdllm_ext::quantize_fp8")
def _(x):  # type: ignore[no-untyped-def]
    values = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    return values, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@torch.library.register_fake("fastdllm_ext::linear")
def _(x, weight, bias=None, scales=None):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("fastdllm_ext::linear_silu_mul")
def _(x, weight, bias=None, scales=None):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], weight.shape[0] // 2))


@torch.library.register_fake("fastdllm_ext::copy_pages")
def _(pages, src, dst):  # type: ignore[no-untyped-def]
    return None
