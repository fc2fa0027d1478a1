"""Jobs: prompts with all that their answers depend on, from the model's facts to answers as objects.

What is here is the same whoever decodes: one engine, or replicas of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateError

from fastdllm_ext.arguments import row_seeds
from fastdllm_ext.commands import fingerprint
from fastdllm_ext.commands.opening import check_for_model
from fastdllm_ext.commands.prompts import Asked
from fastdllm_ext.decoding import GenerationConfig
from fastdllm_ext.engine import Completion, Engine, Request
from fastdllm_ext.patching.family import Family, Geometry
from fastdllm_ext.serve.text import Speech

__all__ = [
    "AHEAD",
    "REFUSALS",
    "Answer",
    "Answers",
    "Asker",
    "Facts",
    "Job",
    "answer_of",
    "failure",
    "make_jobs",
]

Answer = dict[str, Any]

AHEAD = 2  # jobs that an engine holds for each row that it decodes at once: some of them wait
# What is wrong with one prompt: with its text, its tokens, its settings, or its logits.
REFUSALS = (TemplateError, TypeError, ValueError)


@dataclass(frozen=True)
class Facts:
    """What is to be known of an engine to make jobs for it, without its model.

    Attributes:
        config: what prompts get that say nothing.
        family, geometry: of its model.
        has_chat: its tokenizer has a chat template.
        weights, tokenizer: fingerprints.
        dtype: of the weights.
    """

    config: GenerationConfig
    family: Family
    geometry: Geometry
    has_chat: bool
    weights: str
    tokenizer: str
    dtype: str

    @classmethod
    def of(cls, engine: Engine) -> Facts:
        """Those of an engine."""
        return cls(
            config=engine.config,
            family=engine.family,
            geometry=engine.geometry,
            has_chat=Speech(engine.tokenizer, engine.geometry.eos_ids).has_chat,
            weights=fingerprint.of_model(engine.model),
            tokenizer=fingerprint.of_tokenizer(engine.tokenizer),
            dtype=str(next(engine.model.parameters()).dtype).removeprefix("torch."),
        )


@dataclass(frozen=True)
class Job:
    """A prompt with all that its answer depends on.

    Attributes:
        asked: as it was given.
        config, stream: as the engine takes them.
    """

    asked: Asked
    config: GenerationConfig
    stream: int

    @property
    def hash(self) -> str:
        """Of what was asked."""
        asked = self.asked
        return fingerprint.of_values(asked.prompt, asked.others, self.config.to_dict(), self.stream)


Answers = Callable[[Sequence[Job]], Iterator[Answer]]  # as they come


def make_jobs(facts: Facts, asked: Sequence[Asked], seed: int | None) -> tuple[GenerationConfig, list[Job]]:
    """The settings of prompts that have none of their own, and every prompt's job.

    Args:
        facts: of whose config the prompts' own settings are an addition.
        asked: the prompts.
        seed: where none is given; None draws one, if anything is sampled.

    Raises:
        ValueError: a prompt's settings are none, or none for the model.
    """
    configs = [_config_of(facts, one) for one in asked]
    if seed is None:  # drawn; 0 where nothing is sampled
        seed = next(filter(None, (row_seeds(c, 1)[0][0] for c in configs if c.seed is None)), 0)

    def seeded(config: GenerationConfig) -> GenerationConfig:
        return replace(config, seed=seed) if config.seed is None else config

    base = seeded(facts.config)
    return base, [
        Job(
            one,
            seeded(config) if one.settings else base,
            # A seed of its own means what it means to a generation of this prompt alone.
            index if one.settings.get("seed") is None else 0,
        )
        for index, (one, config) in enumerate(zip(asked, configs, strict=True))
    ]


def _config_of(facts: Facts, one: Asked) -> GenerationConfig:
    if not one.settings:
        return facts.config
    try:
        config = GenerationConfig.build(facts.config, one.settings)
        check_for_model(facts.family, facts.geometry, config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{one.where}: {error}") from error
    return config


class Asker:
    """Asks an engine what jobs ask.

    Args:
        engine: with a tokenizer.
        chat: what is text goes through the chat template.
    """

    def __init__(self, engine: Engine, chat: bool) -> None:
        self.engine, self.chat = engine, chat
        self._speech = Speech(engine.tokenizer, engine.geometry.eos_ids)

    def submit(self, job: Job) -> Request:
        """Takes a job in. Raises one of :data:`REFUSALS` where its prompt cannot be answered."""
        return self.engine.submit(self._encode(job.asked), config=job.config, stream=job.stream)

    def _encode(self, asked: Asked) -> list[int]:
        prompt: Any = asked.prompt
        if isinstance(prompt, str) and self.chat:
            prompt = [{"role": "user", "content": prompt}]
        elif isinstance(prompt, str):
            return self._speech.encode(prompt, special=True)
        elif not asked.is_chat:
            return list(prompt)
        return self._speech.encode(self._speech.chat(prompt), special=False)


def answer_of(job: Job, completion: Completion) -> Answer:
    """A completion as an object. Its seconds are those of its decoding, without its wait."""
    return {
        "id": job.asked.id,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": completion.prompt_length,
        "tokens": len(completion.tokens),
        "nfe": completion.nfe,
        "seconds": round(completion.seconds - completion.queue_seconds, 6),
        "hash": job.hash,
        **job.asked.others,
    }


def failure(job: Job, error: Exception) -> Answer:
    """What stands in an answer's place."""
    return {"id": job.asked.id, "error": str(error), "hash": job.hash, **job.asked.others}
