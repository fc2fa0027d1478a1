"""What does the speed cost? docs/quality.md and its pictures, from the JSON of a report and of a calibration.

    fastdllm-ext calibrate demo --limit 1000 --seed 8 --out build/calibrated
    fastdllm-ext report demo --limit 200 --more 1000 --seed 7 --config build/calibrated --out build/quality
    python benchmarks/quality.py --report build/quality/report.json \
      --calibration build/calibrated/calibration/calibration.json

Both files are kept in benchmarks/results, from which the page can be made again. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common import ROOT, machine_facts
from fastdllm_ext.decoding import RULES
from fastdllm_ext.eval import analysis_figures, figures
from fastdllm_ext.eval.report import TRADEOFF_FIGURES
from fastdllm_ext.eval.sections import build_sections, problems_said
from fastdllm_ext.eval.statistics import pareto
from fastdllm_ext.eval.summary import select

Facts = dict[str, Any]
Row = dict[str, Any]
RESULTS = ROOT / "benchmarks" / "results"


def targets(facts: Facts) -> Iterator[tuple[str, str, bool]]:
    """What is to hold, what was measured, and whether it does."""
    rows, key, c = facts["settings"], facts["key_settings"], facts["conditions"]
    lengths = {"gen_length": c["gen_length"], "block_length": c["block_length"]}
    (threshold,) = select(key, cache="dual", threshold=0.9, **lengths)
    loss, rate = 100 * threshold["loss"][0], threshold["tokens_per_forward"][0]
    yield (
        "threshold 0.9 with the dual cache loses at most 0.5 points against one token a step, at 2.5 tokens "
        "a forward or more",
        f"{loss:.1f} points (at most {100 * threshold['loss_at_most']:.1f} with 95 % confidence), {rate:.1f} "
        f"tokens a forward, on {threshold['problems']:,} problems",
        loss <= 0.5 and rate >= 2.5,
    )
    fixed = [
        row for row in select(key, cache="dual", steps=..., **lengths) if row["nfe"][0] >= threshold["nfe"][0]
    ]
    nearest = min(fixed, key=lambda row: row["nfe"][0])
    margin = 100 * (threshold["accuracy"][0] - nearest["accuracy"][0])
    yield (
        "threshold 0.9 beats a fixed number of tokens a step at as many forwards or more, by a clear margin",
        f"{100 * threshold['accuracy'][0]:.1f} % with {threshold['nfe'][0]:.1f} forwards against "
        f"{100 * nearest['accuracy'][0]:.1f} % with {nearest['nfe'][0]:.1f} ({nearest['label']}): "
        f"{margin:.1f} points",
        threshold["accuracy"][1] > nearest["accuracy"][2],
    )
    for row in key:
        if row["setting"] in facts["own"]:
            yield (
                "what `calibrate` chose on other prompts loses no more than 0.5 points on these",
                f"{row['label']}: {100 * row['loss'][0]:.2f} points (at most {100 * row['loss_at_most']:.2f} "
                f"with 95 % confidence) on {row['problems']:,}, {row['speedup']:.0f} times as fast",
                row["loss"][0] <= 0.005,
            )
    # Refresh policies and block lengths are tried with one threshold alone, so that like is compared here.
    alike = [row for rule in RULES for row in select(rows, cache=..., **{rule: ...}, **lengths)]
    front = [alike[i] for i in pareto([(row["tokens_per_second"][0], row["accuracy"][0]) for row in alike])]
    found = {
        name: [row["label"] for row in front if name in row["setting"]] for name in ("threshold", "factor")
    }
    yield (
        "threshold and factor are both on the front of accuracy against tokens/s, where cache and rule alone "
        "differ",
        "; ".join(" / ".join(labels) or f"{name} nowhere" for name, labels in found.items()),
        all(found.values()),
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], marked: Sequence[int] = ()) -> list[str]:
    """A Markdown table; marked rows in bold."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    body = [[f"**{cell}**" if i in marked and cell else cell for cell in row] for i, row in enumerate(rows)]
    return [line(head), line(["---"] * len(head)), *map(line, body)]


def page(facts: Facts, calibration: Facts | None, images: str) -> str:
    """The page's text. ``images`` is where pictures are, from the page."""
    c = facts["conditions"]
    lines = [
        "# What the speed costs",
        "",
        *_wrapped(
            f"The bundled demo model, judged: {problems_said(facts)}, held out (seed {c['seed']}), exact "
            f"match of the whole answer, generation length {c['gen_length']}, block length "
            f"{c['block_length']}, {c['dtype']}, batch {c['batch_size']}, {c['machine']}, torch "
            f"{c['environment']['torch']}, {facts['date'][:10]}. Made by `benchmarks/quality.py` from "
            "[quality-cpu.json](../benchmarks/results/quality-cpu.json), which holds every sample; nothing "
            "on it is written by hand. Tokens count up to and including EOS. The model was trained on "
            "rows of at most 152 positions, prompt and answer together: at shorter generation lengths than "
            f"{c['gen_length']} long answers have no room, and longer ones it has never seen. On your own "
            "model and task the same comes from one command: [reports.md](reports.md)."
        ),
        "",
        "## Targets",
        "",
        *table(
            ["target", "measured", ""],
            [[what, measured, "met" if met else "missed"] for what, measured, met in targets(facts)],
        ),
    ]
    for section in build_sections(facts):
        lines += ["", f"## {section['title']}", ""]
        for text in section.get("text", ()):
            lines += [*_wrapped(text), ""]
        for name in section.get("figures", ()):
            lines += [f"![{section['title']}]({images}/quality-{name})", ""]
        if section.get("table"):
            lines += table(**section["table"])
        while not lines[-1]:
            lines.pop()
    if calibration is not None:
        lines += ["", *_calibration(calibration)]
    return "\n".join(lines) + "\n"


def _calibration(facts: Facts) -> list[str]:
    c, chosen = facts["conditions"], facts["chosen"]
    rows = [
        [
            row["label"],
            f"{100 * row['accuracy'][0]:.1f}",
            f"{100 * row['loss'][0]:.2f}",
            f"{100 * row['loss_at_most']:.2f}",
            f"{row['tokens_per_second'][0]:,.0f}",
        ]
        for row in facts["finalists"]
    ]
    marked = [i for i, row in enumerate(facts["finalists"]) if row["setting"] == chosen]
    return [
        "## Calibration",
        "",
        *_wrapped(
            f"`{facts['command']}`: {facts['candidates']} settings raced on {facts['raced_on']} prompts; on "
            f"the other {facts['decided_on']} (seed {c['seed']}) the winners were held against one token a "
            "step, from the most accurate on, up to the first that may lose more than "
            f"{facts['max_loss']:g} points with 95 % confidence. "
            + ("In bold: what was chosen." if chosen else "None was chosen.")
        ),
        "",
        *table(["setting", "accuracy, %", "loss, points", "at most", "tokens/s"], rows, marked),
    ]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 118, break_long_words=False, break_on_hyphens=False)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--report", type=Path, help="report.json to take over into benchmarks/results")
    parser.add_argument("--calibration", type=Path, help="calibration.json, likewise")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "quality.md")
    parser.add_argument("--images", type=Path, default=ROOT / "docs" / "images")
    arguments = parser.parse_args()
    kept = {name: arguments.results / f"{name}-cpu.json" for name in ("quality", "calibration")}
    for given, path in ((arguments.report, kept["quality"]), (arguments.calibration, kept["calibration"])):
        if given is not None:
            taken = {
                "commit": machine_facts("cpu")["commit"],
                **json.loads(given.read_text(encoding="utf-8")),
            }
            path.write_text(json.dumps(taken, indent=1) + "\n", encoding="utf-8")
    facts = json.loads(kept["quality"].read_text(encoding="utf-8"))
    calibration = kept["calibration"]
    found = json.loads(calibration.read_text(encoding="utf-8")) if calibration.exists() else None
    for name in TRADEOFF_FIGURES:
        getattr(figures, f"plot_{name}")(facts, arguments.images / f"quality-{name}.png")
    for part, plots in analysis_figures.FIGURES.items():
        for name, plot in plots.items():
            plot(facts[part], arguments.images / f"quality-{name}.png")
    where = arguments.images.resolve().relative_to(arguments.out.resolve().parent)
    arguments.out.write_text(page(facts, found, where.as_posix()), encoding="utf-8")
    print(f"Wrote {arguments.out}")


if __name__ == "__main__":
    main()
