from __future__ import annotations

import random

import pytest

from fastdllm_ext.eval.statistics import bootstrap, most_lost, pareto, wilson


def share_covering(make: object, truth: float, trials: int = 200) -> float:
    """How often an interval of a fresh sample holds the truth."""
    rng = random.Random(0)
    hits = 0
    for _ in range(trials):
        low, high = make(rng)  # type: ignore[operator]
        hits += low <= truth <= high
    return hits / trials


def test_bootstrap_intervals_hold_the_truth_as_often_as_they_say() -> None:
    def grades(rng: random.Random) -> tuple[float, float]:
        found = bootstrap([float(rng.random() < 0.8) for _ in range(150)])
        return found.low, found.high

    def ratios(rng: random.Random) -> tuple[float, float]:
        sizes = [rng.uniform(1, 3) for _ in range(150)]
        found = bootstrap([2 * size * rng.uniform(0.5, 1.5) for size in sizes], sizes)
        return found.low, found.high

    # 200 trials: a share of 95 % is off by 1.5 points (one standard error); four of them are allowed.
    assert share_covering(grades, 0.8) == pytest.approx(0.95, abs=0.06)
    assert share_covering(ratios, 2.0) == pytest.approx(0.95, abs=0.06)


def test_bootstrap_is_the_ratio_of_sums_and_the_same_each_time() -> None:
    top, below = [1.0, 5.0, 3.0], [1.0, 1.0, 4.0]
    found = bootstrap(top, below)
    assert found.value == 1.5
    assert found.low < 1.5 < found.high
    assert found == bootstrap(top, below)
    assert bootstrap([1.0, 0.0, 1.0, 1.0]).value == 0.75


def test_no_interval_of_grades_that_are_all_alike_is_certain() -> None:
    assert bootstrap([1.0] * 20).low < 0.9
    assert bootstrap([1.0] * 20).high == 1.0
    assert bootstrap([0.0] * 20).high > 0.1
    # Equal numbers that are no grades do not vary: a time that is always the same is known.
    assert bootstrap([3.0] * 5).to_list() == [3.0, 3.0, 3.0]


def test_wilson_against_known_values() -> None:
    # Wilson's interval by its formula, worked by hand for 8 of 10: centre 0.7167, half-width 0.2267.
    found = wilson(8, 10)
    assert found.to_list() == pytest.approx([0.8, 0.4902, 0.9433], abs=1e-4)
    assert wilson(0, 10).low == pytest.approx(0.0, abs=1e-12)
    assert wilson(10, 10).high == pytest.approx(1.0, abs=1e-12)


def test_the_bound_of_a_loss_errs_as_rarely_as_it_says() -> None:
    # 3 % of answers get worse, 1 % better: 2 points are lost, and a bound below that is an error.
    rng, trials, errors = random.Random(1), 400, 0
    for _ in range(trials):
        lots = [rng.random() for _ in range(300)]
        before = [float(lot >= 0.01) for lot in lots]
        after = [float(lot < 0.01 or lot >= 0.04) for lot in lots]
        errors += most_lost(before, after) < 0.02
    assert errors / trials < 0.05 + 4 * (0.05 * 0.95 / trials) ** 0.5


def test_no_loss_in_few_problems_proves_little() -> None:
    few, many = [1.0] * 50, [1.0] * 1000
    assert most_lost(few, few) == pytest.approx(1.6449 / 52, rel=1e-3)
    assert most_lost(many, many) == pytest.approx(1.6449 / 1002, rel=1e-3)
    assert most_lost(many, [0.0, *many[1:]]) > most_lost(many, many) > most_lost([0.0, *many[1:]], many)


def test_the_front_holds_what_nothing_beats() -> None:
    points = [(1.0, 5.0), (2.0, 5.0), (3.0, 4.0), (3.0, 4.0), (2.5, 3.0), (5.0, 1.0)]
    assert pareto(points) == [1, 2, 5]
    assert pareto([]) == []


def test_bad_input_is_named() -> None:
    for call in (
        lambda: bootstrap([]),
        lambda: bootstrap([1.0], [1.0, 2.0]),
        lambda: most_lost([1.0], []),
        lambda: most_lost([], []),
        lambda: wilson(3, 2),
        lambda: wilson(0, 0),
    ):
        with pytest.raises(ValueError, match="takes"):
            call()
