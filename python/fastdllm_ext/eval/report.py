"""`fastdllm-ext report`: what a model loses and gains, as one HTML page, figures and JSON.

    fastdllm-ext report MODEL --task gsm8k --out DIR

Every part is written down as it is done, so that an interrupted report goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fastdllm_ext.decoding import GenerationConfig
from fastdllm_ext.eval import drift, similarity, theorem
from fastdllm_ext.eval.opening import Run, Setting, add_run_arguments, open_run
from fastdllm_ext.eval.page import render
from fastdllm_ext.eval.sections import build_sections
from fastdllm_ext.eval.summary import by_prompt_length, compared, comparison, summarise
from fastdllm_ext.eval.sweep import AXES, Sweep, baseline, grid, identity, key_settings, open_folder

Facts = dict[str, Any]
Progress = Callable[..., Any]

# Beside the trade-off: a part's name on the command line, what measures it, on how many prompts at most,
# and by which rule. Drift takes one token a step, where a cache is used the longest; the theorem a threshold
# so low that steps lie on both sides of its bound.
ANALYSES: dict[str, tuple[Callable[..., Facts], int, Callable[[int], dict[str, Any]]]] = {
    "kv_similarity": (similarity.measure, 8, lambda n: {"steps": n}),
    "drift": (drift.measure, 64, lambda n: {"steps": n}),
    "theorem": (theorem.measure, 200, lambda n: {"threshold": 0.5}),
}
TRADEOFF_FIGURES = ("tradeoff", "thresholds", "blocks", "rules")
QUICK_PROBLEMS = 24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_run_arguments(parser, limit=200)
    report = parser.add_argument_group("report")
    report.add_argument(
        "--out", type=Path, default=Path("report-out"), help="folder of the report (report-out)"
    )
    report.add_argument(
        "--quick", action="store_true", help=f"fewer settings, and {QUICK_PROBLEMS} problems at most"
    )
    report.add_argument(
        "--more", type=int, metavar="N",
        help="problems for the settings that conclusions rest on: the baseline; and, with the dual cache, "
        "threshold 0.9 and 0.99, factor 1, 8, 16 and 32 tokens a step (as many as for all)",
    )  # fmt: skip
    report.add_argument(
        "--config", type=Path, nargs="+", default=[], metavar="FOLDER",
        help="folders with a generation_config.json, such as calibrate writes: settings beside the grid's, "
        "on as many problems as --more says",
    )  # fmt: skip
    report.add_argument("--tradeoff", action="store_true", help="this part alone: accuracy against speed")
    report.add_argument(
        "--kv-similarity", action="store_true", help="this part alone: keys and values from step to step"
    )
    report.add_argument("--drift", action="store_true", help="this part alone: what a cache changes")
    report.add_argument("--theorem", action="store_true", help="this part alone: Theorem 1 at work")
    report.add_argument(
        "--axes", nargs="+", choices=AXES, default=list(AXES), metavar="AXIS",
        help=f"settings of the trade-off, of {', '.join(AXES)} (all)",
    )  # fmt: skip
    report.add_argument(
        "--shots", type=int, nargs="+", default=[None], metavar="N",
        help="worked examples before a prompt, of an lm-eval task (its own number); any after the first are "
        "compared with it",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Makes the report; the exit status."""
    try:
        from fastdllm_ext.eval import analysis_figures, figures
    except ImportError as error:
        raise ImportError("report draws with matplotlib: pip install 'fastdllm_ext[eval]'") from error
    if arguments.quick:
        arguments.limit = min(arguments.limit, QUICK_PROBLEMS)
    every = ["tradeoff", *ANALYSES]
    wanted = [part for part in every if getattr(arguments, part)] or every
    if arguments.more is not None and arguments.more <= arguments.limit:
        raise ValueError(f"more={arguments.more}; takes more than limit={arguments.limit}")
    opened = open_run(arguments, arguments.shots[0], arguments.more)
    opened.check_fits(baseline(opened.gen_length, opened.block_length))
    out: Path = arguments.out
    open_folder(out, opened.conditions)
    facts: Facts = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": "fastdllm-ext " + " ".join(map(shlex.quote, sys.argv[1:])),
        "conditions": opened.conditions,
    }
    own = [saved_setting(folder, opened.gen_length) for folder in arguments.config]
    for part in wanted:
        if part == "tradeoff":
            facts |= measure_tradeoff(opened, arguments, own, out)
            for name in TRADEOFF_FIGURES:
                getattr(figures, f"plot_{name}")(facts, out / f"{name}.png")
        else:
            facts[part] = _kept(out / f"{part}.json", partial(_analyse, part, opened))
            for name, plot in analysis_figures.FIGURES[part].items():
                plot(facts[part], out / f"{name}.png")
    facts["sections"] = build_sections(facts)
    (out / "report.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    (out / "report.html").write_text(render(facts, out), encoding="utf-8")
    print(f"Wrote {out / 'report.html'}, {out / 'report.json'} and the figures beside them")
    return 0


def saved_setting(folder: Path, gen_length: int) -> Setting:
    """The setting that a folder's generation_config.json holds.

    Raises:
        OSError: there is none.
        ValueError: one of another generation length than the baseline's.
    """
    config = GenerationConfig.from_pretrained(folder)
    if config.gen_length != gen_length:
        raise ValueError(f"config={folder}: has gen_length={config.gen_length}; takes {gen_length} beside it")
    lengths = {"gen_length": gen_length, "block_length": config.block_length, "cache": config.cache}
    rule = {} if config.rule is None else {"rule": str(config.selection)}
    return lengths | config.to_dict() | rule


def measure_tradeoff(opened: Run, arguments: argparse.Namespace, own: list[Setting], out: Path) -> Facts:
    """Every setting on every problem, the user's ``own`` too, and the paper's tables 3 and 4 of them."""
    sweep = Sweep(opened, out)
    settings = grid(opened.gen_length, opened.block_length, arguments.axes, arguments.quick)
    settings = [setting for setting in settings if opened.fits(setting)]
    settings = list({identity(setting): setting for setting in [*settings, *own]}.values())
    results = sweep.run(settings, bar("settings"), arguments.limit)
    found = {identity(result.setting): result for result in results}
    key = [s for s in key_settings(opened.gen_length, opened.block_length) if identity(s) in found]
    further = sweep.run([*key, *own], bar("key settings")) if arguments.more else []
    families = [problem.family for problem in opened.task.problems]
    beside = {"gen_length": opened.gen_length, "block_length": opened.block_length}

    def table(n: int) -> list[Any]:
        return [found[identity(s)] for s in compared(n, opened.block_length) if identity(s) in found]

    lengths = [(n, table(n)) for n in sorted({s["gen_length"] for s in settings})]
    main = table(opened.gen_length)
    shots = [(arguments.shots[0], main)] if len(arguments.shots) > 1 else []
    for count in arguments.shots[1:]:
        other = opened.with_shots(count)
        longer = Sweep(other, out / f"shots-{count}")
        chosen = [s for s in compared(opened.gen_length, opened.block_length) if other.fits(s)]
        shots.append((count, longer.run(chosen, bar(f"{count} shots"))))
    return {
        "settings": summarise(results, families, beside),
        "key_settings": summarise(further, families, beside),
        "own": own,
        "gen_lengths": [
            comparison(f"{n} tokens", rows) for n, rows in lengths if len(rows) == len(compared(n, 1))
        ],
        "prompt_lengths": by_prompt_length(main, sweep.lengths),
        "shots": [comparison(f"{count} shots", rows) for count, rows in shots if rows],
    }


def bar(name: str) -> Progress:
    """A progress bar over an iterable; off a terminal a line now and then."""
    return partial(tqdm, desc=name, mininterval=0.2 if sys.stderr.isatty() else 30)


def _kept(path: Path, measure: Callable[[], Facts]) -> Facts:
    """What a file holds of an earlier run; else measured and written."""
    if not path.exists():
        found = measure()
        path.write_text(json.dumps(found) + "\n", encoding="utf-8")
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _analyse(part: str, opened: Run) -> Facts:
    measure, most, rule = ANALYSES[part]
    return measure(
        opened.model,
        opened.prompts()[:most],
        name=opened.conditions["model_name"],
        seed=opened.conditions["seed"],
        progress=bar(part.replace("_", " ")),
        gen_length=opened.gen_length,
        block_length=opened.block_length,
        **rule(opened.gen_length),
    )
