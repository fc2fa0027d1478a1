"""What a model family is: how to recognise it, how to run its parts, and what its layers attend through."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastdllm_ext import ops
from fastdllm_ext.cache import PagedKVCache
from fastdllm_ext.rope import rope_table

LAYER = "_fastdllm_layer"  # on a patched attention module: its layer's number


@dataclass(frozen=True)
class Geometry:
    """What the decoding loop must know about a model."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rope_theta: float
    mask_id: int
    eos_ids: tuple[int, ...]
    pad_id: int


@dataclass(frozen=True)
class Layout:
    """One ragged forward: T query tokens of B sequences, and where their keys lie (see ``ops``)."""

    positions: Tensor  # [T] int64
    slots: Tensor  # [T] int64
    block_table: Tensor  # [B, max_blocks] int32
    kv_lens: Tensor  # [B] int32
    cu_seqlens_q: Tensor  # [B + 1] int32
    max_seqlen_q: int


class Attention:
    """The attention of a running generation: RoPE, write to pages, attend over pages."""

    def __init__(self, geometry: Geometry, cache: PagedKVCache) -> None:
        self.geometry = geometry
        self.cache = cache
        self.layout: Layout | None = None
        self.cos, self.sin = rope_table(
            geometry.max_positions, geometry.head_dim, geometry.rope_theta, cache.storage.device
        )

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, heads * head_dim], k and v [T, kv_heads * head_dim] -> [T, heads * head_dim]."""
        assert self.layout is not None
        at, g = self.layout, self.geometry
        q, k, v = (x.unflatten(-1, (-1, g.head_dim)) for x in (q, k, v))
        k_pages, v_pages = self.cache.layer(layer)
        q = ops.rope_write_kv(q, k, v, self.cos, self.sin, at.positions, at.slots, k_pages, v_pages)
        out = ops.paged_attention(
            q,
            k_pages,
            v_pages,
            at.block_table,
            at.kv_lens,
            at.cu_seqlens_q,
            at.max_seqlen_q,
            g.head_dim**-0.5,
        )
        return out.flatten(-2)


_running: ContextVar[Attention | None] = ContextVar("fastdllm_attention", default=None)


def running_attention() -> Attention | None:
    """The attention of the generation that runs in this thread, for a family's patched method."""
    return _running.get()


@contextmanager
def attending(attention: Attention) -> Iterator[None]:
    """Within it, patched modules attend through ``attention``."""
    token = _running.set(attention)
    try:
        yield
    finally:
        _running.reset(token)


class Family(ABC):
    """One model family: how to recognise it, and how to run its parts.

    ``model`` is an ``nn.Module`` with a ``config``; its other attributes are the family's business.

    Attributes:
        name: as ``config.model_type`` says it, in lower case.
        checkpoints: published models of the family.
        needs_prompt: whether the first generated position needs one before it.
        generate_name: the model's method that a patch provides.
    """

    name: str
    checkpoints: tuple[str, ...]
    needs_prompt: bool = False
    generate_name: str = "generate"

    @abstractmethod
    def recognises(self, model: Any) -> bool:
        """Whether the model's modules are this family's (its ``model_type`` already is)."""

    @abstractmethod
    def geometry(self, model: Any) -> Geometry:
        """Sizes and token ids. ValueError where the configuration asks for what the family does not do."""

    @abstractmethod
    def methods(self, model: Any) -> list[tuple[nn.Module, str, Callable[..., Any]]]:
        """For each layer the module, the method's name, and the function to set there."""

    @abstractmethod
    def hidden(self, model: Any, input_ids: Tensor) -> Tensor:
        """[T] int64 -> [T, hidden] after the final norm, attending through ``running_attention``."""

    @abstractmethod
    def logits(self, model: Any, hidden: Tensor) -> Tensor:
        """[R, hidden] -> [R, vocab]."""


def layer_number(module: nn.Module) -> int:
    """The layer of a patched attention module."""
    return module.__dict__[LAYER]
