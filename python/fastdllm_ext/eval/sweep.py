"""Many settings over the same problems: what each answers, how well, in how many forwards and seconds.

Settings take turns on a batch of problems before the next batch begins, so that like is timed beside like.
Every batch is written down as it is done: an interrupted sweep goes on where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastdllm_ext.decoding import DEFAULT_THRESHOLD, RULES, GenerationConfig
from fastdllm_ext.eval.opening import Run, Setting
from fastdllm_ext.eval.statistics import Estimate, bootstrap
from fastdllm_ext.generate import generate
from fastdllm_ext.rules import RULES as RULES_BEYOND
from fastdllm_ext.rules import parse as parse_rule

__all__ = ["Result", "Sweep", "grid"]

AXES = ("caches", "blocks", "refresh", "rules", "lengths")
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
FACTORS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
QUOTAS = (1, 2, 4, 8, 16, 32)  # tokens a step
BLOCKS = (4, 8, 16, 32, 64, 128, 256)
REFRESHES: tuple[Setting, ...] = (
    {"refresh": 2}, {"refresh": 4}, {"window": [8, 8]}, {"window": [16, 16]},
    {"refresh": 4, "window": [8, 8]}, {"suffix": 0}, {"suffix": 32}, {"suffix": 64},
)  # fmt: skip
# Beside the defaults of each rule beyond the paper.
POINTS = {
    "frechet": ("factor=0.1", "factor=0.3", "factor=1.5"),
    "entropy_bound": ("bound=0.01", "bound=0.5", "bound=1.0"),
    "hierarchical": ("low=0.2", "low=0.7", "threshold=0.99:low=0.9"),
    "klass": ("history=1", "kl=0.1:history=1", "threshold=0.5:history=1"),
    "credit": ("threshold=0.5", "threshold=0.7", "threshold=0.99"),
    "wino": ("draft=0.3", "draft=0.8", "draft=0.6:verify=0.7"),
}
GEN_LENGTHS = (64, 128, 256, 512, 1024)


def baseline(gen_length: int, block_length: int) -> Setting:
    """One token a step and no cache: what all else is held against."""
    return {"gen_length": gen_length, "block_length": block_length, "cache": "none", "steps": gen_length}


def grid(
    gen_length: int, block_length: int, axes: Iterable[str] = AXES, quick: bool = False
) -> list[Setting]:
    """The settings of a report, each once; the baseline first. ``quick`` takes about half of them.

    Args:
        gen_length, block_length: where nothing else is said.
        axes: of :data:`AXES`. ``caches``: all caches by all thresholds, factors and quotas (the paper's
            figure 5). ``blocks``: block lengths (figure 4). ``refresh``: refresh policies. ``rules``: those
            beyond the paper. ``lengths``: generation lengths (table 4).
        quick: fewer values.

    Raises:
        ValueError: an unknown axis.
    """
    for axis in axes:
        if axis not in AXES:
            raise ValueError(f"axes={axis!r}; takes of {', '.join(AXES)}")
    shape: Setting = {"gen_length": gen_length, "block_length": block_length}
    threshold: Setting = {"threshold": DEFAULT_THRESHOLD}
    found = [baseline(gen_length, block_length)]
    if "caches" in axes:
        for cache in ("none", "prefix", "dual"):
            every = not quick or cache == "dual"
            rules: list[Setting] = [{"threshold": t} for t in (THRESHOLDS if every else (0.7, 0.9, 1.0))]
            rules += [{"factor": f} for f in (FACTORS if every else (1.0,))]
            rules += [{"steps": max(1, gen_length // q)} for q in (QUOTAS if every else (4, 16))]
            found += [shape | {"cache": cache} | rule for rule in rules]
    if "blocks" in axes:
        found += [
            shape | threshold | {"block_length": block, "cache": cache}
            for cache in ("prefix", "dual")
            for block in BLOCKS
            if block <= gen_length
        ]
    if "refresh" in axes:
        chosen = (REFRESHES[0], REFRESHES[2], REFRESHES[6]) if quick else REFRESHES
        found += [shape | threshold | {"cache": "dual"} | policy for policy in chosen]
    if "rules" in axes:
        found += [shape | {"cache": "dual", "rule": rule} for rule in further_rules(quick)]
    if "lengths" in axes:
        lengths = [n for n in GEN_LENGTHS if gen_length // 2 <= n <= 2 * gen_length]
        for n in lengths:
            found += [baseline(n, block_length), baseline(n, block_length) | {"cache": "dual"}]
            found += [shape | threshold | {"gen_length": n, "cache": c} for c in ("none", "prefix", "dual")]
    unique = {identity(setting): setting for setting in found}
    return list(unique.values())


def key_settings(gen_length: int, block_length: int) -> list[Setting]:
    """Those that conclusions rest on: the baseline, and with the dual cache what it is held against."""
    dual = {"gen_length": gen_length, "block_length": block_length, "cache": "dual"}
    rules: list[Setting] = [{"threshold": 0.9}, {"threshold": 0.99}, {"factor": 1.0}]
    rules += [{"steps": max(1, gen_length // rate)} for rate in (8, 16, 32)]
    return [baseline(gen_length, block_length), *(dual | rule for rule in rules)]


def further_rules(quick: bool) -> list[str]:
    """The rules beyond the paper, each at a few points of its range; ``quick`` is each by its defaults.

    A rule without points of its own here is taken by its defaults.
    """
    every = {name: [str(rule())] for name, rule in RULES_BEYOND.items()}
    for name, points in POINTS.items():
        every[name] += [str(parse_rule(f"{name}:{point}")) for point in points]
    return [rule for found in every.values() for rule in dict.fromkeys(found[:1] if quick else found)]


def identity(setting: Setting) -> str:
    """The setting in one canonical line."""
    return json.dumps(setting, sort_keys=True)


def label(setting: Setting, beside: Setting | None = None) -> str:
    """A setting in words; of lengths only those in which it differs from ``beside``."""
    config = GenerationConfig.from_dict(setting)
    return ", ".join([config.cache, rule_label(config), *_extras(setting, beside)])


def rule_label(config: GenerationConfig) -> str:
    """The rule in words."""
    if config.steps is not None and isinstance(config.gen_length, int):
        rate = config.gen_length / config.steps
        return "one a step" if rate == 1 else f"{rate:g} a step"
    name = next((rule for rule in RULES if getattr(config, rule) is not None), "threshold")
    value = DEFAULT_THRESHOLD if getattr(config, name) is None else getattr(config, name)
    return str(value) if name == "rule" else f"{name} {value:g}"


def _extras(setting: Setting, beside: Setting | None) -> Iterator[str]:
    for name, value in setting.items():
        if name in ("cache", *RULES) or (beside is not None and beside.get(name) == value):
            continue
        words = "+".join(map(str, value)) if isinstance(value, list) else value
        yield f"{name.removesuffix('_length')} {words}"


_LISTS = ("grades", "tokens", "nfe", "answers", "seconds", "sizes")


@dataclass
class Result:
    """What one setting did, problem by problem, in the task's order.

    Attributes:
        setting: its settings.
        grades: of each answer, 0 to 1.
        tokens: of each answer, up to and including EOS.
        nfe: forwards that each took part in.
        answers: texts.
        seconds: wall time of each batch's generation.
        sizes: problems in each batch.
    """

    setting: Setting
    grades: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    nfe: list[int] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def add(self, record: dict[str, Any]) -> None:
        """Takes up one batch, as :class:`Sweep` writes it."""
        for name in _LISTS:
            getattr(self, name).extend(record[name])

    def accuracy(self) -> Estimate:
        """Mean grade."""
        return bootstrap(self.grades)

    def tokens_per_second(self) -> Estimate:
        """Answer tokens over seconds, of batches."""
        totals, rest = [], iter(self.tokens)
        for size in self.sizes:
            totals.append(float(sum(next(rest) for _ in range(size))))
        return bootstrap(totals, self.seconds)

    def tokens_per_forward(self) -> Estimate:
        """Answer tokens over forwards, of problems."""
        return bootstrap([float(t) for t in self.tokens], [float(n) for n in self.nfe])

    def mean_nfe(self) -> Estimate:
        """Forwards of a problem."""
        return bootstrap([float(n) for n in self.nfe])

    def after(self, count: int) -> Result:
        """The same without the first ``count`` problems, which are whole batches."""
        rest = Result(self.setting)
        first = 0
        for size, seconds in zip(self.sizes, self.seconds, strict=True):
            if first >= count:
                lists = {name: getattr(self, name)[first : first + size] for name in _LISTS[:4]}
                rest.add(lists | {"seconds": [seconds], "sizes": [size]})
            first += size
        return rest

    def only(self, chosen: Sequence[int]) -> Result:
        """The same of some problems, where each was a batch of its own."""
        lists = {name: [getattr(self, name)[i] for i in chosen] for name in _LISTS}
        return Result(self.setting, **lists)


class Sweep:
    """Settings over a task's problems, written to a folder batch by batch.

    Args:
        opened: the model and the task.
        folder: where ``records.jsonl`` and ``conditions.json`` are.

    Attributes:
        lengths: tokens of each problem's prompt.

    Raises:
        ValueError: the folder holds records of other conditions; the message names what differs.
    """

    def __init__(self, opened: Run, folder: Path) -> None:
        self.opened, self.batch_size = opened, opened.batch_size
        self.prompts = opened.prompts()
        self.lengths = list(map(len, self.prompts))
        self._records = folder / "records.jsonl"
        open_folder(folder, opened.conditions)
        self._done: dict[tuple[str, int], dict[str, Any]] = {}
        for record in self._read():
            self._done[record["setting"], record["batch"]] = record

    def _read(self) -> Iterator[dict[str, Any]]:
        if not self._records.exists():
            return
        text = self._records.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]  # an interruption may leave half a line
        if whole != text:
            self._records.write_text(whole, encoding="utf-8")
        yield from map(json.loads, whole.splitlines())

    def run(
        self, settings: Sequence[Setting], progress: Callable[..., Any] = iter, problems: int | None = None
    ) -> list[Result]:
        """Every setting on every problem; what is on record is not done again.

        Args:
            settings: to be measured.
            progress: wraps an iterable, as tqdm does.
            problems: the first so many, to whole batches; None is all.
        """
        count = len(self.prompts) if problems is None else min(problems, len(self.prompts))
        batches = range(-(-count // self.batch_size))
        work = [(b, s) for b in batches for s in settings if (identity(s), b) not in self._done]
        warm: set[str] = set()
        for batch, setting in progress(work):
            if identity(setting) not in warm:  # a first call allocates and warms caches; it does not count
                warm.add(identity(setting))
                self._answer(setting, 0, 1)
            first = batch * self.batch_size
            record = self._answer(setting, first, min(first + self.batch_size, len(self.prompts)))
            record = {"setting": identity(setting), "batch": batch, **record}
            with self._records.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            self._done[record["setting"], batch] = record
        results = []
        for setting in settings:
            results.append(Result(setting))
            for batch in batches:
                results[-1].add(self._done[identity(setting), batch])
        return results

    def _answer(self, setting: Setting, first: int, last: int) -> dict[str, Any]:
        config = GenerationConfig.from_dict(setting | {"seed": 0})
        output = generate(self.opened.model, self.prompts[first:last], config=config)
        texts = [
            self.opened.tokenizer.decode(answer, skip_special_tokens=True) for answer in output.answers()
        ]
        problems = self.opened.task.problems[first:last]
        return {
            "seconds": [output.timings.total],
            "sizes": [last - first],
            "tokens": (output.lengths - output.prompt_lengths).tolist(),
            "nfe": output.nfe.tolist(),
            "grades": [problem.score(text) for problem, text in zip(problems, texts, strict=True)],
            "answers": texts,
        }


def open_folder(folder: Path, conditions: dict[str, Any]) -> None:
    """Notes the conditions of what a folder holds; ValueError where it holds what was done under others."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "conditions.json"
    if not path.exists():
        path.write_text(json.dumps(conditions, indent=1) + "\n", encoding="utf-8")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    now = json.loads(json.dumps(conditions))
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise ValueError(
                f"{folder} holds results with {name}={before.get(name)!r}, and now {name}={now.get(name)!r}; "
                "takes the same conditions, or another folder"
            )
