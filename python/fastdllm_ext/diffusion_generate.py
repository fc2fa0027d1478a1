"""Dream's published way to call a generation: ``model.diffusion_generate(...)``, over the one loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from fastdllm_ext.cache import PagedKVCache
from fastdllm_ext.checks import check_count
from fastdllm_ext.decoder import Decoder, Plan
from fastdllm_ext.decoding import GenerationConfig, GenerationOutput, Streamer
from fastdllm_ext.generate import run
from fastdllm_ext.ops import Row
from fastdllm_ext.patching.registry import patched_family, unwrapped
from fastdllm_ext.rows import Block, DecodingRow, TimeSteps

# What Dream's configuration says where neither the caller nor the checkpoint does.
PUBLISHED: dict[str, Any] = {
    "temperature": 0.0, "top_p": None, "top_k": None, "max_length": 20, "max_new_tokens": None, "eps": 1e-3,
    "steps": 512, "alg": "origin", "alg_temp": None, "num_return_sequences": 1,
    "return_dict_in_generate": False, "output_history": False,
    "mask_token_id": None, "eos_token_id": None, "pad_token_id": None, "bos_token_id": None,
}  # fmt: skip
# Dream's algorithms in the words of GenerationConfig.
ALGORITHMS: dict[str, dict[str, str]] = {
    "origin": {"remasking": "random", "schedule": "independent"},
    "maskgit_plus": {"remasking": "low_confidence", "schedule": "linear"},
    "topk_margin": {"remasking": "margin", "schedule": "linear"},
    "entropy": {"remasking": "entropy", "schedule": "linear"},
    "confidence_threshold": {},
}
# Fields of ours that the published arguments decide.
DECIDED = ("gen_length", "remasking", "schedule", "steps")

Hook = Callable[..., Any]


@dataclasses.dataclass
class DreamModelOutput(ModelOutput):
    """What Dream's published code returns, and what ours knows besides.

    Attributes:
        sequences: [B, max_length] int64: the prompts as they came, padding included, and the answers.
        history: ``sequences`` after every forward, where ``output_history`` is set.
        details: our own result; its rows are without padding.
    """

    sequences: Tensor | None = None
    history: tuple[Tensor, ...] | None = None
    details: Any = None


def diffusion_generate(
    model: nn.Module,
    inputs: Tensor | None = None,
    generation_config: Any = None,
    *,
    attention_mask: Tensor | None = None,
    dual_cache: bool | None = None,
    generation_tokens_hook_func: Hook | None = None,
    generation_logits_hook_func: Hook | None = None,
    streamer: Streamer | None = None,
    kv_cache: PagedKVCache | None = None,
    **arguments: Any,
) -> DreamModelOutput | Tensor:
    """Dream's ``diffusion_generate`` with its published arguments, and those of :class:`GenerationConfig`.

    Without ``cache`` or ``dual_cache`` it is Dream's own algorithm: the whole answer is one block and every
    step computes the whole row. With one of them it is Fast-dLLM's, in blocks of ``block_length`` (32).

    Args:
        model: a patched Dream model.
        inputs: [B, P] int64.
        generation_config: any object with the published attributes; the model's own where it is None.
        attention_mask: [B, P], 0 at padding.
        dual_cache: True is ``cache="dual"``, False ``cache="prefix"``.
        generation_tokens_hook_func: ``hook(step, x, logits) -> x`` before the first step (step and logits
            are None) and after every step; x is [B, max_length].
        generation_logits_hook_func: ``hook(step, x, logits) -> logits``, [B, max_length, vocab], shifted as
            Dream reads them. Either hook makes every step compute the logits of every position, and takes
            ``cache="none"`` and one block.
        streamer, kv_cache: as for :func:`fastdllm_ext.generate`.
        **arguments: published: ``max_new_tokens`` or ``max_length``, ``steps``, ``eps``, ``alg`` ("origin",
            "maskgit_plus", "topk_margin", "entropy", "confidence_threshold"), ``alg_temp``, ``temperature``,
            ``top_p``, ``top_k``, ``threshold``, ``block_length``, ``num_return_sequences``,
            ``return_dict_in_generate``, ``output_history``, ``mask_token_id``, ... Ours: ``cache``,
            ``factor``, ``rule``, ``refresh``, ``window``, ``suffix``, ``stop_on_eos``, ``seed``, ...

    Returns:
        [B, max_length] int64, or a :class:`DreamModelOutput` with ``return_dict_in_generate=True``.

    Raises:
        TypeError, ValueError: as :func:`fastdllm_ext.generate`. "confidence_threshold" takes no heed of
            ``steps``, which its callers pass; the other algorithms refuse ``threshold``, ``factor`` and
            ``rule``.
    """
    if not isinstance(inputs, Tensor) or inputs.dim() != 2:
        raise ValueError(f"inputs={_kind(inputs)}; takes a [B, P] int64 tensor")
    published = PUBLISHED | _settings(generation_config, unwrapped(model))
    published |= {name: value for name, value in arguments.items() if name in PUBLISHED}
    ours = {name: value for name, value in arguments.items() if name not in PUBLISHED}
    _refuse_unknown(ours)
    gen_length = _gen_length(published, "max_length" in arguments, inputs.shape[1], model)
    hooks = (generation_tokens_hook_func, generation_logits_hook_func)
    config = _config(published, ours, "alg" in arguments, gen_length, dual_cache)
    if hooks != (None, None) and (config.cache != "none" or config.block_length < gen_length):
        raise ValueError(
            f"generation hooks: takes cache='none' and one block, got cache={config.cache!r} and "
            f"block_length={config.block_length} for {gen_length} tokens"
        )
    if hooks != (None, None) and config.rule is not None:
        raise ValueError(f"rule={config.rule}: takes no generation hooks, which change what it chose")
    if published["output_history"] and config.selection.verifies:
        raise ValueError(
            f"rule={config.rule}: takes no output_history, which would not show what it took back"
        )
    if hooks != (None, None) and config.cfg_scale:
        raise ValueError(f"cfg_scale={config.cfg_scale}: takes no generation hooks")
    copies = published["num_return_sequences"]
    check_count("num_return_sequences", copies)
    inputs = inputs.repeat_interleave(copies, 0)
    attention_mask = attention_mask if attention_mask is None else attention_mask.repeat_interleave(copies, 0)

    frame = _Frame(inputs, attention_mask, gen_length)

    def decoder(*args: Any) -> Decoder:
        return Decoder(*args) if hooks == (None, None) else _HookedDecoder(*args, frame=frame, hooks=hooks)

    output = run(
        decoder,
        model,
        inputs,
        attention_mask=attention_mask,
        config=config,
        streamer=streamer,
        kv_cache=kv_cache,
    )
    sequences = frame.lay_out(output.sequences)
    if not published["return_dict_in_generate"]:
        return sequences
    history = None
    if published["output_history"]:
        mask_id = published["mask_token_id"]
        if mask_id is None:
            mask_id = patched_family(model).geometry(unwrapped(model)).mask_id
        history = tuple(frame.lay_out(rows) for rows in _history(output, gen_length, mask_id))
    return DreamModelOutput(sequences=sequences, history=history, details=output)


class _Frame:
    """Between rows without padding and [B, max_length] as it was given."""

    def __init__(self, inputs: Tensor, attention_mask: Tensor | None, gen_length: int) -> None:
        self.x = F.pad(inputs, (0, gen_length))
        kept = torch.ones_like(inputs) if attention_mask is None else attention_mask.to(inputs.device)
        kept = F.pad(kept, (0, gen_length), value=1)
        self.places = [row.nonzero()[:, 0] for row in kept]

    def lay_out(self, rows: Tensor) -> Tensor:
        """[B, ...] rows without padding -> [B, max_length, ...]; padding as it was given, or 0."""
        x = self.x.clone() if rows.dim() == 2 else rows.new_zeros(*self.x.shape, *rows.shape[2:])
        for b, place in enumerate(self.places):
            x[b, place] = rows[b, : len(place)]
        return x

    def take_up(self, x: Tensor, rows: Tensor) -> None:
        """The inverse, into ``rows``."""
        for b, place in enumerate(self.places):
            rows[b, : len(place)] = x[b, place]


class _HookedDecoder(Decoder):
    """A decoder whose tokens and logits the caller may edit between the steps."""

    wants_all = True

    def __init__(self, *args: Any, frame: _Frame, hooks: tuple[Hook | None, Hook | None]) -> None:
        self.frame, (self.edit_tokens, self.edit_logits) = frame, hooks
        self.logits: Tensor | None = None
        self.times: dict[int, TimeSteps | None] = {}  # of each row
        super().__init__(*args)
        try:
            self._edit(None)
        except BaseException:
            self.close()  # nobody else has the decoder yet
            raise

    def turn(self, rows: Sequence[DecodingRow] | None = None) -> list[DecodingRow]:
        active = super().turn(rows)
        self._edit(max(row.nfe for row in self.rows) - 1)
        return active

    def _logits(self, hidden: Tensor, plan: Plan, chosen: Tensor) -> Tensor:
        """Those of every position, shown to the hook; then those that were chosen."""
        row_of = plan.tokens // self.tokens.shape[1]
        rows = hidden.new_zeros(*self.tokens.shape, self.geometry.vocab_size)
        rows[row_of, plan.layout.positions] = self.runtime.head(hidden).to(rows.dtype)
        self.logits = self.frame.lay_out(torch.cat((rows[:, :1], rows[:, :-1]), 1))
        if self.edit_logits is not None:
            step = max(row.nfe for row in self.rows)
            self.logits = self.edit_logits(step, self.frame.lay_out(self.tokens), self.logits)
        self.frame.take_up(self.logits, rows)
        at = plan.candidates[chosen]
        return rows[at // self.tokens.shape[1], plan.positions[chosen]]

    def _edit(self, step: int | None) -> None:
        """Shows the tokens to the hook, takes up what it returns, and counts the masks again.

        Then the next step fills its share of the masks that are there now.
        """
        if self.edit_tokens is None:
            return
        x = self.edit_tokens(step, self.frame.lay_out(self.tokens), self.logits)
        self.frame.take_up(x, self.tokens)
        for row in self.rows:
            masks = (self.tokens[row.index, : row.end] == self.geometry.mask_id).nonzero()[:, 0].tolist()
            row.done = row.done or not masks
            if not row.done:
                row.blocks = [Block(masks[0], masks[-1] + 1, len(masks))]
                row.block, row.masks_left = 0, len(masks)
                self.state[row.index, Row.MASKS_LEFT] = len(masks)
                if row.index not in self.times:
                    self.times[row.index] = row.time_steps()
                times = self.times[row.index]
                if times is not None:
                    self.quotas[row.index] = times.quota(len(masks), len(masks))


def _history(output: GenerationOutput, gen_length: int, mask_id: int) -> list[Tensor]:
    """The rows after each forward. What lies behind an EOS is filled by the row's last one."""
    where = output.prompt_lengths[:, None] + torch.arange(gen_length, device=output.nfe.device)
    step = torch.where(output.step_map < 0, output.nfe[:, None] - 1, output.step_map.long())
    steps = torch.full_like(output.sequences, -1).scatter(1, where, step)
    return [output.sequences.masked_fill(steps > i, mask_id) for i in range(int(output.nfe.max()))]


def _settings(given: Any, model: Any) -> dict[str, Any]:
    """The published keys that a configuration object sets."""
    found = getattr(model, "generation_config", None) if given is None else given
    if found is None:
        return {}
    # HuggingFace's class has defaults of its own (temperature 1, top_k 50), which are not Dream's.
    is_theirs = type(found) is transformers.GenerationConfig
    values = found.to_diff_dict() if is_theirs else vars(found)
    return {name: values[name] for name in PUBLISHED if values.get(name) is not None}


def _gen_length(published: dict[str, Any], was_given: bool, prompt_length: int, model: nn.Module) -> int:
    """Tokens to generate, by ``max_new_tokens`` or ``max_length``, which counts the prompt too.

    The default ``max_length`` of 20 does not count it, and ends at the model's last position.
    """
    if published["max_new_tokens"] is not None:
        check_count("max_new_tokens", published["max_new_tokens"])
        return published["max_new_tokens"]
    length = published["max_length"]
    check_count("max_length", length)
    if length == PUBLISHED["max_length"] and not was_given:
        positions = patched_family(model).geometry(unwrapped(model)).max_positions
        return min(length, positions - prompt_length)
    if prompt_length >= length:
        raise ValueError(f"max_length={length}: takes more than the prompt's {prompt_length} tokens")
    return length - prompt_length


def _config(
    published: dict[str, Any],
    ours: dict[str, Any],
    alg_was_given: bool,
    gen_length: int,
    dual_cache: bool | None,
) -> GenerationConfig:
    bounded = [name for name in ("threshold", "factor", "rule") if ours.get(name) is not None]
    alg = "confidence_threshold" if bounded and not alg_was_given else published["alg"]
    if alg not in ALGORITHMS:
        raise ValueError(f"alg={alg!r}; takes one of {', '.join(ALGORITHMS)}")
    by_threshold = alg == "confidence_threshold"
    if bounded and not by_threshold:
        raise ValueError(f"{bounded[0]}={ours[bounded[0]]}: takes alg='confidence_threshold', got {alg!r}")
    if dual_cache is not None:
        if "cache" in ours:
            raise ValueError(f"dual_cache={dual_cache}, cache={ours['cache']!r}: takes only one of them")
        ours = ours | {"cache": "dual" if dual_cache else "prefix"}
    values: dict[str, Any] = {"cache": "none"} | ours | ALGORITHMS[alg] | {"gen_length": gen_length}
    if not by_threshold:
        values |= {"steps": published["steps"], "eps": published["eps"]}
        if alg != "origin":
            values["alg_temp"] = published["alg_temp"] or 0.0
    whole = values["cache"] == "none" and not by_threshold
    values.setdefault("block_length", max(1, gen_length) if whole else 32)
    for name in ("temperature", "top_p", "top_k", "mask_token_id", "eos_token_id", "pad_token_id"):
        values[name] = published[name]
    return GenerationConfig.from_dict(values)


def _refuse_unknown(ours: dict[str, Any]) -> None:
    fields = {f.name for f in dataclasses.fields(GenerationConfig)} - {*DECIDED, "infill"}
    unknown = sorted(set(ours) - fields)
    if unknown:
        raise TypeError(
            f"diffusion_generate: unknown argument {unknown[0]!r}; takes "
            f"{', '.join(sorted({*PUBLISHED, *fields}))}"
        )


def _kind(value: object) -> str:
    return f"tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
