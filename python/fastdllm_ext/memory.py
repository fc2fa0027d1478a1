"""What a generation allocates, by formula."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fastdllm_ext.cache import PagedKVCache
from fastdllm_ext.decoding import GenerationConfig
from fastdllm_ext.forward import place_of_keys
from fastdllm_ext.ops import Knob, Row
from fastdllm_ext.patching.registry import patched_family, patched_options, unwrapped
from fastdllm_ext.rope import table_length
from fastdllm_ext.runtime import Widths, choose_runtime
from fastdllm_ext.shadows import pages_of_shadows

__all__ = ["memory_needed"]

# Bytes of what is small beside the widths of a model, but not of a tiny one.
_POSITION = 8 + 1 + 4 + 4 + 8  # token, whether it was given, step, confidence; the row before decoding
_QUERY = 4 * 8  # its token, place, position and slot
_CANDIDATE = 3 * 8 + 1 + 3 * 8 + 3 * 4  # places, and of those that are masks; what `unmask` knows of a row
_STEP = 4  # of a block: how many masks it fills
_ROW = len(Row) * 8 + len(Knob) * 4 + 16  # state, settings, offsets


def memory_needed(
    model: nn.Module, lengths: Sequence[int], config: GenerationConfig | None = None
) -> dict[str, int]:
    """How many bytes :func:`generate` allocates at its peak, the weights apart: docs/memory.md.

    Args:
        model: a patched model, on any device ("meta" too); its linear layers have ``out_features``.
        lengths: positions of each row, prompt and answer together.
        config: of which ``gen_length``, ``block_length``, ``rule``, ``cfg_scale``, ``infill`` and, where the
            rule verifies, ``cache`` count.

    Returns:
        ``pages``: keys and values, in the dtype that :func:`patch` was told. A ``kv_cache`` that is given to
            ``generate`` takes their place.
        ``activations``: of the largest forward, that in which every row is computed from end to end.
        ``logits``: of all masks of one block of each row, with what is left of that forward, and what the
            rule makes of them.
        ``state``: tokens and what is known of them, what the rule remembers, and the table of rotary angles,
            which is kept.
        ``total``: pages, state, and the larger of activations and logits: they do not exist together.
    """
    family, model = patched_family(model), unwrapped(model)
    config = GenerationConfig() if config is None else config
    geometry, parts = family.geometry(model), family.parts(model)
    twins = 2 if config.cfg_scale else 1
    answers: Any = lengths if config.infill else config.gen_length
    answers = [answers] * len(lengths) if isinstance(answers, int) else answers
    rule = config.selection
    blocks = [min(config.block_length, count, length) for count, length in zip(answers, lengths, strict=True)]
    masks = sum(blocks)
    queries = twins * sum(lengths)
    pages = PagedKVCache.pages_for(list(lengths) * twins)
    shadows = masks if rule.verifies else 0
    if rule.verifies:
        each = 1 + int(family.shift)  # queries of a shadow
        steps = lengths if config.cache == "none" else answers if config.cache == "prefix" else blocks
        queries = sum(max(n, s + each * b) for n, s, b in zip(lengths, steps, blocks, strict=True))
        pages += sum(pages_of_shadows(config, answer, family.shift) for answer in answers)

    widths, options = Widths.of(parts), patched_options(model)
    runtime = choose_runtime(options, family, parts)
    shape, dtype, _ = place_of_keys(geometry, parts, options)
    page = PagedKVCache.page_bytes(*shape, dtype)
    logits = (masks + shadows) * (
        twins * (2 * widths.hidden + geometry.vocab_size) * widths.size + _CANDIDATE
    )
    copy = 4 if rule.scratch and widths.size < 4 else 0  # of the logits, in float32
    logits += masks * geometry.vocab_size * (rule.scratch + copy)
    found = {
        "pages": pages * page,
        "activations": runtime.activation_bytes(widths, queries) + queries * _QUERY,
        "logits": logits + queries * _QUERY,
        "state": len(lengths) * (max(lengths) * _POSITION + max(blocks) * _STEP + _ROW)
        + pages * 4
        + masks * _CANDIDATE
        + table_length(max(lengths)) * geometry.head_dim * 4
        + len(lengths) * max(blocks) * geometry.vocab_size * rule.kept,
    }
    found["total"] = found["pages"] + found["state"] + max(found["activations"], found["logits"])
    return found
