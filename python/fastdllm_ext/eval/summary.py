"""Results of a sweep as the tables of a report: plain values that JSON can hold.

Figures and pages are made of these alone, so that they can be made again without a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastdllm_ext.decoding import DEFAULT_THRESHOLD
from fastdllm_ext.eval.opening import Setting
from fastdllm_ext.eval.statistics import bootstrap, most_lost, pareto
from fastdllm_ext.eval.sweep import Result, baseline, label

Row = dict[str, Any]


def summarise(results: Sequence[Result], families: Sequence[str], beside: Setting) -> list[Row]:
    """A row for each setting: accuracy, speed, forwards, each [value, low, high], and what it loses.

    ``loss`` is the baseline's accuracy minus the setting's over the same problems, ``loss_at_most`` its upper
    bound with one-sided confidence 95 %; ``speedup`` is over the baseline's tokens/s. ``on_front``: of the
    settings with the generation length of ``beside`` none is both faster and more accurate.

    Args:
        results: of a sweep, the first of the baseline.
        families: the family of each problem.
        beside: lengths that labels need not name.
    """
    rows = [_row(result, results[0], families, beside) for result in results]
    alike = [row for row in rows if row["setting"]["gen_length"] == beside["gen_length"]]
    for i in pareto([(row["tokens_per_second"][0], row["accuracy"][0]) for row in alike]):
        alike[i]["on_front"] = True
    return rows


def _row(result: Result, reference: Result, families: Sequence[str], beside: Setting) -> Row:
    before, count = reference.grades[: len(result.grades)], len(result.grades)
    same = sum(a == b for a, b in zip(reference.answers, result.answers, strict=False))
    grades: dict[str, list[float]] = {}
    for family, grade in zip(families, result.grades, strict=False):
        grades.setdefault(family, []).append(grade)
    return {
        "setting": result.setting,
        "label": label(result.setting, beside),
        "problems": count,
        "accuracy": result.accuracy().to_list(),
        "loss": bootstrap([b - a for b, a in zip(before, result.grades, strict=True)]).to_list(),
        "loss_at_most": most_lost(before, result.grades),
        "same_answer": same / count,
        "tokens_per_second": result.tokens_per_second().to_list(),
        "speedup": result.tokens_per_second().value / reference.tokens_per_second().value,
        "tokens_per_forward": result.tokens_per_forward().to_list(),
        "nfe": result.mean_nfe().to_list(),
        "by_family": {family: sum(found) / len(found) for family, found in sorted(grades.items())},
        "on_front": False,
        "tokens": sum(result.tokens),
        "seconds": result.seconds,
    }


def select(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    """Rows whose settings have these values and, of what is not named, only what every sweep sets.

    A value of ``...`` stands for any.
    """
    always = {"gen_length", "block_length", "cache"}
    return [
        row
        for row in rows
        if row["setting"].keys() <= wanted.keys() | always
        and all(
            key in row["setting"] and value in (..., row["setting"][key]) for key, value in wanted.items()
        )
    ]


def compared(gen_length: int, block_length: int) -> list[Setting]:
    """The columns of the paper's tables 3 and 4: the baseline, the cache, parallel decoding, and both."""
    one = baseline(gen_length, block_length)
    parallel: Setting = {
        "gen_length": gen_length,
        "block_length": block_length,
        "threshold": DEFAULT_THRESHOLD,
    }
    return [
        one,
        one | {"cache": "dual"},
        parallel | {"cache": "none"},
        parallel | {"cache": "prefix"},
        parallel | {"cache": "dual"},
    ]


def by_prompt_length(results: Sequence[Result], lengths: Sequence[int], parts: int = 3) -> list[Row]:
    """The paper's table 3 on the problems at hand: results on short, middling and long prompts.

    Args:
        results: those compared, one problem a batch; of larger batches none can be told.
        lengths: tokens of each problem's prompt.
        parts: groups of about as many problems, by length.
    """
    if not results or any(len(result.sizes) != len(result.grades) for result in results):
        return []
    order = sorted(range(len(results[0].grades)), key=lambda i: lengths[i])
    rows = []
    for part in range(parts):
        group = order[part * len(order) // parts : (part + 1) * len(order) // parts]
        if group:
            within = f"{lengths[group[0]]} to {lengths[group[-1]]} tokens"
            rows.append(comparison(within, [result.only(group) for result in results]))
    return rows


def comparison(name: str, results: Sequence[Result]) -> Row:
    """A row of tables 3 and 4: what each setting does, and its speed over that of the first."""
    first = results[0].tokens_per_second().value
    return {
        "name": name,
        "problems": len(results[0].grades),
        "cells": [
            {
                "label": label(result.setting, result.setting),
                "accuracy": result.accuracy().to_list(),
                "tokens_per_second": result.tokens_per_second().to_list(),
                "speedup": result.tokens_per_second().value / first,
            }
            for result in results
        ],
    }
