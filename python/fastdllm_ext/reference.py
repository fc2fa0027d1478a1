"""Every operation in plain PyTorch, written for reading: the truth that the kernels are tested against.

The signatures are those of :mod:`fastdllm_ext.ops`. Arithmetic is in the dtype ``compute``
(float32 unless a test asks for float64), rounded once at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdllm_ext.ops import Knob, Row, Rule, Score

# Philox counter word that stands for "no token": of the words that it gives, 0 is a position's random score,
# 1 the noise of its rank.
NO_TOKEN = 0xFFFFFFFF


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
    *,
    compute: torch.dtype = torch.float32,
) -> Tensor:
    """Rotates q and k at their positions and stores k and v into the pages. See ``ops.rope_write_kv``."""
    half = cos.shape[1]
    c, s = (x[positions][:, None, :].to(compute) for x in (cos, sin))

    def rotate(x: Tensor) -> Tensor:
        y = x.to(compute)
        a, b, rest = y[..., :half], y[..., half : 2 * half], y[..., 2 * half :]
        return torch.cat((a * c - b * s, b * c + a * s, rest), dim=-1)

    kept = slots >= 0
    page, offset = slots[kept] // k_pages.shape[2], slots[kept] % k_pages.shape[2]
    for x, pages, scales in ((rotate(k), k_pages, k_scales), (v, v_pages, v_scales)):
        if scales is None:
            pages[page, :, offset] = x[kept].to(pages.dtype)
        else:
            numbers, scale = quantize_fp8(x[kept])
            pages.view(torch.uint8)[page, :, offset] = numbers.view(torch.uint8)
            scales[page, :, offset] = scale[..., 0]
    return rotate(q).to(q.dtype)


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
    *,
    compute: torch.dtype = torch.float32,
) -> Tensor:
    """softmax(scale q Kᵀ) V of every query over its sequence's pages. See ``ops.paged_attention``."""
    if k_scales is not None and v_scales is not None:
        k_pages = k_pages.to(compute) * k_scales[..., None]
        v_pages = v_pages.to(compute) * v_scales[..., None]
    out = torch.zeros_like(q)
    group = q.shape[1] // k_pages.shape[1]
    for b in range(len(kv_lens)):
        begin, end, length = int(cu_seqlens_q[b]), int(cu_seqlens_q[b + 1]), int(kv_lens[b])
        if begin == end or length == 0:
            continue
        pages = block_table[b, : -(-length // k_pages.shape[2])].long()

        def row(
            x: Tensor, pages: Tensor = pages, length: int = length
        ) -> Tensor:  # [heads, length, head_dim]
            keys = x[pages].transpose(1, 2).flatten(0, 1)[:length].transpose(0, 1)
            return keys.to(compute).repeat_interleave(group, dim=0)

        scores = scale * q[begin:end].transpose(0, 1).to(compute) @ row(k_pages).transpose(1, 2)
        out[begin:end] = (scores.softmax(dim=-1) @ row(v_pages)).transpose(0, 1).to(q.dtype)
    return out


def philox(key: int, c0: Tensor, c1: int, c2: int, c3: int) -> Tensor:
    """Philox4x32-10. ``c0`` [n] int64 -> four words for each, [n, 4] int64 in [0, 2³²)."""
    word = 0xFFFFFFFF

    def multiply(x: Tensor, constant: int) -> tuple[Tensor, Tensor]:  # high and low word of the product
        low = (x & 0xFFFF) * constant
        high = (x >> 16) * constant + (low >> 16)
        return high >> 16, (high << 16 | low & 0xFFFF) & word

    k0, k1 = key & word, key >> 32 & word
    c = [c0, *(torch.full_like(c0, x & word) for x in (c1, c2, c3))]
    for _ in range(10):
        high0, low0 = multiply(c[0], 0xD2511F53)
        high1, low1 = multiply(c[2], 0xCD9E8D57)
        c = [high1 ^ c[1] ^ k0, low1, high0 ^ c[3] ^ k1, low0]
        k0, k1 = (k0 + 0x9E3779B9) & word, (k1 + 0xBB67AE85) & word
    return torch.stack(c, dim=1)


def uniform(bits: Tensor) -> Tensor:
    """Words of Philox -> float64 in (0, 1), with the float32 rounding of the kernels."""
    return ((bits.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24).double()


def gumbel(bits: Tensor) -> Tensor:
    """Words of Philox -> standard Gumbel noise, float64: -log(-log1p(-u))."""
    return -torch.log(-torch.log1p(-uniform(bits)))


def gumbel_noise(seed: int, stream: int, step: int, position: int, vocab: int) -> Tensor:
    """Standard Gumbel noise of every token at one position, [vocab] float64."""
    return gumbel(philox(seed, torch.arange(-(-vocab // 4)), position, step, stream).flatten()[:vocab])


def top_p_top_k(z: Tensor, top_p: float, top_k: float) -> Tensor:
    """Which tokens of z [vocab] top-p and top-k keep, [vocab] bool. Equal values stay or go together."""
    ordered, order = z.sort(descending=True)
    larger = torch.searchsorted(-ordered, -z)  # how many values are larger than each
    mass = torch.cat((torch.zeros(1).double(), z.softmax(0)[order].cumsum(0)))[larger]
    kept = torch.ones(len(z), dtype=torch.bool)
    if 0 < top_p < 1:
        kept &= mass <= top_p
    if top_k > 0:
        kept &= larger < top_k
    return kept


def own_words(row: list[int], position: int) -> Tensor:
    """The four words of Philox that are a position's own."""
    return philox(row[Row.SEED], torch.tensor([NO_TOKEN]), position, row[Row.STEP], row[Row.STREAM])[0]


def score_logits(
    logits: Tensor, mask_id: int, knobs: list[float], filtered: bool, row: list[int], position: int
) -> tuple[int, float, bool]:
    """Candidate, score and health of one position from its logits [vocab]."""
    x = logits.double()
    is_mask = torch.arange(len(x)) == mask_id
    allowed = x.masked_fill(is_mask, -torch.inf)
    bad = bool(x.isnan().any() or (x == torch.inf).any() or not allowed.isfinite().any())
    if bad:
        return 0, float("nan"), True
    z = x / (knobs[Knob.SOFTMAX_TEMPERATURE] or 1.0)
    if filtered:
        kept = top_p_top_k(z, knobs[Knob.TOP_P], knobs[Knob.TOP_K])
        kept |= x >= allowed.max()  # where the mask alone would be kept
        z, allowed = (y.masked_fill(~kept, -torch.inf) for y in (z, allowed))
    noisy = allowed
    if knobs[Knob.TEMPERATURE] > 0:
        noise = gumbel_noise(row[Row.SEED], row[Row.STREAM], row[Row.STEP], position, len(x))
        noisy = allowed / knobs[Knob.TEMPERATURE] + noise
    candidate = int(noisy.argmax())
    p = z.softmax(0)
    if row[Row.SCORE] == Score.RANDOM:
        score = uniform(own_words(row, position)[0])
    elif row[Row.SCORE] == Score.MARGIN:
        first, second = p.masked_fill(is_mask, 0.0).topk(2).values
        score = first - second
    elif row[Row.SCORE] == Score.ENTROPY:
        score = torch.xlogy(p, p).sum()
    else:
        score = p[candidate]
    return candidate, float(score.float()), False


def rank_key(score: float, rank_temperature: float, row: list[int], position: int) -> float:
    """What a position is ranked by: its score, or score / rank_temperature + Gumbel noise of its own."""
    if rank_temperature <= 0:
        return score
    return score / rank_temperature + float(gumbel(own_words(row, position)[1]))


def fixed_point(x: float) -> int:
    """A float32 number as a multiple of 2⁻³², rounded towards 0, and at most 2³⁰."""
    return int(min(float(torch.tensor(x, dtype=torch.float32)), 2.0**30) * 2**32)


def selected(
    scores: list[float], keys: list[float], row: list[int], value: float, quotas: list[int]
) -> list[int]:
    """Indices that the row's rule commits, best first. ``scores`` and ``keys`` in order of position."""
    order = sorted(range(len(keys)), key=lambda i: (-keys[i], i))
    rule = row[Row.RULE]
    if rule == Rule.QUOTA:
        quota = quotas[min(row[Row.BLOCK_STEP], len(quotas) - 1)]
        passes = [rank < quota for rank in range(len(order))]
    elif rule == Rule.THRESHOLD:
        passes = [scores[i] >= value for i in order]
    elif rule == Rule.FACTOR:
        passes = [(n + 1) * (1 - scores[i]) <= value for n, i in enumerate(order, start=1)]
    elif rule == Rule.FRECHET:
        costs = [fixed_point(1 - scores[i]) for i in order]
        passes = [sum(costs[:n]) + 2 * costs[n] <= fixed_point(value) for n in range(len(order))]
    else:
        costs = [fixed_point(-scores[i]) for i in order]
        passes = [sum(costs[:n]) <= fixed_point(value) for n in range(len(order))]
    return [i for rank, i in enumerate(order) if rank == 0 or passes[rank]]


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
    """Scores, selects and commits, in place. See ``ops.unmask``."""
    for b in range(tokens.shape[0]):
        given = range(int(cu_rows[b]), int(cu_rows[b + 1]))
        masked = [r for r in given if tokens[b, positions[r]] == mask_id]
        if not masked:
            continue
        row, knob = rows[b].tolist(), knobs[b].tolist()
        where = positions[masked].tolist()
        judged = [
            score_logits(logits[r], mask_id, knob, filtered, row, p)
            for r, p in zip(masked, where, strict=True)
        ]
        rows[b, Row.BAD_LOGITS] = sum(bad for _, _, bad in judged)
        if rows[b, Row.BAD_LOGITS]:
            continue
        scores = [score for _, score, _ in judged]
        keys = [rank_key(c, knob[Knob.RANK_TEMPERATURE], row, p) for c, p in zip(scores, where, strict=True)]
        chosen = selected(scores, keys, row, knob[Knob.VALUE], quotas[b].tolist())
        for i in chosen:
            tokens[b, where[i]], confidence[b, where[i]] = judged[i][0], judged[i][1]
            step_map[b, where[i]] = row[Row.STEP]
        rows[b, Row.MASKS_LEFT] -= len(chosen)
        rows[b, Row.STEP] += 1
        rows[b, Row.BLOCK_STEP] += 1
        rows[b, Row.EOS_AT] = -1
        for p in range(row[Row.FIRST], row[Row.END]):
            if tokens[b, p] == mask_id:
                break
            if tokens[b, p] in eos_ids:
                rows[b, Row.EOS_AT] = p
                break


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, compute: torch.dtype = torch.float32) -> Tensor:
    """weight · cast(x / sqrt(mean x² + eps)). See ``ops.rms_norm``."""
    y = x.to(compute)
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return weight * y.to(x.dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, compute: torch.dtype = torch.float32
) -> Tensor:
    """residual += x, then rms_norm(residual). See ``ops.add_rms_norm``."""
    return rms_norm(residual.add_(x), weight, eps, compute=compute)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up. See ``ops.silu_mul``."""
    return torch.nn.functional.silu(gate) * up


def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x / scales as float8_e4m3fn, scales = max |x| / 448 of each row. See ``ops.quantize_fp8``."""
    x = x.float()
    scales = x.abs().amax(-1, keepdim=True) / 448
    scales = scales.where(scales != 0, 1.0).masked_fill(~scales.isfinite(), torch.nan)
    return (x / scales).clamp(-448, 448).to(torch.float8_e4m3fn), scales  # torch makes NaN of what is larger


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, scales: Tensor | None = None, *,
    compute: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """x weightᵀ + bias. See ``ops.linear``."""
    y = x.to(compute) @ weight.to(compute).T
    y = y if scales is None else y * scales.to(compute)
    return (y if bias is None else y + bias.to(compute)).to(x.dtype)


def linear_silu_mul(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, scales: Tensor | None = None, *,
    compute: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """silu_mul of the halves of linear. See ``ops.linear_silu_mul``."""
    return silu_mul(*linear(x, weight, bias, scales, compute=compute).chunk(2, dim=-1))


def copy_pages(pages: Tensor, src: Tensor, dst: Tensor) -> None:
    """Copies page ``src[i]`` over page ``dst[i]`` in every pool. See ``ops.copy_pages``."""
    pages[:, dst] = pages[:, src]
