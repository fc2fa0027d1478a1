"""What a cache changes: sampled block steps beside the uncached model on the same rows.

A block step attends to keys and values that were computed when the row held other tokens. At each sampled
step the uncached model (:mod:`fastdllm_ext.eval.uncached`) reads the row that the step found, whole: what
would it have committed in the same places, how sure is it, and would it have chosen these places at all, by
the same rule among the same masks?

Each step is judged on its own row: what drift made of the row before counts as given. A refresh has no drift
but for rounding, and some are measured to show how much that is. What ``suffix`` leaves out counts as drift.
With keys and values in 8 bits or quantised weights both sides have them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastdllm_ext.decoding import GenerationConfig
from fastdllm_ext.eval.statistics import wilson
from fastdllm_ext.eval.steps import TakenStep, heading, settings_of, taken_steps
from fastdllm_ext.eval.uncached import Scores, score_rows
from fastdllm_ext.ops import Row, Rule
from fastdllm_ext.reference import selected
from fastdllm_ext.rules.base import TorchRule

__all__ = ["measure"]

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def measure(
    model: nn.Module,
    prompts: Sequence[Tensor],
    *,
    caches: Sequence[str] = ("dual", "prefix"),
    name: str = "",
    max_steps: int = 256,
    batch_size: int = 16,
    seed: int = 0,
    progress: Callable[..., Any] = iter,
    **settings: Any,
) -> dict[str, Any]:
    """How block steps differ from the uncached model, by steps since the refresh and by block.

    Args:
        model: a patched model.
        prompts: 1-D int64 each, on the model's device.
        caches: decoded with each of these.
        name: of the model, for the result.
        max_steps: block steps judged for each cache, drawn evenly from all; and an eighth as many refreshes.
        batch_size: rows of a decode, and of a forward of the uncached model.
        seed: of the draw.
        progress: wraps an iterable, as tqdm does.
        **settings: fields of :class:`fastdllm_ext.GenerationConfig`, without ``cache``; greedy ones.

    Returns:
        ``model``, ``conditions``, and ``caches``: for each its ``steps`` (``refresh`` and ``block_step``: all
        that there were), and groups of judged tokens: ``refreshes`` (a group, or None), ``all``,
        ``by_since_refresh`` and ``by_block`` (lists; each group has ``from`` and ``to``, inclusive).
        A group holds ``steps``; ``tokens``; shares as [share, low, high] (Wilson, 95 %, as if tokens were
        independent): ``other_token`` (the uncached model has another candidate there), ``not_selected`` (its
        rule would have left the position); ``confidence_difference``: cached minus uncached, each of its own
        candidate, with ``mean``, ``mean_absolute`` and ``quantiles``; ``selected_uncached``: positions that
        the uncached model would have filled in these steps.

    Raises:
        ValueError: settings that sample, guide or truncate; a rule that is not `unmask`'s alone; no prompt.
    """
    base = settings_of(prompts, max_steps, settings)
    if isinstance(base.selection, TorchRule):
        raise ValueError(f"rule={base.rule}: chooses by more than ranks; drift takes one that does not")
    found = {}
    for cache in caches:
        config = replace(base, cache=cache)
        steps = taken_steps(model, prompts, config, batch_size, progress)
        kinds = [[s for s in steps if s.since_refresh == 0], [s for s in steps if s.since_refresh > 0]]
        rng = random.Random(f"{seed} {cache}")
        chosen = [_draw(rng, kinds[0], max(1, max_steps // 8)), _draw(rng, kinds[1], max_steps)]
        judged = _judge(model, chosen[0] + chosen[1], config, batch_size, progress)
        block_steps = judged[len(chosen[0]) :]
        found[cache] = {
            "steps": {"refresh": len(kinds[0]), "block_step": len(kinds[1])},
            "refreshes": _group(judged[: len(chosen[0])], 0, 0),
            "all": _group(block_steps, 1, max((j.step.since_refresh for j in block_steps), default=1)),
            "by_since_refresh": _groups(block_steps, lambda s: s.since_refresh, _bin),
            "by_block": _groups(block_steps, lambda s: s.block, lambda i: (i, i)),
        }
    limits = {"max_steps": max_steps, "batch_size": batch_size, "seed": seed}
    return heading("drift", model, name, prompts, base, limits) | {"caches": found}


def _draw(rng: random.Random, steps: list[TakenStep], most: int) -> list[TakenStep]:
    """Some of the steps, in their order."""
    return [steps[i] for i in sorted(rng.sample(range(len(steps)), min(most, len(steps))))]


@dataclass(frozen=True)
class _Judged:
    """A step beside the uncached model.

    Attributes:
        step: the step.
        other, unselected: of each committed position, bool: the uncached model has another candidate, and
            would not fill it.
        difference: of each, confidence: the step's minus the uncached model's.
        selected: how many positions the uncached model would fill.
    """

    step: TakenStep
    other: list[bool]
    unselected: list[bool]
    difference: list[float]
    selected: int


def _judge(
    model: nn.Module,
    steps: Sequence[TakenStep],
    config: GenerationConfig,
    batch_size: int,
    progress: Callable[..., Any],
) -> list[_Judged]:
    """All steps, at the masks that each could fill."""
    scores = score_rows(
        model,
        [step.row for step in steps],
        [step.masks for step in steps],
        batch_size,
        mask_id=config.mask_token_id,
        remasking=config.ranks_by,
        progress=progress,
    )
    return [_beside(step, score) for step, score in zip(steps, scores, strict=True)]


def _beside(step: TakenStep, uncached: Scores) -> _Judged:
    where = torch.searchsorted(step.masks, step.committed)
    confidence = uncached.confidence.tolist()
    state = [0] * len(Row)
    state[Row.RULE] = step.history.rule
    quota = [len(where)] if step.history.rule == Rule.QUOTA else [1]  # how many is not the model's choice
    chosen = set(selected(confidence, confidence, state, step.history.value, quota))
    return _Judged(
        step,
        (uncached.tokens[where] != step.tokens).tolist(),
        [i not in chosen for i in where.tolist()],
        (step.confidence.double() - uncached.confidence[where].double()).tolist(),
        len(chosen),
    )


def _bin(since_refresh: int) -> tuple[int, int]:
    """1, 2, 3 to 4, 5 to 8, ..."""
    last = 1 << (since_refresh - 1).bit_length()
    return last // 2 + 1, last


def _groups(
    judged: Iterable[_Judged], key: Callable[[TakenStep], int], bounds: Callable[[int], tuple[int, int]]
) -> list[dict[str, Any] | None]:
    parts: dict[tuple[int, int], list[_Judged]] = {}
    for one in judged:
        parts.setdefault(bounds(key(one.step)), []).append(one)
    return [_group(parts[edges], *edges) for edges in sorted(parts)]


def _group(judged: Sequence[_Judged], first: int, last: int) -> dict[str, Any] | None:
    """What the tokens of some steps have in common; None of no steps."""
    if not judged:
        return None
    other, unselected, difference = (
        [x for one in judged for x in getattr(one, name)] for name in ("other", "unselected", "difference")
    )
    values = torch.tensor(difference, dtype=torch.float64)
    quantiles = torch.quantile(values, torch.tensor(QUANTILES, dtype=torch.float64)).tolist()
    return {
        "from": first,
        "to": last,
        "steps": len(judged),
        "tokens": len(difference),
        "other_token": wilson(sum(other), len(other)).to_list(),
        "not_selected": wilson(sum(unselected), len(unselected)).to_list(),
        "selected_uncached": sum(one.selected for one in judged),
        "confidence_difference": {
            "mean": float(values.mean()),
            "mean_absolute": float(values.abs().mean()),
            "quantiles": {str(q): x for q, x in zip(QUANTILES, quantiles, strict=True)},
        },
    }
