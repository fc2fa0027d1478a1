"""How likely a model finds an answer: LLaDA's Monte Carlo estimate, for every family."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdllm_ext.arguments import check_model, read_prompts, row_seeds
from fastdllm_ext.checks import check_count
from fastdllm_ext.decoding import GenerationConfig
from fastdllm_ext.forward import device_of, evaluating
from fastdllm_ext.patching.family import Family, Geometry
from fastdllm_ext.patching.registry import patched_family, unwrapped
from fastdllm_ext.whole import HEAD_ROWS, WholeRows

__all__ = ["loglikelihood"]


@torch.no_grad()
def loglikelihood(
    model: nn.Module,
    prompts: Tensor | Sequence[Tensor],
    answers: Tensor | Sequence[Tensor],
    *,
    samples: int = 128,
    batch_size: int = 16,
    cfg_scale: float = 0.0,
    seed: int | Sequence[int] | None = None,
) -> Tensor:
    """Estimates log p(answer | prompt) of each pair, as a masked diffusion model bounds it from below.

    LLaDA (arXiv 2502.09992), section 2.4, equation 6, and appendix A.2, Algorithm 3: hide l of the answer's
    L tokens, add up their log p and multiply by L / l; the mean over ``samples`` such draws is without bias.
    docs/decoding.md defines the draws. Every draw is one forward of the whole row: thresholds, caches, block
    lengths and all else that decoding has have no part in it.

    Args:
        model: a patched model, of any family.
        prompts: [B, P] int64, or a list of B 1-D int64 tensors of unequal length, without padding and without
            mask tokens; empty ones where the family allows it (LLaDA).
        answers: the same, [B, A] or a list; one token each or more.
        samples: draws for each pair. One is enough for an answer of one token; LLaDA takes 128 otherwise.
        batch_size: rows of a forward, of one pair or several; and draws of a pair over which the numbers of
            masks are spread evenly.
        cfg_scale: classifier-free guidance; 0 is off. Each row then has a twin whose prompt is masked.
        seed: an int; pair b then draws by (seed, b). Or one int for each pair, which then has the same draws
            alone and in any batch. None: drawn from torch's generator.

    Returns:
        [B] float32 on the model's device, in nats.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: one that is out of range; the message names it, what came and what is allowed. A model
            that is not patched. NaN or infinite logits.
    """
    family, model = patched_family(model), unwrapped(model)
    geometry = family.geometry(model)
    check_model(model)
    check_count("samples", samples)
    check_count("batch_size", batch_size)
    # The checks and the streams of a generation that samples, which is what takes a seed.
    config = GenerationConfig(cfg_scale=cfg_scale, seed=seed, temperature=1.0)
    device = device_of(family.parts(model).embedding)
    pairs = _read_pairs(prompts, answers, family, geometry, device)
    seeds = row_seeds(config, len(pairs))

    longest = max(len(pair.tokens) for pair in pairs)
    at_once = min(batch_size, samples * len(pairs)) * (2 if cfg_scale else 1)
    totals = torch.zeros(len(pairs), dtype=torch.float64, device=device)
    rows = _rows(pairs, seeds, samples, batch_size)
    with evaluating(model):
        forward = WholeRows(model, longest, at_once)
        while batch := list(itertools.islice(rows, batch_size)):
            _add_up(totals, batch, pairs, forward, cfg_scale)
    wrong = (~totals.isfinite()).nonzero()[:, 0].tolist()
    if wrong:
        raise ValueError(f"logits: NaN or infinite in pairs {wrong}")
    return (totals / samples).float()


def draw_masks(length: int, samples: int, batch_size: int, seed: tuple[int, int]) -> Tensor:
    """[samples, length] bool: the tokens of an answer that each draw hides, by a pair's (seed, stream)."""
    # Hashed, for torch's generator on the CPU takes up the low 32 bits of a seed alone.
    hashed = random.Random(f"{seed[0]} {seed[1]}").getrandbits(32)
    generator = torch.Generator().manual_seed(hashed)
    masks = torch.zeros(samples, length, dtype=torch.bool)
    for batch in masks.split(batch_size):
        start = int(torch.randint(length, (), generator=generator))
        for mask, count in zip(batch, mask_counts(length, len(batch), start), strict=True):
            mask[torch.randperm(length, generator=generator)[:count]] = True
    return masks


def mask_counts(length: int, rows: int, start: int) -> list[int]:
    """How many tokens each row of a batch hides: from start + 1 on around 1..length, in even strides.

    The strides are whole numbers, so that with a uniform start each row's count is uniform as well.
    """
    return [(start + i * length // rows) % length + 1 for i in range(rows)]


@dataclass(frozen=True)
class _Pair:
    """A prompt and its answer in one, on the CPU, where the rows are put together."""

    tokens: Tensor
    prompt_length: int

    @property
    def answer_length(self) -> int:
        return len(self.tokens) - self.prompt_length


def _rows(
    pairs: Sequence[_Pair], seeds: Sequence[tuple[int, int]], samples: int, batch_size: int
) -> Iterator[tuple[int, Tensor]]:
    """Every draw of every pair: (pair, the mask over its answer)."""
    for b, (pair, seed) in enumerate(zip(pairs, seeds, strict=True)):
        for mask in draw_masks(pair.answer_length, samples, batch_size, seed):
            yield b, mask


def _add_up(
    totals: Tensor,
    batch: Sequence[tuple[int, Tensor]],
    pairs: Sequence[_Pair],
    forward: WholeRows,
    cfg_scale: float,
) -> None:
    """Adds each row's estimate, L / l times the sum of the log p of what it hides, to its pair's total."""
    rows, twins, wanted = [], [], []
    targets, owners, weights = [], [], []
    mask_id = forward.geometry.mask_id
    for b, mask in batch:
        pair = pairs[b]
        hidden = mask.nonzero()[:, 0] + pair.prompt_length
        rows.append(pair.tokens.index_fill(0, hidden, mask_id))
        twins.append(rows[-1].clone())
        twins[-1][: pair.prompt_length] = mask_id  # a twin sees nothing of the prompt
        wanted.append(hidden)
        targets.append(pair.tokens[hidden])
        owners.append(torch.full((len(hidden),), b))
        weights.append(torch.full((len(hidden),), pair.answer_length / len(hidden), dtype=torch.float64))
    if cfg_scale:
        rows, wanted = rows + twins, wanted * 2
    states = forward.hidden(rows, wanted)

    columns = [torch.cat(x) for x in (targets, owners, weights)]
    for begin in range(0, len(columns[0]), HEAD_ROWS):
        target, owner, weight = (x[begin : begin + HEAD_ROWS] for x in columns)
        logits = forward.head(states[begin : begin + len(target)]).float()
        if cfg_scale:
            twin = begin + len(columns[0])
            free = forward.head(states[twin : twin + len(target)]).float()
            logits = free + (cfg_scale + 1) * (logits - free)
        loss = F.cross_entropy(logits, target.to(logits.device), reduction="none").to(totals)
        totals.index_add_(0, owner.to(totals.device), -loss * weight.to(totals.device))


def _read_pairs(
    prompts: Tensor | Sequence[Tensor],
    answers: Tensor | Sequence[Tensor],
    family: Family,
    geometry: Geometry,
    device: torch.device,
) -> list[_Pair]:
    """Prompts and answers, checked."""
    rows = {"prompts": prompts, "answers": answers}
    read = {name: read_prompts(value, None, geometry, device, name) for name, value in rows.items()}
    counts = [len(found) for found in read.values()]
    if counts[0] != counts[1]:
        raise ValueError(f"answers holds {counts[1]} rows for {counts[0]} prompts; takes one for each")
    for name, found in read.items():
        for b, row in enumerate(found):
            if bool((row == geometry.mask_id).any()):
                raise ValueError(f"{name}[{b}] holds the mask token {geometry.mask_id}; takes none")
            if len(row) == 0 and (name == "answers" or family.needs_prompt):
                raise ValueError(f"{name}[{b}] is empty; {family.model_type} takes 1 token or more")
    pairs = []
    for b, (prompt, answer) in enumerate(zip(*read.values(), strict=True)):
        pairs.append(_Pair(torch.cat((prompt, answer)).cpu(), len(prompt)))
        if len(pairs[-1].tokens) > geometry.max_positions:
            raise ValueError(
                f"answers[{b}] of {len(answer)} tokens: with the prompt of {len(prompt)} it exceeds the "
                f"model's {geometry.max_positions} positions"
            )
    return pairs
