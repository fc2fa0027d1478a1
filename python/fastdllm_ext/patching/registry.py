"""Which models can be patched, and patching itself.

A patch gives a model a method that generates, and notes which family it is. No module, weight or method
of the model's own is touched: a generation runs the model's modules from outside (``forward.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from fastdllm_ext.patching.dream import Dream
from fastdllm_ext.patching.family import Family
from fastdllm_ext.patching.llada import LLaDA

# A family is one file beside this one. They are tried in this order.
FAMILIES: tuple[Family, ...] = (LLaDA(), Dream())

_MARK = "_fastdllm"  # on a patched model: its Patch


# What :class:`Options` may say; the first where nothing is said.
CHOICES = {
    "runtime": ("auto", "fused", "modules"),
    "quantization": ("none", "int8", "fp8"),
    "kv_cache_dtype": ("auto", "fp8"),
}


@dataclass(frozen=True)
class Options:
    """How a patched model's forwards are computed: :func:`fastdllm_ext.patch`."""

    runtime: str = "auto"
    quantization: str = "none"  # of the linear layers
    kv_cache_dtype: str = "auto"  # of the pages


@dataclass
class Patch:
    """What :func:`patch` did to a model, kept on it."""

    family: Family
    replaced: Any = None  # an instance attribute that stood in the place of the method
    options: Options = Options()


def supported_models() -> dict[str, dict[str, str]]:
    """The families that :func:`patch` knows: checkpoints of each, and what of them is verified."""
    return {family.model_type: dict(family.checkpoints) for family in FAMILIES}


def supported_text() -> str:
    """The supported models as a sentence, for error messages."""
    return "Supported: " + "; ".join(f"{name} ({', '.join(ids)})" for name, ids in supported_models().items())


def unwrapped(model: Any) -> Any:
    """The model inside ``torch.compile``'s wrapper; any other as it is."""
    return getattr(model, "_orig_mod", model)


def find_family(model: nn.Module) -> Family:
    """The family of a model.

    Raises:
        TypeError: not a torch module.
        ValueError: no family knows it; the message lists those that are supported, and what was found.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={type(model).__name__}; takes a torch.nn.Module")
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    for family in FAMILIES:
        if str(model_type).lower() == family.model_type and family.recognises(model):
            return family
    raise ValueError(
        f"model={type(model).__name__} with model_type={model_type!r} is not supported. {supported_text()}"
    )


def patch(
    model: nn.Module, methods: Mapping[str, Callable[..., Any]], options: Options = Options()
) -> nn.Module:
    """Gives a model its family's method of ``methods``, and options. Idempotent.

    Raises:
        TypeError, ValueError: not a supported model, or a configuration that its family does not cover;
            the model is then as it was.
    """
    inner = unwrapped(model)
    if not is_patched(inner):
        family = find_family(inner)
        family.geometry(inner)  # refuses what it cannot run, before anything is changed
        family.parts(inner)
        name = family.generate_name
        inner.__dict__[_MARK] = Patch(family, inner.__dict__.get(name))
        inner.__dict__[name] = _bound(methods[name], inner)
    inner.__dict__[_MARK].options = options
    return model


def _bound(function: Callable[..., Any], model: nn.Module) -> Callable[..., Any]:
    """A function as a model's method that can be pickled with the model.

    Of a real method pickle keeps the name, and looks it up in a model that does not yet have it.
    """
    method: Any = partial(function, model)
    method.__self__, method.__doc__ = model, function.__doc__
    return method


def unpatch(model: nn.Module) -> nn.Module:
    """Restores a patched model exactly. A model that is not patched is returned as it is."""
    inner = unwrapped(model)
    if is_patched(inner):
        done: Patch = inner.__dict__.pop(_MARK)
        del inner.__dict__[done.family.generate_name]
        if done.replaced is not None:
            inner.__dict__[done.family.generate_name] = done.replaced
    return model


def is_patched(model: nn.Module) -> bool:
    """Whether :func:`patch` has been applied."""
    return _MARK in getattr(unwrapped(model), "__dict__", {})


def patched_family(model: nn.Module) -> Family:
    """The family of a patched model. ValueError where it is not patched."""
    if not is_patched(model):
        find_family(unwrapped(model))  # an unsupported model is the better complaint
        raise ValueError(f"model={type(model).__name__} is not patched; call fastdllm_ext.patch(model) first")
    return unwrapped(model).__dict__[_MARK].family


def patched_options(model: nn.Module) -> Options:
    """What a patched model's :func:`patch` asked for; the defaults where it is not patched."""
    return unwrapped(model).__dict__[_MARK].options if is_patched(model) else Options()
