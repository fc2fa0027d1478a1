"""What a generation is asked (`GenerationConfig`) and what it returns (`GenerationOutput`)."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from torch import Tensor

from fastdllm_ext.ops import Rule, Score

__all__ = ["Commit", "GenerationConfig", "GenerationOutput", "Timings"]

CACHES = ("none", "prefix", "dual")
RULES = ("steps", "threshold", "factor")
REMASKING = {"low_confidence": Score.PROBABILITY, "random": Score.RANDOM}
DEFAULT_THRESHOLD = 0.9

F = TypeVar("F", bound=Callable[..., Any])


@dataclass
class GenerationConfig:
    """How to decode. At most one of ``steps``, ``threshold``, ``factor``; with none, threshold 0.9.

    Attributes:
        gen_length: tokens to generate; one number, or one for each row.
        block_length: tokens a block holds; the last block may be shorter.
        steps: forwards of a row in all, spread over its blocks; each step commits an equal quota.
        threshold: commit every token whose probability reaches it, in (0, 1].
        factor: commit the n most confident tokens while (n + 1)(1 - c_n) <= factor (Theorem 1).
        temperature: of the Gumbel noise by which tokens are sampled; 0 is greedy.
        top_p, top_k: truncate the distribution, in families that define it (Dream).
        cache: "none", "prefix" (Fast-dLLM section 3.2) or "dual".
        stop_on_eos: a row is finished once an EOS is committed and everything before it.
        seed: an int; row b then samples from its stream b. Or one int for each row, which then
            gives the same tokens alone and in any batch. None: drawn from torch's generator.
        remasking: rank positions by "low_confidence" (probability) or at "random".
    """

    gen_length: int | Sequence[int] = 128
    block_length: int = 32
    steps: int | None = None
    threshold: float | None = None
    factor: float | None = None
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    cache: str = "dual"
    stop_on_eos: bool = True
    seed: int | Sequence[int] | None = None
    remasking: str = "low_confidence"

    def __post_init__(self) -> None:
        lengths = self.gen_length if isinstance(self.gen_length, (list, tuple)) else [self.gen_length]
        for length in lengths:
            _check_count("gen_length", length)
        _check_count("block_length", self.block_length)
        if self.steps is not None:
            _check_count("steps", self.steps)
        if self.threshold is not None:
            _check_number("threshold", self.threshold, "above 0 and at most 1", 0, 1)
        if self.factor is not None:
            _check_number("factor", self.factor, "above 0", 0, math.inf)
        rules = [name for name in RULES if getattr(self, name) is not None]
        if len(rules) > 1:
            given = ", ".join(f"{name}={getattr(self, name)}" for name in rules)
            raise ValueError(f"{given}: takes only one of steps, threshold and factor")
        if self.temperature != 0:
            _check_number("temperature", self.temperature, "from 1e-6, or 0", 0.999e-6, math.inf)
        if self.cache not in CACHES:
            raise ValueError(f"cache={self.cache!r}; takes one of {', '.join(CACHES)}")
        if self.remasking not in REMASKING:
            raise ValueError(f"remasking={self.remasking!r}; takes one of {', '.join(REMASKING)}")
        if not isinstance(self.stop_on_eos, bool):
            raise TypeError(f"stop_on_eos={self.stop_on_eos!r}; takes True or False")
        seeds = self.seed if isinstance(self.seed, (list, tuple)) else [self.seed]
        for seed in seeds if self.seed is not None else ():
            if isinstance(seed, bool) or not isinstance(seed, int):
                raise TypeError(f"seed={seed!r}; takes an int, or one for each row")
            if not 0 <= seed < 2**63:
                raise ValueError(f"seed={seed}; takes 0 to 2**63 - 1")

    @classmethod
    def build(cls, config: GenerationConfig | None, arguments: dict[str, Any]) -> GenerationConfig:
        """``config`` (or the defaults) with keyword arguments over it.

        A rule among the arguments takes the place of the config's rule.

        Raises:
            TypeError: an argument that does not exist.
        """
        names = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(arguments) - names)
        if unknown:
            raise TypeError(f"generate: unknown argument {unknown[0]!r}; takes {', '.join(sorted(names))}")
        if config is None:
            return cls(**arguments)
        if not isinstance(config, GenerationConfig):
            raise TypeError(f"config={type(config).__name__}; takes a fastdllm_ext.GenerationConfig")
        if any(arguments.get(rule) is not None for rule in RULES):
            config = dataclasses.replace(config, steps=None, threshold=None, factor=None)
        return dataclasses.replace(config, **arguments)

    @property
    def rule(self) -> Rule:
        """The selection rule."""
        if self.steps is not None:
            return Rule.QUOTA
        return Rule.FACTOR if self.factor is not None else Rule.THRESHOLD

    @property
    def value(self) -> float:
        """The rule's threshold or factor; 0 for a quota."""
        if self.steps is not None:
            return 0.0
        if self.factor is not None:
            return self.factor
        return DEFAULT_THRESHOLD if self.threshold is None else self.threshold


def takes_config_fields(function: F) -> F:
    """Shows the fields of :class:`GenerationConfig` in a signature, in place of ``**arguments``."""
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    fields = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
        for f in dataclasses.fields(GenerationConfig)
    ]
    function.__signature__ = signature.replace(parameters=own + fields)  # type: ignore[attr-defined]
    return function


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r}; takes an int of 1 or more")
    if value < 1:
        raise ValueError(f"{name}={value}; takes 1 or more")


def _check_number(name: str, value: object, allowed: str, low: float, high: float) -> None:
    """A finite number in (low, high]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r}; takes a number {allowed}")
    if not (low < value <= high and math.isfinite(value)):
        raise ValueError(f"{name}={value}; takes a number {allowed}")


@dataclass
class Timings:
    """Seconds of a generation, by phase. A turn in which some row refreshes counts as refresh."""

    refresh: float = 0.0
    block_steps: float = 0.0
    selection: float = 0.0
    total: float = 0.0


@dataclass
class GenerationOutput:
    """What a generation returns. B rows; P prompt and G generated positions of a row.

    Attributes:
        sequences: [B, max(P + G)] int64: prompt, answer, and pad ids to the right.
        lengths: [B] int64: prompt and answer, up to and including the first EOS.
        prompt_lengths: [B] int64.
        nfe: [B] int64: forwards that the row took part in.
        step_map: [B, max G] int32: the step that committed each position; -1 where none did.
        confidence: [B, max G] float32: probability of each committed token; 0 where none.
        timings: seconds by phase.
    """

    sequences: Tensor
    lengths: Tensor
    prompt_lengths: Tensor
    nfe: Tensor
    step_map: Tensor
    confidence: Tensor
    timings: Timings = field(default_factory=Timings)

    @property
    def tokens_per_forward(self) -> Tensor:
        """[B] float32: answer tokens, up to and including EOS, for each forward."""
        return (self.lengths - self.prompt_lengths) / self.nfe

    @property
    def tokens_per_second(self) -> float:
        """Answer tokens of all rows, up to and including EOS, over the wall time of the call."""
        return float((self.lengths - self.prompt_lengths).sum()) / self.timings.total

    def answers(self) -> list[Tensor]:
        """The answer of each row, up to and including EOS: 1-D int64."""
        bounds = zip(self.prompt_lengths.tolist(), self.lengths.tolist(), strict=True)
        return [row[begin:end] for row, (begin, end) in zip(self.sequences, bounds, strict=True)]


@dataclass(frozen=True)
class Commit:
    """Tokens that one step committed in one row, in order of position within the answer."""

    row: int
    step: int
    positions: list[int]
    tokens: list[int]
    confidence: list[float]


class Streamer(Protocol):
    """HuggingFace's streamer: the prompt, then finished tokens from left to right, then the end.

    A streamer with a method ``on_commit(commit: Commit)`` gets every commit as well, and may then be
    used with more than one row.
    """

    def put(self, value: Tensor) -> None:
        """Takes token ids, 1-D."""

    def end(self) -> None:
        """Called once after the last token."""
