"""The steps of a decode, after it: the row that each found, and what it committed.

A decoder notes which step filled each position, and what is filled never changes. So every row that a step
found can be told from the last one, whether steps were taken one by one or many in a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from fastdllm_ext.checks import check_count
from fastdllm_ext.decoder import Decoder
from fastdllm_ext.decoding import GenerationConfig
from fastdllm_ext.eval.sweep import rule_label
from fastdllm_ext.forward import device_of, dtype_of
from fastdllm_ext.generate import opened
from fastdllm_ext.ops import Knob, Row
from fastdllm_ext.patching.registry import patched_family, patched_options, unwrapped
from fastdllm_ext.rows import DecodingRow

__all__ = ["TakenStep", "heading", "require_greedy", "settings_of", "taken_steps"]


@dataclass(frozen=True)
class _History:
    """A row when it was finished.

    Attributes:
        tokens: [P + G] int64.
        filled_at: [P + G] int64, the step that filled each position; -1 where it was given, and the number of
            steps where an early end left a mask.
        confidence: [P + G] float32.
        mask_id: the mask token.
        rule, value: by which it chose, as ``unmask`` takes them.
    """

    tokens: Tensor
    filled_at: Tensor
    confidence: Tensor
    mask_id: int
    rule: int
    value: float


@dataclass(frozen=True)
class TakenStep:
    """One step of one row.

    Attributes:
        prompt: index of the row's prompt.
        number: of the step in its row, from 0.
        block: index of the block that it filled.
        since_refresh: block steps since the last refresh, this one among them; 0 is a refresh.
        candidates: [begin, end) of where it could fill masks.
        history: of its row.
    """

    prompt: int
    number: int
    block: int
    since_refresh: int
    candidates: tuple[int, int]
    history: _History

    @property
    def row(self) -> Tensor:
        """[P + G] int64, the row as the step found it."""
        return self.history.tokens.masked_fill(self.history.filled_at >= self.number, self.history.mask_id)

    @property
    def masks(self) -> Tensor:
        """Positions that it could fill, ascending."""
        begin, end = self.candidates
        return (self.history.filled_at[begin:end] >= self.number).nonzero()[:, 0] + begin

    @property
    def committed(self) -> Tensor:
        """Positions that it filled, ascending."""
        return (self.history.filled_at == self.number).nonzero()[:, 0]

    @property
    def tokens(self) -> Tensor:
        """What it filled them with."""
        return self.history.tokens[self.committed]

    @property
    def confidence(self) -> Tensor:
        """Its confidence in them."""
        return self.history.confidence[self.committed]


def taken_steps(
    model: nn.Module,
    prompts: Sequence[Tensor],
    config: GenerationConfig,
    batch_size: int,
    progress: Callable[..., Any] = iter,
) -> list[TakenStep]:
    """Decodes prompts, ``batch_size`` at a time; every step of every row, in order.

    Args:
        model, prompts, config: as :func:`fastdllm_ext.generate` takes them.
        batch_size: rows of a decode.
        progress: wraps an iterable of batches, as tqdm does.
    """
    found: list[TakenStep] = []
    for begin in progress(range(0, len(prompts), batch_size)):
        batch = list(prompts[begin : begin + batch_size])
        with opened(Decoder, model, batch, None, config) as decoder:
            while any(not row.done for row in decoder.rows):
                decoder.turn()
            for row in decoder.rows:
                found += _steps_of_row(decoder, row, begin + row.index)
    return found


def _steps_of_row(decoder: Decoder, row: DecodingRow, prompt: int) -> Iterator[TakenStep]:
    tensors = (decoder.tokens, decoder.step_map, decoder.confidence, decoder.given)
    tokens, step_map, confidence, given = (x[row.index, : row.end].cpu() for x in tensors)
    filled_at = step_map.long()
    filled_at[(filled_at < 0) & ~given] = row.nfe
    history = _History(
        tokens.clone(),
        filled_at,
        confidence.clone(),
        decoder.geometry.mask_id,
        int(decoder.state[row.index, Row.RULE]),
        float(decoder.knobs[row.index, Knob.VALUE]),
    )
    before, since_refresh = -1, 0
    for number in range(row.nfe):
        first = int((filled_at == number).nonzero()[0])  # every step fills a position or more
        block = next(i for i, block in enumerate(row.blocks) if first < block.end)
        at = replace(row, block=block, fresh=block != before)
        step = at.next_step(decoder.family.shift)
        before, since_refresh = block, 0 if step.is_refresh else since_refresh + 1
        yield TakenStep(prompt, number, block, since_refresh, step.candidates, history)


def settings_of(prompts: Sequence[Tensor], max_steps: int, settings: dict[str, Any]) -> GenerationConfig:
    """How an analysis of steps decodes, its caches apart.

    Raises:
        ValueError: settings that name a cache, or are not greedy; no prompt; no step.
    """
    check_count("max_steps", max_steps)
    if "cache" in settings:
        raise ValueError(f"cache={settings['cache']!r}; takes caches=...")
    config = GenerationConfig.build(None, settings)
    require_greedy(config)
    if not prompts:
        raise ValueError("prompts holds none; takes one or more")
    return config


def require_greedy(config: GenerationConfig) -> None:
    """ValueError unless the settings draw nothing by chance, take the model's logits and nothing back."""
    for name, off in (
        ("temperature", 0),
        ("alg_temp", 0),
        ("cfg_scale", 0),
        ("top_p", None),
        ("top_k", None),
    ):
        if getattr(config, name) != off:
            raise ValueError(f"{name}={getattr(config, name)!r}; an analysis takes {off}")
    if config.remasking == "random":
        raise ValueError("remasking='random'; an analysis takes a confidence of the model's")
    if config.selection.verifies:
        raise ValueError(f"rule={config.rule}: takes tokens back; an analysis takes a rule that does not")


def heading(
    analysis: str,
    model: nn.Module,
    name: str,
    prompts: Sequence[Tensor],
    config: GenerationConfig,
    more: dict[str, Any],
) -> dict[str, Any]:
    """What an analysis is of, and what it holds for; ``more`` conditions are its own."""
    found = _conditions(model, prompts, config) | more
    return {"analysis": analysis, "model": name or type(model).__name__, "conditions": found}


def _conditions(model: nn.Module, prompts: Sequence[Tensor], config: GenerationConfig) -> dict[str, Any]:
    """What a result holds for, as JSON can hold it."""
    family, options, model = patched_family(model), patched_options(model), unwrapped(model)
    parts = family.parts(model)
    lengths = [len(prompt) for prompt in prompts]
    kept = "float8_e4m3fn" if options.kv_cache_dtype == "fp8" else str(dtype_of(parts)).removeprefix("torch.")
    return {
        "settings": config.to_dict(),
        "rule": rule_label(config),
        "gen_length": config.gen_length,
        "block_length": config.block_length,
        "prompts": len(prompts),
        "prompt_tokens": [min(lengths), max(lengths)],
        "dtype": str(dtype_of(parts)).removeprefix("torch."),
        "kv_cache_dtype": kept,
        "quantization": options.quantization,
        "device": device_of(parts.embedding).type,
    }
