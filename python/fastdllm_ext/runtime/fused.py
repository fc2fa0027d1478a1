"""A forward through fused operations, from the model's own weights.

    n = rms_norm(x)                                   of the first layer
    for each layer:
        q, k, v = split(qkv n)                        one product
        a = attention(rope(q), rope(k), v)            rotation and write to pages in one
        x += o a;  n = rms_norm(x)                    sum and norm in one
        x += down(silu(gate n) * (up n));  n = rms_norm(x)     of the next layer, or the final one

Of a model that is split (``shards.py``) each process has a part of every product, and what o and down give is
summed.

The last layer's attention, and all that follows it, is computed for the outputs that are wanted alone: at a
refresh these are few of the row's positions. What is as wide as the MLP exists for `CHUNK` tokens at a time,
so that a long row needs little more memory than its residual stream and queries.

Every value is rounded where the modules round it: the two runtimes differ by the order of sums alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fastdllm_ext import ops
from fastdllm_ext.forward import Attention
from fastdllm_ext.patching.family import Family, Layer, Parts
from fastdllm_ext.runtime.products import QUANTIZATIONS, Group, Product, forget_quantized, quantized
from fastdllm_ext.runtime.weights import join, part
from fastdllm_ext.runtime.widths import Widths
from fastdllm_ext.shards import group_of, local

CHUNK = 4096


@dataclass(frozen=True)
class Norm:
    """The weight and eps of an RMSNorm."""

    weight: Tensor
    eps: float


class Fused:
    """See ``Runtime``. Takes a model of which :func:`why_not_fused` has nothing to say."""

    def __init__(self, family: Family, parts: Parts, quantization: str = "none") -> None:
        def norm(module: Any) -> Norm:
            return Norm(module.weight, getattr(module, family.rms_norms[type(module).__name__]))

        self.embedding: Any = parts.embedding
        self.products: list[tuple[Product, ...]]
        if quantization == "none":
            self.products = [_join(groups) for groups in _groups(parts)]
        else:
            self.products = _quantized(parts, quantization)
        self.mlp_norms = [norm(layer.mlp_norm) for layer in parts.layers]
        # The norm before each layer's attention, and the one after the last layer.
        self.norms = [*(norm(layer.attn_norm) for layer in parts.layers), norm(parts.norm)]
        first: Any = parts.layers[0]
        self.widths = [len(local(module.weight)) for module in (first.q, first.k, first.v)]
        self.group = group_of(parts)

    def head(self, hidden: Tensor) -> Tensor:
        """[R, hidden] -> [R, vocab]."""
        logits = self.products[-1][-1](hidden)
        return logits if self.group is None else self.group.join(logits)

    def _sum(self, x: Tensor) -> Tensor:
        """Of what all processes of a split model found."""
        return x if self.group is None else self.group.sum(x)

    @cached_property
    def addresses(self) -> tuple[int, ...]:
        """Of all weights that a forward reads."""
        products = [t for layer in self.products for p in layer for t in p.tensors()]
        norms = [n.weight for n in (*self.norms, *self.mlp_norms)]
        return tuple(w.data_ptr() for w in (self.embedding.weight, *products, *norms))

    def hidden(self, input_ids: Tensor, attend: Attention) -> Tensor:
        """[T] int64 -> [W, hidden] after the final norm."""
        x = self.embedding(input_ids)
        first = self.norms[0]
        q = _gather(
            self._queries(attend, 0, ops.rms_norm(x[rows], first.weight, first.eps), rows)
            for rows in _chunks(x)
        )
        for i in range(len(self.products)):
            is_last = i == len(self.products) - 1
            if is_last:
                wanted = attend.layout.wanted
                q, x = q[wanted], x[wanted]
            a = attend.read(i, q, wanted=is_last)
            del q  # or the largest moment would hold it too
            q = _gather(self._layer(attend, i, a, x, rows) for rows in _chunks(x))
            del a
        return q

    def _queries(self, attend: Attention, i: int, n: Tensor, rows: slice) -> Tensor:
        """Stores keys and values of layer i from the norm of its input; its queries."""
        qkv = self.products[i][0]
        q, k, v = qkv(n).split(self.widths, dim=-1)
        return attend.write(i, q, k, v, rows)

    def _layer(self, attend: Attention, i: int, a: Tensor, x: Tensor, rows: slice) -> Tensor:
        """What follows the attention of layer i, for some rows of x: changes them; the next layer's queries.

        After the last layer: the final norm.
        """
        _, o, gate_up, down, *_ = self.products[i]
        norm, after, x = self.mlp_norms[i], self.norms[i + 1], x[rows]
        n = ops.add_rms_norm(self._sum(o(a[rows])), x, norm.weight, norm.eps)
        n = gate_up.silu_mul(n)
        n = ops.add_rms_norm(self._sum(down(n)), x, after.weight, after.eps)
        return n if i == len(self.products) - 1 else self._queries(attend, i + 1, n, rows)

    @staticmethod
    def activation_bytes(widths: Widths, tokens: int) -> int:
        """At the peak of a forward."""
        w, chunk = widths, min(tokens, CHUNK)
        project = w.hidden + 2 * w.q + 2 * w.kv  # the norm, q, k and v in one, q rotated
        # Of all tokens x, and what attention found; of the chunks before the last, the next layer's queries.
        layer = tokens * (w.hidden + w.q) + (tokens - chunk) * w.q
        layer += chunk * max(w.hidden + 3 * w.inner, 2 * w.hidden + w.inner, project)
        gather = tokens * (w.hidden + 3 * w.q) if tokens > chunk else 0
        return w.size * max(layer, gather)


def _groups(parts: Parts) -> Iterator[list[list[Any]]]:
    """The modules of each product of each layer, in the order in which a forward runs them; last the head."""
    for i, layer in enumerate(parts.layers):
        groups = [[layer.q, layer.k, layer.v], [layer.o], [layer.gate, layer.up], [layer.down]]
        yield [*groups, [parts.head]] if i == len(parts.layers) - 1 else groups


def _join(groups: list[list[Any]]) -> tuple[Product, ...]:
    """Products whose weights lie behind one another, and then their biases."""
    joined = iter(join(_parameters(groups)))
    weights = [next(joined) for _ in groups]
    has_bias = [getattr(group[0], "bias", None) is not None for group in groups]
    return tuple(
        Product(w, next(joined) if found else None) for w, found in zip(weights, has_bias, strict=True)
    )


def _quantized(parts: Parts, name: str) -> list[tuple[Product, ...]]:
    """Products with rounded weights; the head with its own where the quantisation leaves it alone."""
    products, head = list(quantized(parts.embedding, name, _to_round(parts, name))), parts.head
    if not QUANTIZATIONS[name].head:
        weight: Any = head.weight
        bias: Any = getattr(head, "bias", None)
        products[-1] = (*products[-1], Product(local(weight).detach(), None if bias is None else local(bias)))
    return products


def _to_round(parts: Parts, name: str) -> list[list[Group]]:
    """The weights and the biases of each product that a quantisation rounds, layer by layer."""
    layers = list(_groups(parts))
    if not QUANTIZATIONS[name].head:
        layers[-1] = layers[-1][:-1]
    return [
        [
            (
                [local(m.weight) for m in g],
                [local(m.bias) for m in g if getattr(m, "bias", None) is not None],
            )
            for g in groups
        ]
        for groups in layers
    ]


def _parameters(groups: list[list[Any]]) -> list[list[Tensor]]:
    """The weights of each group, then the biases of those that have them; None where there is none."""
    biased = [group for group in groups if getattr(group[0], "bias", None) is not None]
    return [[local(getattr(m, "weight", None)) for m in group] for group in groups] + [
        [local(m.bias) for m in group] for group in biased
    ]  # type: ignore[arg-type]


def _chunks(x: Tensor) -> Iterator[slice]:
    return (slice(begin, begin + CHUNK) for begin in range(0, len(x), CHUNK))


def _gather(parts: Iterator[Tensor]) -> Tensor:
    found = list(parts)
    return found[0] if len(found) == 1 else torch.cat(found)


def part_weights(parts: Parts) -> None:
    """Gives every parameter that :class:`Fused` joined with others memory of its own again.

    Frees the copies of fewer bits.
    """
    forget_quantized(parts.embedding)
    for groups in _groups(parts):
        found = _parameters(groups)
        if all(type(p) is nn.Parameter for p in chain(*found)):
            part(found)


def why_not_quantized(name: str, parts: Parts) -> str | None:
    """What about the model's weights a quantisation cannot do; None where there is nothing."""
    weights = [w for layer in _to_round(parts, name) for weights, _ in layer for w in weights]
    return next(filter(None, map(QUANTIZATIONS[name].why_not, weights)), None)


def why_not_fused(family: Family, parts: Parts) -> str | None:
    """What about the model, as it is now, the fused runtime cannot do; None where there is nothing."""
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return "torch has global forward hooks"
    layers = [{f.name: getattr(layer, f.name) for f in fields(Layer)} for layer in parts.layers]
    norms = [parts.norm, *(layer[name] for layer in layers for name in ("attn_norm", "mlp_norm"))]
    linear = [layer[name] for layer in layers for name in ("q", "k", "v", "o", "gate", "up", "down")]
    tied = [parts.head] if isinstance(parts.head, nn.Embedding) else []
    linear += [parts.head] if not tied else []
    for module in norms:
        is_known = type(module).__name__ in family.rms_norms and not isinstance(module, nn.RMSNorm)
        if (
            not is_known
            or getattr(module, "weight", None) is None
            or getattr(module, "bias", None) is not None
        ):
            return f"{_name(module)} is not one of the norms {', '.join(family.rms_norms)}"
    for module in linear:
        if type(module) is not nn.Linear:
            return f"{_name(module)} stands in the place of torch.nn.Linear"
    for module in (parts.embedding, parts.head, *norms, *linear):
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return f"a {_name(module)} has a hook, or a forward of its own"
    weights = [
        p for module in (*norms, *linear, *tied) for p in (module.weight, getattr(module, "bias", None))
    ]
    found = [local(p) for p in weights if p is not None]
    for p in found:
        if type(p.data) is not Tensor or not p.is_contiguous():
            return "a weight is not a plain contiguous tensor"
        if p.device.type == "cpu" and p.is_shared():
            return "its weights are shared between processes"
    if len({id(p) for p in found}) < len(found):
        return "a weight serves in two places"
    if len({(p.dtype, p.device) for p in found}) > 1:
        return "its weights have several dtypes or devices"
    for layer in layers:
        for names in (("q", "k", "v"), ("gate", "up")):
            if len({layer[name].bias is None for name in names}) > 1:
                return f"of {', '.join(names)} some have a bias and some have none"
    return None


def _name(module: object) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
