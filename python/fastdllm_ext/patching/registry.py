"""Which models can be patched, and patching itself.

Patching sets methods on the model's own modules, as instance attributes that fall through to the
class's method unless a generation of ours is running. No weight and no module is touched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import nn

from fastdllm_ext.patching.family import LAYER, Family
from fastdllm_ext.patching.llada import LLaDA

# A family is one file beside this one. They are tried in this order.
FAMILIES: tuple[Family, ...] = (LLaDA(),)

_MARK = "_fastdllm"  # on a patched model: its Patch


@dataclass
class Patch:
    """What :func:`patch` did to a model, kept on it."""

    family: Family
    replaced_generate: Any = None  # an instance attribute that stood in its place


def supported_models() -> dict[str, tuple[str, ...]]:
    """The families that :func:`patch` knows, each with its published checkpoints."""
    return {family.name: family.checkpoints for family in FAMILIES}


def supported_text() -> str:
    """The supported models as a sentence, for error messages."""
    return "Supported: " + "; ".join(f"{name} ({', '.join(ids)})" for name, ids in supported_models().items())


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
        if str(model_type).lower() == family.name and family.recognises(model):
            return family
    raise ValueError(
        f"model={type(model).__name__} with model_type={model_type!r} is not supported. {supported_text()}"
    )


def patch(model: nn.Module, generate: Callable[..., Any]) -> nn.Module:
    """Sets the family's methods on a model, and ``generate`` as its method. Idempotent.

    Raises:
        TypeError, ValueError: not a supported model, or a configuration that its family does not cover;
            the model is then as it was.
    """
    if is_patched(model):
        return model
    family = find_family(model)
    family.geometry(model)  # refuses what it cannot run, before anything is changed
    for layer, (module, name, function) in enumerate(family.methods(model)):
        module.__dict__[LAYER] = layer
        module.__dict__[name] = MethodType(function, module)
    model.__dict__[_MARK] = Patch(family, model.__dict__.get(family.generate_name))
    model.__dict__[family.generate_name] = MethodType(generate, model)
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Restores a patched model exactly. A model that is not patched is returned as it is."""
    if not is_patched(model):
        return model
    done: Patch = model.__dict__.pop(_MARK)
    for module, name, _ in done.family.methods(model):
        del module.__dict__[name], module.__dict__[LAYER]
    del model.__dict__[done.family.generate_name]
    if done.replaced_generate is not None:
        model.__dict__[done.family.generate_name] = done.replaced_generate
    return model


def is_patched(model: nn.Module) -> bool:
    """Whether :func:`patch` has been applied."""
    return _MARK in getattr(model, "__dict__", {})


def patched_family(model: nn.Module) -> Family:
    """The family of a patched model. ValueError where it is not patched."""
    if not is_patched(model):
        find_family(model)  # an unsupported model is the better complaint
        raise ValueError(f"model={type(model).__name__} is not patched; call fastdllm_ext.patch(model) first")
    return model.__dict__[_MARK].family
