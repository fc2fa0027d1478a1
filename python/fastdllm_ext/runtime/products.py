"""The linear layers of a forward: with the model's own weights, or with copies of them in 8 bits.

The copies are made at the first generation and kept beside the model's weights, of which they are rounded
anew when those have changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastdllm_ext import ops
from fastdllm_ext.huge_pages import on_huge_pages

CHUNK = 4096  # rows of a weight that are rounded at a time

# Weights [n, k] that one product has one behind the other, and the biases of each, or none.
Group = tuple[Sequence[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class Product:
    """x W^T + b. With scales W is int8, and its row j is scales[j] times weight[j]."""

    weight: Tensor
    bias: Tensor | None
    scales: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """[T, k] -> [T, n]."""
        return ops.linear(x, self.weight, self.bias, self.scales)

    def silu_mul(self, x: Tensor) -> Tensor:
        """silu(gate) * up of the two halves of n: [T, k] -> [T, n / 2]."""
        return ops.linear_silu_mul(x, self.weight, self.bias, self.scales)

    def tensors(self) -> list[Tensor]:
        """All that it reads."""
        return [t for t in (self.weight, self.bias, self.scales) if t is not None]


class Fp8Product(Product):
    """Rows of W, and of x at every call, are a scale times e4m3 numbers; by torch's scaled matmul."""

    def __call__(self, x: Tensor) -> Tensor:
        """[T, k] -> [T, n]."""
        assert self.scales is not None
        values, scales = ops.quantize_fp8(x)
        weight, of_weight = self.weight.t(), self.scales[None]
        return torch._scaled_mm(values, weight, scales, of_weight, self.bias, out_dtype=x.dtype)

    def silu_mul(self, x: Tensor) -> Tensor:
        """silu(gate) * up of the two halves of n: [T, k] -> [T, n / 2]."""
        return ops.silu_mul(*self(x).chunk(2, dim=-1))


@dataclass(frozen=True)
class Quantization:
    """A way to round weights.

    Attributes:
        product: with rounded weights.
        dtype: of these.
        round: [n, k] -> values [n, k], and scales [n] float32.
        why_not: why a weight cannot be rounded so; None where it can.
        head: whether the head is rounded too.
    """

    product: type[Product]
    dtype: torch.dtype
    round: Callable[[Tensor], tuple[Tensor, Tensor]]
    why_not: Callable[[Tensor], str | None]
    head: bool


def _round_to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    weight = weight.float()
    scales = weight.abs().amax(dim=1) / 127
    return (weight / scales.where(scales != 0, 1.0)[:, None]).round_(), scales


def _why_not_int8(weight: Tensor) -> str | None:
    if weight.device.type == "cuda":
        return f"the model is on {weight.device}; takes the CPU"
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return f"the model is {weight.dtype}; takes float32 and bfloat16"
    if weight.shape[1] > 1 << 16:
        return f"a linear layer has {weight.shape[1]} inputs; takes up to {1 << 16}"
    return None


def _round_to_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    values, scales = ops.quantize_fp8(weight)
    return values, scales[:, 0]


def _why_not_fp8(weight: Tensor) -> str | None:
    if weight.dtype != torch.bfloat16:
        return f"the model is {weight.dtype}; takes bfloat16"
    if any(size % 16 for size in weight.shape):
        return f"a linear layer is {list(weight.shape)}; takes multiples of 16"
    if weight.device.type == "cpu" and torch.__version__ < "2.13":
        return f"torch is {torch.__version__}; on a CPU takes 2.13 or later"
    if weight.is_cuda and torch.cuda.get_device_capability(weight.device) < (9, 0):
        return f"{torch.cuda.get_device_name(weight.device)} is older than Hopper"
    return None


QUANTIZATIONS = {
    "int8": Quantization(Product, torch.int8, _round_to_int8, _why_not_int8, head=True),
    "fp8": Quantization(Fp8Product, torch.float8_e4m3fn, _round_to_fp8, _why_not_fp8, head=False),
}


@dataclass(frozen=True)
class _Made:
    key: tuple[object, ...]
    layers: list[tuple[Product, ...]]


_MADE: WeakKeyDictionary[nn.Module, _Made] = WeakKeyDictionary()


def quantized(owner: nn.Module, name: str, layers: Sequence[Sequence[Group]]) -> list[tuple[Product, ...]]:
    """The products of each layer; made anew where its weights are others, or were changed in place.

    Args:
        owner: a module of the model, with which they are kept.
        name: of ``QUANTIZATIONS``.
        layers: the products of each layer, in the order in which a forward takes them.
    """
    weights = [w for layer in layers for group in layer for w in (*group[0], *group[1])]
    key = (name, *((w.data_ptr(), 0 if w.is_inference() else w._version) for w in weights))
    made = _MADE.get(owner)
    if made is None or made.key != key:
        del made
        forget_quantized(owner)  # before there are two
        _MADE[owner] = made = _Made(key, [_quantize(QUANTIZATIONS[name], layer) for layer in layers])
    return made.layers


def forget_quantized(owner: nn.Module) -> None:
    """Frees what :func:`quantized` keeps with a module."""
    _MADE.pop(owner, None)


@torch.no_grad()
def _quantize(how: Quantization, layer: Sequence[Group]) -> tuple[Product, ...]:
    """The weights lie in one stretch of memory, in the order of the products."""
    every = [w for weights, _ in layer for w in weights]
    whole = torch.empty(sum(w.numel() for w in every), dtype=how.dtype, device=every[0].device)
    rest, products = on_huge_pages(whole), []
    for weights, biases in layer:
        rows, columns = sum(map(len, weights)), weights[0].shape[1]
        place, rest = rest[: rows * columns].view(rows, columns), rest[rows * columns :]
        parts, scales = [part for w in weights for part in w.split(CHUNK)], []
        for part, to in zip(parts, place.split([*map(len, parts)]), strict=True):
            values, scale = how.round(part)
            to.copy_(values)
            scales.append(scale)
        products.append(how.product(place, torch.cat(list(biases)) if biases else None, torch.cat(scales)))
    return tuple(products)
