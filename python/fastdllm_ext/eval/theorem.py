"""Theorem 1 of Fast-dLLM (arXiv 2505.22618) at work: do parallel commits agree with greedy ones, one by one?

The theorem: let p be a joint distribution of n tokens, each of which has a value whose marginal probability
is above 1 - ε. If (n + 1) ε <= 1, these values together are also the likeliest under p, so that filling all
n at once and filling them one after the other, greedily and in whatever order, give the same.

Its assumption is one joint distribution behind the marginals and all conditionals. A trained network is not
bound by it: what it says of a position once others are filled is the output of another forward, which need
not be the conditional of any joint that has the first forward's marginals. A disagreement within the bound
is therefore no error in the theorem or in the decoder, and none within it is something that the model has
learnt. Here both are counted.

With a cache the parallel side is what the cached step committed, ε from its own confidences, while the
tokens one by one are the uncached model's: disagreements then include the cache's drift.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastdllm_ext.eval.statistics import wilson
from fastdllm_ext.eval.steps import TakenStep, heading, settings_of, taken_steps
from fastdllm_ext.eval.uncached import score_rows

__all__ = ["measure", "one_by_one"]

SIZES = ((2, 2), (3, 4), (5, 8), (9, 16), (17, 32), (33, 64), (65, 1 << 30))  # tokens of a step, both ends in


def measure(
    model: nn.Module,
    prompts: Sequence[Tensor],
    *,
    caches: Sequence[str] = ("none",),
    name: str = "",
    max_steps: int = 96,
    batch_size: int = 16,
    seed: int = 0,
    progress: Callable[..., Any] = iter,
    **settings: Any,
) -> dict[str, Any]:
    """How often parallel steps (two tokens or more) satisfy the bound, and agree with one by one.

    ε = 1 - the least confidence of the tokens committed; a step is *inside* where (n + 1) ε <= 1.

    Args:
        model: a patched model.
        prompts: 1-D int64 each, on the model's device.
        caches: decoded with each of these.
        name: of the model, for the result.
        max_steps: parallel steps that are checked, of those inside and of those outside so many each, drawn
            evenly. A check of n tokens takes n forwards of a whole row.
        batch_size: rows of a decode, and of a forward of the checks.
        seed: of the draw.
        progress: wraps an iterable, as tqdm does.
        **settings: fields of :class:`fastdllm_ext.GenerationConfig`, without ``cache``; greedy ones.

    Returns:
        ``model``, ``conditions``, and ``caches``: for each ``steps`` (all) and ``parallel_steps``;
        ``inside``, the share of the latter, as [share, low, high] (Wilson, 95 %); ``by_size``: the same for
        steps of ``from`` to ``to`` tokens; ``groups``: for ``inside`` and ``outside`` what was ``checked``,
        how many of these ``agree`` in every token, the ``share`` of them (None of no steps), ``tokens`` and
        ``tokens_agree``; and ``checked``: of each step that was checked ``prompt``, ``step``, ``tokens``,
        ``epsilon``, ``inside`` and ``agree``, how many of its tokens agree.

    Raises:
        ValueError: settings that sample, guide or truncate, or whose confidence is no probability; no prompt.
    """
    base = settings_of(prompts, max_steps, settings)
    if base.ranks_by != "low_confidence":
        raise ValueError(
            f"remasking={base.ranks_by!r}: the theorem bounds probabilities; takes 'low_confidence'"
        )
    found = {}
    for cache in caches:
        steps = taken_steps(model, prompts, replace(base, cache=cache), batch_size, progress)
        parallel = [step for step in steps if len(step.committed) > 1]
        chosen: list[TakenStep] = []
        for inside in (True, False):
            kind = [step for step in parallel if is_inside(step) == inside]
            rng = random.Random(f"{seed} {cache} {inside}")
            chosen += [kind[i] for i in sorted(rng.sample(range(len(kind)), min(max_steps, len(kind))))]
        alone = one_by_one(model, chosen, batch_size, mask_id=base.mask_token_id, progress=progress)
        checked = [
            {
                "prompt": step.prompt,
                "step": step.number,
                "tokens": len(step.committed),
                "epsilon": epsilon(step),
                "inside": is_inside(step),
                "agree": int((tokens == step.tokens).sum()),
            }
            for step, tokens in zip(chosen, alone, strict=True)
        ]
        found[cache] = {
            "steps": len(steps),
            "parallel_steps": len(parallel),
            "inside": _share(sum(map(is_inside, parallel)), len(parallel)),
            "by_size": _by_size(parallel),
            "groups": {
                kind: _group([x for x in checked if x["inside"] == (kind == "inside")])
                for kind in ("inside", "outside")
            },
            "checked": checked,
        }
    limits = {"max_steps": max_steps, "batch_size": batch_size, "seed": seed}
    return heading("theorem", model, name, prompts, base, limits) | {"caches": found}


def epsilon(step: TakenStep) -> float:
    """1 - the least confidence of the tokens that a step committed."""
    return 1 - float(step.confidence.min())


def is_inside(step: TakenStep) -> bool:
    """Whether a step satisfies (n + 1) ε <= 1."""
    return (len(step.committed) + 1) * epsilon(step) <= 1


def one_by_one(
    model: nn.Module,
    steps: Sequence[TakenStep],
    batch_size: int,
    *,
    mask_id: int | None = None,
    progress: Callable[..., Any] = iter,
) -> list[Tensor]:
    """What the uncached model fills each step's positions with, one position a forward.

    From the row that the step found, each forward fills the most confident of the positions that are left.

    Returns:
        tokens of each step's positions, in their order.
    """
    rows, left = [step.row for step in steps], [step.committed for step in steps]
    for _ in progress(range(max((len(where) for where in left), default=0))):
        live = [i for i, where in enumerate(left) if len(where)]
        scores = score_rows(
            model, [rows[i] for i in live], [left[i] for i in live], batch_size, mask_id=mask_id
        )
        for i, (tokens, confidence) in zip(live, scores, strict=True):
            best = int(confidence.argmax())
            rows[i][left[i][best]] = tokens[best]
            left[i] = torch.cat((left[i][:best], left[i][best + 1 :]))
    return [row[step.committed] for row, step in zip(rows, steps, strict=True)]


def _share(count: int, total: int) -> list[float] | None:
    return wilson(count, total).to_list() if total else None


def _by_size(parallel: Sequence[TakenStep]) -> list[dict[str, Any]]:
    found = []
    for first, last in SIZES:
        some = [step for step in parallel if first <= len(step.committed) <= last]
        if some:
            inside = sum(map(is_inside, some))
            found.append(
                {
                    "from": first,
                    "to": min(last, max(len(step.committed) for step in some)),
                    "steps": len(some),
                    "inside": _share(inside, len(some)),
                }
            )
    return found


def _group(checked: Sequence[dict[str, Any]]) -> dict[str, Any]:
    agree = sum(x["agree"] == x["tokens"] for x in checked)
    return {
        "checked": len(checked),
        "agree": agree,
        "share": _share(agree, len(checked)),
        "tokens": sum(x["tokens"] for x in checked),
        "tokens_agree": sum(x["agree"] for x in checked),
    }
