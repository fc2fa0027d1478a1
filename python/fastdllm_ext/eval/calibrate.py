"""`fastdllm-ext calibrate`: the fastest setting whose loss of accuracy stays under a bound, with confidence.

    fastdllm-ext calibrate MODEL --task gsm8k --max-loss 0.5 --out DIR

On a quarter of the problems a race finds each rule its cache, block length and refresh policy: all answer a
few problems, the worse half goes, the rest answer twice as many. The other problems, by which nothing was
chosen, decide: rule by rule, the most accurate first, each is held against the baseline (one token a step, no
cache), up to the first that may lose too much. An order that was fixed before keeps the confidence, however
many are tested (fixed-sequence testing, as Learn then Test, arXiv 2110.01052, has it).
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from typing import Any

from fastdllm_ext.decoding import GenerationConfig
from fastdllm_ext.eval.opening import Setting, add_run_arguments, open_run
from fastdllm_ext.eval.report import bar
from fastdllm_ext.eval.statistics import LEVEL, most_lost
from fastdllm_ext.eval.summary import summarise
from fastdllm_ext.eval.sweep import Result, Sweep, baseline, further_rules, label

CACHES = ("prefix", "dual")
RULES: tuple[Setting, ...] = (
    *({"threshold": t} for t in (0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999)),
    *({"factor": f} for f in (0.1, 0.25, 0.5, 1.0, 2.0)),
    *({"rule": rule} for rule in further_rules(quick=True)),
)
BLOCKS = (8, 16, 32, 64)
POLICIES: tuple[Setting, ...] = ({}, {"refresh": 2}, {"window": [8, 8]})
FIRST_ROUND = 8  # problems


def candidates(gen_length: int) -> list[list[Setting]]:
    """For each rule every cache, block length and refresh policy."""
    blocks = dict.fromkeys(min(block, gen_length) for block in BLOCKS)
    return [
        [
            {"gen_length": gen_length, "block_length": block, "cache": cache} | rule | policy
            for cache, block, policy in product(CACHES, blocks, POLICIES)
        ]
        for rule in RULES
    ]


def race(sweep: Sweep, heats: Sequence[Sequence[Setting]], problems: int) -> list[Setting]:
    """The best setting of each heat, on the first ``problems`` at most.

    Of a heat the more accurate settings are better, of equals the faster. Of the heats' winners the most
    accurate comes first, of equals the slowest.
    """
    left, count = [list(heat) for heat in heats], min(FIRST_ROUND, problems)
    while True:
        runners = [setting for heat in left for setting in heat]
        results = iter(sweep.run(runners, bar(f"{len(runners)} settings, {count} problems"), count))
        sorted_heats = [sorted((next(results) for _ in heat), key=_rank) for heat in left]
        if all(len(heat) == 1 for heat in left) or count == problems:
            winners = sorted((heat[0] for heat in sorted_heats), key=lambda r: (_rank(r)[0], -_rank(r)[1]))
            return [winner.setting for winner in winners]
        left = [[r.setting for r in heat[: -(-len(heat) // 2)]] for heat in sorted_heats]
        count = min(2 * count, problems)


def _rank(result: Result) -> tuple[float, float]:
    return -result.accuracy().value, -result.tokens_per_second().value


def choose(before: Result, finalists: Sequence[Result], max_loss: float) -> Result | None:
    """The fastest of the finalists before the first, in their order, that may lose more than ``max_loss``.

    None where that is the very first. All results are on problems that played no part in the race.
    """
    held: list[Result] = []
    for result in finalists:
        if most_lost(before.grades, result.grades) > max_loss:
            break
        held.append(result)
    return max(held, key=lambda r: r.tokens_per_second().value, default=None)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_run_arguments(parser, limit=1000)
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--max-loss", type=float, default=0.5,
        help="points of accuracy that may be lost against one token a step without a cache (0.5)",
    )  # fmt: skip
    group.add_argument(
        "--out", type=Path, default=Path("calibrated"),
        help="folder that gets generation_config.json; of the model itself, so that fastdllm_ext.load "
        "takes it up (calibrated)",
    )  # fmt: skip
    group.add_argument(
        "--records",
        type=Path,
        help="folder of the measurements, to go on after an interruption (OUT/calibration)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Calibrates; the exit status: 1 where no setting keeps the bound."""
    if not 0 < arguments.max_loss <= 100:
        raise ValueError(f"max_loss={arguments.max_loss}; takes points of accuracy, above 0 and at most 100")
    opened = open_run(arguments)
    total = len(opened.task.problems)
    searched = total // 4 // opened.batch_size * opened.batch_size
    if searched < 1:
        raise ValueError(f"limit={total} with batch_size={opened.batch_size}; takes four batches or more")
    one = baseline(opened.gen_length, opened.block_length)
    opened.check_fits(one)
    heats = candidates(opened.gen_length)
    records = arguments.records or arguments.out / "calibration"
    sweep = Sweep(opened, records)
    finalists = race(sweep, heats, searched)
    results = sweep.run([one, *finalists], bar("the finalists on what none was chosen by"))
    unseen = [result.after(searched) for result in results]
    chosen = choose(unseen[0], unseen[1:], arguments.max_loss / 100)
    families = [problem.family for problem in opened.task.problems[searched:]]
    rows = summarise(unseen, families, {"gen_length": opened.gen_length})
    facts: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": "fastdllm-ext " + " ".join(map(shlex.quote, sys.argv[1:])),
        "conditions": opened.conditions,
        "max_loss": arguments.max_loss,
        "candidates": sum(map(len, heats)),
        "raced_on": searched,
        "decided_on": total - searched,
        "finalists": rows,
        "chosen": None if chosen is None else chosen.setting,
    }
    (records / "calibration.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(_told(rows, facts["candidates"], searched, total - searched))
    if chosen is None:
        print(
            f"No setting is shown to lose at most {arguments.max_loss:g} points with {100 * LEVEL:.0f} % "
            f"confidence on {total - searched} problems: more problems (--limit) or a larger --max-loss "
            "may help."
        )
        return 1
    GenerationConfig.from_dict(chosen.setting).save_pretrained(arguments.out)
    where = str(arguments.out)
    model = "fd.demo_model_path()" if arguments.model == "demo" else repr(arguments.model)
    taken = "" if where == arguments.model else f", generation_config={where!r}"
    use = f"fd.load({model}{taken})"
    print(
        f"Chosen: {label(chosen.setting)}. Wrote {arguments.out / 'generation_config.json'}; {use} takes it "
        "up."
    )
    return 0


def _told(rows: Sequence[dict[str, Any]], candidates: int, raced: int, decided: int) -> str:
    lines = [
        f"{candidates} settings raced on {raced} problems; on {decided} others, from the most accurate down:",
        f"{'accuracy':>9} {'loss':>6} {'at most':>8} {'tokens/s':>9}",
    ]
    lines += [
        f"{100 * row['accuracy'][0]:8.1f}% {100 * row['loss'][0]:6.2f} {100 * row['loss_at_most']:8.2f} "
        f"{row['tokens_per_second'][0]:9,.0f}  {row['label']}"
        for row in rows
    ]
    return "\n".join(lines)
