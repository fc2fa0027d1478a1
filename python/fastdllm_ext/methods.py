"""Patching: the methods that a family's models get."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fastdllm_ext.diffusion_generate import diffusion_generate
from fastdllm_ext.generate import generate
from fastdllm_ext.patching import registry

METHODS: dict[str, Callable[..., Any]] = {"generate": generate, "diffusion_generate": diffusion_generate}


def patch(model: nn.Module) -> nn.Module:
    """Makes a model generate fast; its own call keeps working, bit for bit. Idempotent.

    Args:
        model: a LLaDA or Dream model: ours (:func:`fastdllm_ext.load`), the Hub's remote code, or NVlabs'
            copy; also inside ``torch.compile``'s wrapper.

    Returns:
        The same model. LLaDA has a method ``generate`` with :func:`generate`'s arguments, Dream
        :func:`diffusion_generate`.

    Raises:
        TypeError, ValueError: not a supported model, or a configuration that its family does not cover;
            the message lists what is supported. The model is then as it was.
    """
    return registry.patch(model, METHODS)
