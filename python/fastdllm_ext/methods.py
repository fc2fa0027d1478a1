"""Patching: the methods that a family's models get, and the runtime that computes their forwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from fastdllm_ext.diffusion_generate import diffusion_generate
from fastdllm_ext.generate import generate
from fastdllm_ext.patching import registry
from fastdllm_ext.runtime import choose_runtime, forget_quantized, part_weights

METHODS: dict[str, Callable[..., Any]] = {"generate": generate, "diffusion_generate": diffusion_generate}


def patch(
    model: nn.Module,
    *,
    runtime: Literal["auto", "fused", "modules"] | None = None,
    quantization: Literal["none", "int8", "fp8"] | None = None,
    kv_cache_dtype: Literal["auto", "fp8"] | None = None,
) -> nn.Module:
    """Makes a model generate fast; its own call keeps working, bit for bit. Idempotent.

    Of every option None is the first that is named, or what an earlier patch of this model said.

    Args:
        model: a LLaDA or Dream model: ours (:func:`fastdllm_ext.load`), the Hub's remote code, or NVlabs'
            copy; also inside ``torch.compile``'s wrapper.
        runtime: how a generation computes its forwards. ``modules``: through the model's own modules.
            ``fused``: through fused operations on their weights, of which those of q, k and v, and those of
            gate and up, then lie behind one another in memory (the same parameters, no second copy).
            ``auto``: fused where the model is made of plain linear layers and norms, without hooks, adapters
            or quantisation; else modules; what it is is looked at anew in each generation. Both runtimes give
            the same tokens but where two choices lie closer than the rounding of sums in another order:
            rarely in float32, more often in bfloat16.
        quantization: of the linear layers' weights, in copies that the first generation makes and keeps
            beside the model's own: a byte a number. ``int8``: on the CPU; whole numbers and a scale for each
            output, x as it is. ``fp8``: on CUDA from Hopper on (a CPU computes it slowly), for bfloat16;
            e4m3 numbers and a scale for each output, x so too at every product; the head stays what it is.
            Needs what the fused runtime needs. A generation sees by itself that weights have moved, or were
            changed in place; what was changed through ``.data`` it sees when a quantization is named again.
            What it gains and costs: docs/precision.md.
        kv_cache_dtype: what generations and likelihoods keep keys and values in. ``auto``: the model's dtype.
            ``fp8``: 8 bits a number (e4m3) and a float32 scale for each head's key and value, with head_dim
            128 together 52 % of bfloat16's memory; so much less is read by the attention of a block step,
            too. It gains where keys and values are many beside the weights: large batches, long rows, models
            without grouped queries. It does not where a step's bytes are mostly weights, nor in refreshes,
            whose attention is bound by arithmetic. It costs accuracy: each number is off by up to 1/16 of
            itself, or more below 1/28,000 of the largest in its vector. Keys with channels far larger than
            the others, as the biases of Qwen2.5's keys make them, and so Dream's, lose most, for all share
            one scale: measure your own model with and without. A generation's ``kv_cache`` counts before
            this.

    Returns:
        The same model. LLaDA has a method ``generate`` with :func:`generate`'s arguments, Dream
        :func:`diffusion_generate`.

    Raises:
        TypeError, ValueError: not a supported model, or a configuration that its family does not cover;
            the message lists what is supported. An option that is not one of these; ``fused`` or a
            quantization where the model is not made for it. The model is then as it was.
    """
    asked = {"runtime": runtime, "quantization": quantization, "kv_cache_dtype": kv_cache_dtype}
    said = {name: choice for name, choice in asked.items() if choice is not None}
    for name, choice in said.items():
        if choice not in registry.CHOICES[name]:
            raise ValueError(f"{name}={choice!r}; takes one of {', '.join(registry.CHOICES[name])}")
    options = replace(registry.patched_options(model), **said)
    if said:
        inner = registry.unwrapped(model)
        family = registry.find_family(inner)
        parts = family.parts(inner)
        choose_runtime(options, family, parts)
        if quantization is not None:
            forget_quantized(parts.embedding)
    return registry.patch(model, METHODS, options)


def unpatch(model: nn.Module) -> nn.Module:
    """Restores a patched model exactly. A model that is not patched is returned as it is."""
    if registry.is_patched(model):
        part_weights(registry.patched_family(model).parts(registry.unwrapped(model)))
    return registry.unpatch(model)
