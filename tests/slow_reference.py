"""The decoding specification (docs/decoding.md), slow and obviously right: one row, dense, Python loops.

It shares nothing with the package but the model's weights. Keys and values of every position are kept in one
dense tensor a layer, NaN where none were ever computed; a forward over some positions overwrites theirs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class SlowOutput:
    tokens: list[int]  # the answer, padded behind its EOS
    length: int  # to EOS
    nfe: int
    step_map: list[int]
    confidence: list[float]
    closest: float  # the narrowest decision: below the error of float32, the tokens are not determined


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * (x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt())


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """x [T, heads, head_dim]; element i is paired with i + head_dim / 2 as a complex number."""
    half = x.shape[-1] // 2
    angle = positions[:, None] * theta ** (-torch.arange(half) / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat((turned.real, turned.imag), -1)


def through_fp8(x: Tensor) -> Tensor:
    """What is left of keys or values [T, heads, head_dim] that are kept in 8 bits with a scale each."""
    scale = x.abs().amax(-1, keepdim=True) / 448
    scale[scale == 0] = 1
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


class SlowModel:
    """LLaDA or Dream, by their modules' names."""

    def __init__(self, model: Any, length: int, fp8: bool = False) -> None:
        self.fp8 = fp8
        c, inner = model.config, model.model
        self.is_dream = not hasattr(inner, "transformer")
        if self.is_dream:
            self.heads, self.kv_heads = c.num_attention_heads, c.num_key_value_heads
            self.layers = [
                (b.input_layernorm, *(getattr(b.self_attn, f"{x}_proj") for x in "qkvo"),
                 b.post_attention_layernorm, *(getattr(b.mlp, f"{x}_proj") for x in ("gate", "up", "down")))
                for b in inner.layers
            ]  # fmt: skip
            self.embedding, self.norm, self.head = inner.embed_tokens, inner.norm, model.lm_head.weight
        else:
            t = inner.transformer
            self.heads, self.kv_heads = c.n_heads, c.n_kv_heads
            self.layers = [
                (b.attn_norm, b.q_proj, b.k_proj, b.v_proj, b.attn_out,
                 b.ff_norm, b.ff_proj, b.up_proj, b.ff_out)
                for b in t.blocks
            ]  # fmt: skip
            self.embedding, self.norm = t.wte, t.ln_f
            self.head = t.wte.weight if c.weight_tying else t.ff_out.weight
        self.eps, self.theta = c.rms_norm_eps, c.rope_theta
        self.head_dim = self.layers[0][1].out_features // self.heads
        nothing = torch.full((length, self.kv_heads, self.head_dim), math.nan)
        self.kv = [(nothing, nothing) for _ in self.layers]

    def forward(self, tokens: Tensor, positions: Tensor, visible: int) -> dict[int, Tensor]:
        """Logits by the position that they are for: a forward over some positions that sees [0, visible)."""
        x = self.embedding.weight[tokens[positions]]
        for i, (norm, wq, wk, wv, wo, norm2, gate, up, down) in enumerate(self.layers):
            n = rms_norm(x, norm.weight, self.eps)
            q, k, v = (w(n).view(len(positions), -1, self.head_dim) for w in (wq, wk, wv))
            q, k = rotate(q, positions, self.theta), rotate(k, positions, self.theta)
            if self.fp8:
                k, v = through_fp8(k), through_fp8(v)
            old = self.kv[i]
            self.kv[i] = (old[0].index_copy(0, positions, k), old[1].index_copy(0, positions, v))
            k, v = (kept[:visible] for kept in self.kv[i])
            heads = []
            for h in range(self.heads):
                g = h // (self.heads // self.kv_heads)
                heads.append(torch.softmax(q[:, h] @ k[:, g].T / math.sqrt(self.head_dim), -1) @ v[:, g])
            x = x + wo(torch.cat(heads, -1))
            n = rms_norm(x, norm2.weight, self.eps)
            x = x + down(F.silu(gate(n)) * up(n))
        logits = rms_norm(x, self.norm.weight, self.eps) @ self.head.T
        shift = 1 if self.is_dream else 0
        found = {int(p) + shift: row for p, row in zip(positions, logits, strict=True)}
        if shift and 0 in positions:
            found[0] = logits[0]
        return found

    def without_token(self, tokens: Tensor, position: int, mask: int, visible: int) -> Tensor:
        """Logits of a position that is a mask for this once: all others' keys and values are those kept."""
        kept, tokens = list(self.kv), tokens.clone()
        tokens[position] = mask
        logits = self.forward(tokens, torch.arange(position - self.is_dream, position + 1), visible)[position]
        self.kv = kept
        return logits


def kept_tokens(logits: Tensor, mask: int, top_p: float | None, top_k: int | None) -> Tensor:
    """Which tokens top-p and then top-k leave; the best candidate always, with those that equal it."""
    p = torch.softmax(logits, 0)
    larger = logits[None] > logits[:, None]  # of each token, those above it
    keep = (larger * p).sum(1) <= (1 if top_p is None else top_p)
    if top_k is not None:
        keep &= larger.sum(1) < top_k
    best = max(float(x) for v, x in enumerate(logits) if v != mask)
    return keep | (logits >= best)


def judge(
    logits: Tensor, mask: int, remasking: str, top_p: float | None, top_k: int | None
) -> tuple[int, float, float]:
    """Candidate, confidence at temperature 0, and how far the candidate's logit lies above the next."""
    logits = logits.double()
    if top_p is not None or top_k is not None:
        logits = logits.masked_fill(~kept_tokens(logits, mask, top_p, top_k), -math.inf)
    p = torch.softmax(logits, 0)
    candidates = logits.clone()
    candidates[mask] = -math.inf
    token = int(candidates.argmax())
    first, second = candidates.topk(2).values
    if remasking == "entropy":
        score = float(torch.xlogy(p, p).sum())
    elif remasking == "margin":
        score = float(p[token] - p[token] * (second - first).exp())
    else:
        score = float(p[token])
    if remasking != "entropy" and score > 1 - 1e-9:
        score = 1.0  # which it is in float32: such scores are equal
    return token, score, float(first - second)


def even(masks: int, steps: int) -> list[int]:
    return [masks // steps + (i < masks % steps) for i in range(steps)]


def linear(masks: int, steps: int, eps: float) -> list[int]:
    """Dream's time steps, with the steps that fill nothing."""
    t = torch.linspace(1, eps, steps + 1)
    quotas = []
    for i in range(steps):
        quotas.append(int(masks * (1 - t[i + 1] / t[i])) if i < steps - 1 else masks)
        masks -= quotas[-1]
    return quotas


def how_many(ranked: list[float], rule: dict, quota: int) -> tuple[int, float]:
    """Positions that the rule commits, of confidences in falling order; and its narrowest decision."""
    if "threshold" in rule:
        return (
            max(1, len([c for c in ranked if c >= rule["threshold"]])),
            min([abs(c - rule["threshold"]) for c in ranked[1:]], default=1.0),
        )
    if "factor" in rule:
        n = 0
        while n < len(ranked) and (n + 2) * (1 - ranked[n]) <= rule["factor"]:
            n += 1
        return max(1, n), min(abs((n + 2) * (1 - c) - rule["factor"]) for n, c in enumerate(ranked))
    if "frechet" in rule:
        costs = [sum(1 - c for c in ranked[:n]) + 2 * (1 - ranked[n]) for n in range(len(ranked))]
        return longest(costs, rule["frechet"])
    if "entropy_bound" in rule:
        return longest([sum(-c for c in ranked[:n]) for n in range(len(ranked))], rule["entropy_bound"])
    return max(1, quota), 1.0


def longest(costs: list[float], bound: float) -> tuple[int, float]:
    """Of prefixes of 1, 2, ... positions, the longest whose cost is within the bound, at least the first."""
    return (
        max([1, *(n for n, cost in enumerate(costs, start=1) if cost <= bound)]),
        min([abs(cost - bound) for cost in costs[1:]], default=1.0),
    )


class SlowRule:
    """A rule that is no matter of ranks alone."""

    verifies = False  # it may take tokens back

    def begin(self) -> None:
        """A block begins."""

    def fuse(self, position: int, logits: Tensor) -> Tensor:
        """The logits that a position is judged by."""
        return logits

    def choose(self, found: dict[int, float], logits: dict[int, Tensor]) -> tuple[set[int], float]:
        """Which masks are filled, of their confidences by position; and the narrowest decision.

        Where it chooses none, the most confident one is.
        """
        raise NotImplementedError

    def revoke(self, held: dict[int, float], filled: int) -> tuple[set[int], float]:
        """Which tokens are taken back, of the block's probabilities without themselves before the step.

        filled: how many the step fills.
        """
        raise NotImplementedError


@torch.no_grad()
def slow_generate(
    model: Any,
    prompt: Tensor,
    *,
    gen_length: int = 0,
    block_length: int,
    cache: str,
    stop_on_eos: bool = True,
    infill: bool = False,
    refresh: str | int = "block",
    window: tuple[int, int] = (0, 0),
    suffix: int | None = None,
    cfg_scale: float = 0.0,
    remasking: str = "low_confidence",
    schedule: str = "even",
    eps: float = 1e-3,
    top_p: float | None = None,
    top_k: int | None = None,
    fp8: bool = False,
    slow_rule: SlowRule | None = None,
    **rule: float,
) -> SlowOutput:
    c = model.config
    mask, eos = c.mask_token_id, c.eos_token_id
    tokens = prompt.clone() if infill else torch.cat((prompt, torch.full((gen_length,), mask)))
    stop_on_eos = stop_on_eos and not infill
    end = len(tokens)
    given = tokens != mask
    first = int((~given).nonzero()[0])
    net, free = SlowModel(model, end, fp8), SlowModel(model, end, fp8)
    step_map, confidence = [-1] * (end - first), [0.0] * (end - first)
    blocks = []
    for a in range(first, end, block_length):
        masks = [p for p in range(a, min(a + block_length, end)) if tokens[p] == mask]
        if masks:
            blocks.append((masks[0], masks[-1] + 1))
    every = 1 if refresh == "block" else int(refresh)
    nfe, closest = 0, math.inf

    def finished_at() -> int | None:
        for p in range(first, end):
            if tokens[p] == mask:
                return None
            if tokens[p] == eos:
                return p
        return None

    for number, (begin, stop) in enumerate(blocks):
        last_served = min((number // every + 1) * every, len(blocks)) - 1
        visible = end if suffix is None else min(end, blocks[last_served][1] + suffix)
        masks = [p for p in range(begin, stop) if tokens[p] == mask]
        one_first = net.is_dream and cache != "none" and len(masks) > 1
        if "steps" in rule:
            steps = max(1, int(rule["steps"]) // len(blocks) + (number < int(rule["steps"]) % len(blocks)))
        else:
            steps = 1
        if schedule == "linear" and one_first:  # that is the first time step, whatever its share
            t = torch.linspace(1, eps, steps + 1)
            quotas, left = [1], len(masks) - 1
            for i in range(1, steps):
                quotas.append(int(left * (1 - t[i + 1] / t[i])) if i < steps - 1 else left)
                left -= quotas[-1]
            quotas.append(left)
        elif schedule == "linear":
            quotas = linear(len(masks), steps, eps)
        elif one_first:
            quotas = [1, *even(len(masks) - 1, max(1, steps - 1))]
        else:
            quotas = even(len(masks), steps)
        quotas = [q for q in quotas if q > 0]
        step = 0
        if slow_rule is not None:
            slow_rule.begin()
        while any(tokens[p] == mask for p in range(begin, stop)):
            low, high = begin - window[0], stop + window[1]
            refreshes = cache == "none" or (step == 0 and number % every == 0)
            if step == 0 and not refreshes:
                low = min(low, blocks[number - 1][0])
            if cache == "prefix":
                high = visible
            if refreshes:
                low, high = 0, visible
            positions = torch.arange(max(0, low), min(high, visible))
            logits = net.forward(tokens, positions, visible)
            if cfg_scale:
                without = free.forward(torch.where(given, mask, tokens), positions, visible)
                logits = {p: without[p] + (cfg_scale + 1) * (x - without[p]) for p, x in logits.items()}
            nfe += 1
            found = []
            for p in [begin] if one_first and step == 0 else range(begin, stop):
                if tokens[p] == mask:
                    if slow_rule is not None:
                        logits[p] = slow_rule.fuse(p, logits[p])
                    token, score, gap = judge(logits[p], mask, remasking, top_p, top_k)
                    found.append((-score, p, token, gap))
            found.sort()
            if slow_rule is not None:
                chosen, gap = slow_rule.choose({p: -negative for negative, p, _, _ in found}, logits)
                closest = min(closest, gap)
                if not chosen and len(found) > 1 and found[0][0] != found[1][0]:
                    closest = min(closest, found[1][0] - found[0][0])
                filled = [f for f in found if f[1] in chosen] or found[:1]
            else:
                quota = quotas[step] if step < len(quotas) else 1
                count, gap = how_many([-f[0] for f in found], rule, quota)
                closest = min(closest, gap)
                if count < len(found) and found[count - 1][0] != found[count][0]:
                    closest = min(closest, found[count][0] - found[count - 1][0])
                filled = found[:count]
            closest = min(closest, *(f[3] for f in filled))
            back: set[int] = set()
            if slow_rule is not None and slow_rule.verifies:
                held = {}
                for p in range(begin + (net.is_dream and cache != "none"), stop) if step > 0 else ():
                    if tokens[p] != mask and not given[p]:
                        l = net.without_token(tokens, p, mask, visible).double()
                        held[p] = float(torch.softmax(l, 0)[tokens[p]])
                back, gap = slow_rule.revoke(held, len(filled))
                closest = min(closest, gap)
            for negative, p, token, _ in filled:
                tokens[p] = token
                step_map[p - first], confidence[p - first] = nfe - 1, -negative
            for p in back:
                tokens[p], step_map[p - first], confidence[p - first] = mask, -1, 0.0
            step += 1
            final = slow_rule is None or not slow_rule.verifies
            if final and stop_on_eos and finished_at() is not None:
                break
        if stop_on_eos and finished_at() is not None:
            break

    answer = tokens[first:].tolist()
    length = len(answer)
    if not infill and eos in answer:
        length = answer.index(eos) + 1
        if stop_on_eos:
            rest = len(answer) - length
            answer[length:] = [c.pad_token_id] * rest
            step_map[length:] = [-1] * rest
            confidence[length:] = [0.0] * rest
    return SlowOutput(answer, length, nfe, step_map, confidence, closest)
