"""How sure a figure is: intervals over prompts, what a setting loses, which settings no other beats.

Every interval is over the prompts, of which those measured are taken to be a sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import torch
from torch import Tensor

LEVEL = 0.95
RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A figure and its interval at :data:`LEVEL`."""

    value: float
    low: float
    high: float

    def to_list(self) -> list[float]:
        """[value, low, high], for JSON."""
        return [self.value, self.low, self.high]


@lru_cache(maxsize=8)
def _draws(count: int) -> Tensor:
    """[RESAMPLES, count] float32: how often each of ``count`` samples is drawn, with replacement.

    Drawn once for each count, so that settings measured on the same samples are resampled together.
    """
    generator = torch.Generator().manual_seed(count)
    chosen = torch.randint(count, (RESAMPLES, count), generator=generator)
    times = torch.zeros(RESAMPLES, count)
    return times.scatter_add_(1, chosen, torch.ones(RESAMPLES, count))


def bootstrap(numerators: Sequence[float], denominators: Sequence[float] | None = None) -> Estimate:
    """The ratio of two sums (or the mean) over samples, with its percentile bootstrap interval.

    Of grades that are all 0, or all 1, every resample is the same, and would claim to be certain: of these
    the interval is :func:`wilson`'s.

    Args:
        numerators: [n], one for each sample.
        denominators: [n] above 0; None is ones, and gives the mean.

    Raises:
        ValueError: no samples, or not as many of one as of the other.
    """
    top = torch.tensor(numerators, dtype=torch.float64)
    below = torch.ones_like(top) if denominators is None else torch.tensor(denominators, dtype=torch.float64)
    if len(top) == 0 or len(top) != len(below):
        raise ValueError(f"{len(top)} numerators, {len(below)} denominators; takes as many, one or more")
    value = float(top.sum() / below.sum())
    if denominators is None and value in (0.0, 1.0) and bool((top == value).all()):
        return wilson(int(top.sum()), len(top))
    times = _draws(len(top)).double()
    ratios = (times @ top) / (times @ below)
    edges = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = torch.quantile(ratios, edges).tolist()
    return Estimate(value, low, high)


def wilson(successes: int, count: int) -> Estimate:
    """A share with its score interval (Wilson, 1927), which no 0 or 1 makes certain.

    Raises:
        ValueError: no trials, or more successes than trials.
    """
    if not 0 <= successes <= count or count == 0:
        raise ValueError(f"successes={successes} of count={count}; takes 0 to count, of 1 or more")
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    share = successes / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return Estimate(share, max(0.0, middle - half), min(1.0, middle + half))


def most_lost(before: Sequence[float], after: Sequence[float], level: float = LEVEL) -> float:
    """What is lost at most, with confidence ``level``: an upper bound of the mean of before - after.

    The same prompts, before and after. Half a prompt is added to those that got worse and to those that got
    better (Agresti and Min, Statistics in Medicine 2005): so no loss seen in n prompts is no proof of none.

    Args:
        before, after: [n] grades from 0 to 1.
        level: one-sided.

    Raises:
        ValueError: no grades, or not as many of one as of the other.
    """
    if len(before) != len(after) or not before:
        raise ValueError(f"{len(before)} grades before, {len(after)} after; takes as many, one or more")
    losses = [b - a for b, a in zip(before, after, strict=True)]
    count = len(losses) + 2
    mean = sum(losses) / count
    spread = (sum(loss * loss for loss in losses) + 1) / count - mean * mean
    return mean + NormalDist().inv_cdf(level) * math.sqrt(spread / count)


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats in one number without losing in the other, by the first.

    Points are (gain, gain): more of either is better. Of equal points the first counts.
    """
    order = sorted(range(len(points)), key=lambda i: (-points[i][0], -points[i][1], i))
    found: list[int] = []
    best = -math.inf
    for i in order:
        if points[i][1] > best:
            found.append(i)
            best = points[i][1]
    return found[::-1]
