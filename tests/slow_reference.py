"""The decoding specification, slow and obviously right: one row, dense attention, Python loops.

It shares nothing with the package but the model's weights. Keys and values of every position are
kept in one dense tensor a layer; a forward over some positions overwrites theirs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * (x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt())


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """x [T, heads, head_dim]; element i is paired with i + head_dim / 2 as a complex number."""
    half = x.shape[-1] // 2
    angle = positions[:, None] * theta ** (-torch.arange(half) / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat((turned.real, turned.imag), -1)


class SlowLLaDA:
    def __init__(self, model: torch.nn.Module) -> None:
        self.config = model.config
        self.parts = model.model.transformer
        self.kv: list[tuple[Tensor, Tensor]] = []

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits of the positions given; their keys and values replace those kept, if any."""
        c = self.config
        fresh = len(positions) == len(tokens)
        if fresh:
            self.kv = []
        x = self.parts.wte.weight[tokens[positions]]
        for i, block in enumerate(self.parts.blocks):
            n = rms_norm(x, block.attn_norm.weight, c.rms_norm_eps)
            q, k, v = (
                p(n).view(len(positions), -1, c.head_dim) for p in (block.q_proj, block.k_proj, block.v_proj)
            )
            q, k = rotate(q, positions, c.rope_theta), rotate(k, positions, c.rope_theta)
            if fresh:
                self.kv.append((k, v))
            else:
                k, v = (
                    old.index_copy(0, positions, new) for old, new in zip(self.kv[i], (k, v), strict=True)
                )
                self.kv[i] = (k, v)
            heads = []
            for h in range(c.n_heads):
                g = h // (c.n_heads // c.n_kv_heads)
                heads.append(torch.softmax(q[:, h] @ k[:, g].T / math.sqrt(c.head_dim), -1) @ v[:, g])
            x = x + block.attn_out(torch.cat(heads, -1))
            n = rms_norm(x, block.ff_norm.weight, c.rms_norm_eps)
            x = x + block.ff_out(F.silu(block.ff_proj(n)) * block.up_proj(n))
        x = rms_norm(x, self.parts.ln_f.weight, c.rms_norm_eps)
        return x @ (self.parts.wte.weight if c.weight_tying else self.parts.ff_out.weight).T


def how_many(ranked: list[float], rule: dict, step: int, steps: int, masks: int) -> int:
    """Positions that the rule commits, from their confidences in falling order."""
    if "steps" in rule:
        quotas = [masks // steps] * steps
        for i in range(masks % steps):
            quotas[i] += 1
        return max(1, quotas[step])
    if "threshold" in rule:
        return max(1, len([c for c in ranked if c >= rule["threshold"]]))
    n = 0
    while n < len(ranked) and (n + 2) * (1 - ranked[n]) <= rule["factor"]:
        n += 1
    return max(1, n)


@torch.no_grad()
def slow_generate(
    model: torch.nn.Module,
    prompt: Tensor,
    *,
    gen_length: int,
    block_length: int,
    cache: str,
    stop_on_eos: bool = True,
    **rule: float,
) -> SlowOutput:
    c = model.config
    mask, eos = c.mask_token_id, c.eos_token_id
    net = SlowLLaDA(model)
    first, end = len(prompt), len(prompt) + gen_length
    tokens = torch.cat((prompt, torch.full((gen_length,), mask)))
    step_map, confidence = [-1] * gen_length, [0.0] * gen_length
    blocks = [range(a, min(a + block_length, end)) for a in range(first, end, block_length)]
    nfe = 0

    def finished_at() -> int | None:
        for p in range(first, end):
            if tokens[p] == mask:
                return None
            if tokens[p] == eos:
                return p
        return None

    for number, block in enumerate(blocks):
        steps = max(
            1, int(rule.get("steps", 1)) // len(blocks) + (number < int(rule.get("steps", 1)) % len(blocks))
        )
        step = 0
        while any(tokens[p] == mask for p in block):
            if step == 0 or cache == "none":
                positions = torch.arange(end)
            elif cache == "prefix":
                positions = torch.arange(block[0], end)
            else:
                positions = torch.arange(block[0], block[-1] + 1)
            logits = net.forward(tokens, positions).double()
            nfe += 1
            found = []
            for p in block:
                if tokens[p] == mask:
                    row = logits[p - int(positions[0])]
                    probability = torch.softmax(row, 0)
                    row[mask] = -math.inf
                    found.append((-float(probability[row.argmax()]), p, int(row.argmax())))
            found.sort()
            count = how_many([-c for c, _, _ in found], rule, step, steps, len(block))
            for c_negative, p, token in found[:count]:
                tokens[p] = token
                step_map[p - first], confidence[p - first] = nfe - 1, -c_negative
            step += 1
            if stop_on_eos and finished_at() is not None:
                break
        if stop_on_eos and finished_at() is not None:
            break

    answer = tokens[first:].tolist()
    at = answer.index(eos) if eos in answer else None
    length = gen_length if at is None else at + 1
    if stop_on_eos and at is not None:
        answer[length:] = [c.pad_token_id] * (gen_length - length)
        step_map[length:] = [-1] * (gen_length - length)
        confidence[length:] = [0.0] * (gen_length - length)
    return SlowOutput(answer, length, nfe, step_map, confidence)
