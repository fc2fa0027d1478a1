"""What a generation is asked (`GenerationConfig`) and what it returns (`GenerationOutput`)."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils.hub import cached_file

from fastdllm_ext import rules
from fastdllm_ext.checks import check_count, check_number
from fastdllm_ext.ops import Score
from fastdllm_ext.rules.fast_dllm import Factor, Quota, Threshold

__all__ = ["Commit", "GenerationConfig", "GenerationOutput", "Timings"]

CACHES = ("none", "prefix", "dual")
RULES = ("steps", "threshold", "factor", "rule")
REMASKING = {
    "low_confidence": Score.PROBABILITY,
    "random": Score.RANDOM,
    "margin": Score.MARGIN,
    "entropy": Score.ENTROPY,
}
SCHEDULES = ("even", "linear", "independent")
DEFAULT_THRESHOLD = 0.9
CONFIG_KEY = "fastdllm"  # of ours in HuggingFace's generation_config.json

F = TypeVar("F", bound=Callable[..., Any])


@dataclass
class GenerationConfig:
    """How to decode. At most one of ``steps``, ``threshold``, ``factor``, ``rule``; none is threshold 0.9.

    docs/decoding.md defines every field.

    Attributes:
        gen_length: tokens to generate; one number, or one for each row.
        block_length: tokens a block holds; the last block may be shorter.
        steps: forwards of a row in all, spread over its blocks; each step commits its share.
        threshold: commit every token whose confidence reaches it: in (0, 1], or at most 0 for "entropy".
        factor: commit the n most confident tokens while (n + 1)(1 - c_n) <= factor (Theorem 1).
        rule: another rule, of :mod:`fastdllm_ext.rules`: one of its classes with parameters, or as a string,
            ``"klass"`` or ``"klass:kl=0.01:threshold=0.9"``, or a mapping ``{"name": "klass", "kl": 0.01}``.
        schedule: how ``steps`` shares out a block: "even" (LLaDA), or with Dream's time steps from 1 to
            ``eps``: "linear", or "independent", which leaves each position to chance.
        eps: the last time step of those schedules.
        remasking: rank positions by "low_confidence" (probability), "margin" (of the two likeliest tokens),
            "entropy" (its negative) or at "random".
        alg_temp: temperature at which ``steps`` draws the positions to commit; 0 takes the most confident.
        temperature: of the Gumbel noise by which tokens are sampled; 0 is greedy.
        top_p, top_k: truncate the distribution, in families that define it (Dream).
        cfg_scale: classifier-free guidance; 0 is off.
        cache: "none", "prefix" (Fast-dLLM section 3.2) or "dual".
        refresh: "block", or every how many blocks the whole row is computed.
        window: positions before and behind the block that a block step computes as well.
        suffix: attend to this many positions behind the block only; None to all.
        infill: the masks are those in ``input_ids``, anywhere; ``gen_length`` and EOS play no part.
        stop_on_eos: a row is finished once an EOS is committed and everything before it.
        mask_token_id, eos_token_id, pad_token_id: in place of the model's; EOS may be several.
        seed: an int; row b then samples from its stream b. Or one int for each row, which then
            gives the same tokens alone and in any batch. None: drawn from torch's generator.
    """

    gen_length: int | Sequence[int] = 128
    block_length: int = 32
    steps: int | None = None
    threshold: float | None = None
    factor: float | None = None
    rule: rules.Rule | str | Mapping[str, Any] | None = None
    schedule: str = "even"
    eps: float = 1e-3
    remasking: str = "low_confidence"
    alg_temp: float = 0.0
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    cfg_scale: float = 0.0
    cache: str = "dual"
    refresh: str | int = "block"
    window: tuple[int, int] = (0, 0)
    suffix: int | None = None
    infill: bool = False
    stop_on_eos: bool = True
    mask_token_id: int | None = None
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None
    seed: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        lengths = self.gen_length if isinstance(self.gen_length, (list, tuple)) else [self.gen_length]
        for length in lengths:
            check_count("gen_length", length)
        check_count("block_length", self.block_length)
        for name, allowed in (("cache", CACHES), ("remasking", REMASKING), ("schedule", SCHEDULES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}; takes one of {', '.join(allowed)}")
        for name in ("infill", "stop_on_eos"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}={getattr(self, name)!r}; takes True or False")
        self._check_rule()
        if self.temperature != 0:
            check_number("temperature", self.temperature, "from 1e-6, or 0", 0.999e-6, math.inf)
        if self.alg_temp != 0:
            check_number("alg_temp", self.alg_temp, "from 1e-6, or 0", 0.999e-6, math.inf)
        if self.top_p is not None:
            check_number("top_p", self.top_p, "above 0 and at most 1", 0, 1)
        if self.top_k is not None:
            check_count("top_k", self.top_k)
        if self.cfg_scale != 0:
            check_number("cfg_scale", self.cfg_scale, "of 0 or more", 0, math.inf)
            if self.selection.verifies:
                raise ValueError(
                    f"cfg_scale={self.cfg_scale}: rule={self.rule} verifies without guidance; takes 0"
                )
        self._check_refresh()
        eos = self.eos_token_id if isinstance(self.eos_token_id, (list, tuple)) else [self.eos_token_id]
        tokens = {
            "mask_token_id": [self.mask_token_id],
            "eos_token_id": eos,
            "pad_token_id": [self.pad_token_id],
        }
        for name, ids in tokens.items():
            for token in ids:
                if token is not None:
                    check_count(name, token, least=0)
        seeds = self.seed if isinstance(self.seed, (list, tuple)) else [self.seed]
        for seed in seeds if self.seed is not None else ():
            if isinstance(seed, bool) or not isinstance(seed, int):
                raise TypeError(f"seed={seed!r}; takes an int, or one for each row")
            if not 0 <= seed < 2**63:
                raise ValueError(f"seed={seed}; takes 0 to 2**63 - 1")

    def _check_rule(self) -> None:
        if self.steps is not None:
            check_count("steps", self.steps)
        if self.threshold is not None:
            if self.remasking == "entropy":
                check_number(
                    "threshold", self.threshold, "of at most 0 (an entropy's negative)", -math.inf, 0
                )
            else:
                check_number("threshold", self.threshold, "above 0 and at most 1", 0, 1)
        if self.factor is not None:
            check_number("factor", self.factor, "above 0", 0, math.inf)
        if self.rule is not None:
            self.rule = rules.parse(self.rule)
            if self.remasking not in ("low_confidence", self.rule.ranks_by):
                raise ValueError(
                    f"remasking={self.remasking!r}: rule={self.rule} ranks by "
                    f"{self.rule.ranks_by!r}; takes that"
                )
        given = [name for name in RULES if getattr(self, name) is not None]
        if len(given) > 1:
            values = ", ".join(f"{name}={getattr(self, name)}" for name in given)
            raise ValueError(f"{values}: takes only one of steps, threshold, factor and rule")
        if self.factor is not None and self.remasking != "low_confidence":
            raise ValueError(
                f"remasking={self.remasking!r}: factor bounds probabilities; takes 'low_confidence'"
            )
        if not given and self.remasking == "entropy":
            raise ValueError("remasking='entropy': takes a threshold (of at most 0) or steps")
        check_number("eps", self.eps, "above 0 and below 1", 0, 1 - 1e-9)
        for name, off in (("schedule", "even"), ("alg_temp", 0)):
            if getattr(self, name) != off and self.steps is None:
                raise ValueError(f"{name}={getattr(self, name)!r}: is a matter of steps; takes steps=...")
        if self.schedule == "independent" and (self.remasking != "random" or self.alg_temp != 0):
            raise ValueError(
                f"schedule='independent' takes remasking='random' and alg_temp=0, "
                f"got {self.remasking!r} and {self.alg_temp}"
            )

    def _check_refresh(self) -> None:
        if self.refresh != "block":
            if isinstance(self.refresh, str):
                raise ValueError(f"refresh={self.refresh!r}; takes 'block', or a number of blocks")
            check_count("refresh", self.refresh)
        window = self.window
        if not isinstance(window, (list, tuple)) or len(window) != 2:
            raise TypeError(f"window={window!r}; takes two ints, (before, after)")
        for count in window:
            check_count("window", count, least=0)
        self.window = (window[0], window[1])
        if self.suffix is not None:
            check_count("suffix", self.suffix, least=0)
            if self.infill:
                raise ValueError(
                    f"suffix={self.suffix}: an infill attends to everything it is given; takes None"
                )
        if self.cache == "none" and (self.refresh not in ("block", 1) or self.window != (0, 0)):
            raise ValueError(
                f"cache='none' computes the whole row at every step: refresh={self.refresh!r} and "
                f"window={self.window} take cache='prefix' or 'dual'"
            )

    @classmethod
    def build(cls, config: GenerationConfig | None, arguments: dict[str, Any]) -> GenerationConfig:
        """``config`` (or the defaults) with keyword arguments over it.

        A rule among the arguments takes the place of the config's, another one than ``steps`` also of what
        belongs to that. ``max_new_tokens`` is HuggingFace's name of ``gen_length``.

        Raises:
            TypeError: an argument that does not exist.
        """
        if "max_new_tokens" in arguments:
            if "gen_length" in arguments:
                raise ValueError(
                    f"max_new_tokens={arguments['max_new_tokens']}, gen_length={arguments['gen_length']}: "
                    "are two names of one thing; takes one of them"
                )
            arguments = {k if k != "max_new_tokens" else "gen_length": v for k, v in arguments.items()}
        names = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(arguments) - names)
        if unknown:
            raise TypeError(f"generate: unknown argument {unknown[0]!r}; takes {', '.join(sorted(names))}")
        if config is None:
            return cls(**arguments)
        if not isinstance(config, GenerationConfig):
            raise TypeError(f"config={type(config).__name__}; takes a fastdllm_ext.GenerationConfig")
        if any(arguments.get(rule) is not None for rule in RULES):
            of_steps = {"schedule": "even", "alg_temp": 0.0} if arguments.get("steps") is None else {}
            arguments = dict.fromkeys(RULES) | of_steps | arguments
        return dataclasses.replace(config, **arguments)

    @classmethod
    def from_pretrained(cls, path_or_id: str | os.PathLike[str]) -> GenerationConfig:
        """What :meth:`save_pretrained` wrote; defaults where a checkpoint's generation_config.json has none.

        Raises:
            OSError: no such folder or checkpoint, or it has no generation_config.json.
            TypeError, ValueError: a key that does not exist, or a value out of range.
        """
        try:
            found: Any = cached_file(os.fspath(path_or_id), GENERATION_CONFIG_NAME)
        except ValueError as error:  # of the Hub's client, where the path is no name of a repository either
            raise OSError(f"{path_or_id}: no such folder or checkpoint") from error
        return cls.from_dict(json.loads(Path(found).read_text(encoding="utf-8")).get(CONFIG_KEY) or {})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GenerationConfig:
        """From a mapping such as :meth:`to_dict` returns. TypeError that names its unknown keys."""
        names = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - names)
        if unknown:
            raise TypeError(
                f"GenerationConfig: unknown {', '.join(map(repr, unknown))}; takes {', '.join(sorted(names))}"
            )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from their defaults, as JSON can hold them."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        found["rule"] = None if self.rule is None else self.selection.to_dict()
        return {
            f.name: list(found[f.name]) if isinstance(found[f.name], tuple) else found[f.name]
            for f in dataclasses.fields(self)
            if found[f.name] != f.default
        }

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes the settings into ``folder``/generation_config.json, under a key of their own.

        What else the file holds stays; :func:`fastdllm_ext.load` takes the settings up as defaults.
        """
        path = Path(folder) / GENERATION_CONFIG_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        values[CONFIG_KEY] = self.to_dict()
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    @property
    def selection(self) -> rules.Rule:
        """The selection rule, by whatever argument it was given."""
        if isinstance(self.rule, rules.Rule):
            return self.rule
        if self.steps is not None:
            return Quota(self.steps)
        if self.factor is not None:
            return Factor(self.factor)
        return Threshold(DEFAULT_THRESHOLD if self.threshold is None else self.threshold)

    @property
    def filters(self) -> bool:
        """``top_p`` or ``top_k`` leaves tokens out."""
        return self.top_p not in (None, 1) or self.top_k is not None

    @property
    def ranks_by(self) -> str:
        """What positions are ranked by, in the words of ``remasking``: a ``rule`` decides it."""
        return self.remasking if self.rule is None else self.selection.ranks_by


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
        prompt_lengths: [B] int64: where the answer begins; in an infill, the first mask.
        nfe: [B] int64: forwards that the row took part in.
        step_map: [B, max G] int32: the step that committed each position; -1 where none did.
        confidence: [B, max G] float32: of each committed token, by ``remasking``; 0 where none.
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
    used with more than one row. Of a rule that takes tokens back, a position may come again in a later
    commit, which then holds; what was taken back is not reported.
    """

    def put(self, value: Tensor) -> None:
        """Takes token ids, 1-D."""

    def end(self) -> None:
        """Called once after the last token."""
