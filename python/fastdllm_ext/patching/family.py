"""What a model family is: how to recognise it, where its parts are, and how its logits are read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn


@dataclass(frozen=True)
class Geometry:
    """What the decoding loop must know about a model.

    Attributes:
        rounded_rope: cosines and sines are rounded to the activations' dtype before use.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rope_theta: float
    mask_id: int
    eos_ids: tuple[int, ...]
    pad_id: int
    rounded_rope: bool = False


@dataclass(frozen=True)
class Layer:
    """The modules of one layer, by their part in

    x = x + o(attention(rope(q(n)), rope(k(n)), v(n)))     n = attn_norm(x)
    x = x + down(silu(gate(n)) * up(n))                    n = mlp_norm(x)
    """

    attn_norm: nn.Module
    q: nn.Module
    k: nn.Module
    v: nn.Module
    o: nn.Module
    mlp_norm: nn.Module
    gate: nn.Module
    up: nn.Module
    down: nn.Module


@dataclass(frozen=True)
class Parts:
    """A model's own modules, in the order in which a forward runs them.

    The head may be the embedding, whose weight then serves twice.
    """

    embedding: nn.Module
    layers: tuple[Layer, ...]
    norm: nn.Module
    head: nn.Module


class Family(ABC):
    """One model family. ``model`` is an ``nn.Module`` with a ``config``.

    Attributes:
        model_type: as ``config.model_type`` says it, in lower case.
        checkpoints: published models of the family, each with what of it is verified.
        needs_prompt: whether the first generated position needs a token before it.
        shift: the logits of a position come from the output of the position before it.
        samples_first: confidence is taken after temperature, top-p and top-k; without it, temperature
            is noise on the candidate alone and there is no top-p or top-k.
        generate_name: the model's method that a patch provides.
        rms_norms: classes of norm modules that compute what ``ops.rms_norm`` does, by name, and the attribute
            of each that holds eps.
    """

    model_type: str
    checkpoints: ClassVar[Mapping[str, str]]
    needs_prompt: bool = False
    shift: bool = False
    samples_first: bool = False
    generate_name: str = "generate"
    rms_norms: ClassVar[Mapping[str, str]]

    @abstractmethod
    def recognises(self, model: Any) -> bool:
        """Whether the model's modules are this family's (its ``model_type`` already is)."""

    @abstractmethod
    def geometry(self, model: Any) -> Geometry:
        """Sizes and token ids. ValueError where the configuration asks for what the family does not do."""

    @abstractmethod
    def parts(self, model: Any) -> Parts:
        """The model's modules."""


def require(family: Family, config: Any, official: Mapping[str, Any]) -> None:
    """ValueError that names a key of the configuration without its official value; absent is official."""
    for key, value in official.items():
        found = getattr(config, key, None)
        found = getattr(found, "value", found)  # an enum, in some copies
        if found is not None and found != value:
            raise ValueError(
                f"model: {key}={found!r} is not supported for {family.model_type}; takes {value!r}"
            )


def special_tokens(model: Any) -> dict[str, Any]:
    """``mask_id``, ``eos_ids`` and ``pad_id``: the generation configuration's, else the configuration's.

    The pad id is the first EOS where there is none.
    """

    def token(name: str) -> Any:
        for config in (getattr(model, "generation_config", None), model.config):
            value = getattr(config, name, None)
            if value is not None:
                return value
        return None

    eos = token("eos_token_id")
    eos_ids = tuple(map(int, eos if isinstance(eos, (list, tuple)) else [] if eos is None else [eos]))
    pad = token("pad_token_id")
    mask = token("mask_token_id")
    if mask is None:
        raise ValueError("model: its configuration has no mask_token_id")
    return {
        "mask_id": int(mask),
        "eos_ids": eos_ids,
        "pad_id": int(pad) if pad is not None else (*eos_ids, 0)[0],
    }
