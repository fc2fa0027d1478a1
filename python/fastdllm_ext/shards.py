"""Tensor parallelism: a model's products, split over the processes of a device mesh as torch's DTensors.

    q, k, v, gate, up, head     by outputs: each process has heads, or a part of the MLP or the vocabulary
    o, down                     by inputs: what the processes find is summed

Norms and the embedding are whole in each. A forward (``runtime/fused.py``) computes with the local shards.
The processes meet at the sums, and to put the logits together, of which all then see the same bits. All take
the same forwards in the same order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastdllm_ext.patching.family import Geometry, Parts

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Group", "group_of", "local", "split", "why_not_split"]


class Group:
    """The processes that share a model's products.

    Args:
        mesh: of the processes.
        vocabulary: outputs of the head.
    """

    def __init__(self, mesh: DeviceMesh, vocabulary: int) -> None:
        self.size, self._vocabulary = mesh.size(), vocabulary
        self._processes = mesh.get_group()

    def sum(self, x: Tensor) -> Tensor:
        """Of all processes, in place."""
        dist.all_reduce(x, group=self._processes)
        return x

    def join(self, x: Tensor) -> Tensor:
        """Logits of all processes, side by side: [R, part] -> [R, vocab]."""
        part = -(-self._vocabulary // self.size)  # as DTensor splits: the last may have less
        x = F.pad(x, (0, part - x.shape[1])).contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x, group=self._processes)
        return torch.cat(parts, dim=1)[:, : self._vocabulary].contiguous()


def group_of(parts: Parts) -> Group | None:
    """Who shares the model's products; None where they are whole."""
    weight: Any = getattr(parts.head, "weight", None)
    return Group(weight.device_mesh, len(weight)) if _is_split(weight) else None


@torch.no_grad()
def local(weight: Any) -> Any:
    """What of a weight is here: all of it, where it is not split."""
    return weight.to_local() if _is_split(weight) else weight


def _is_split(weight: object) -> bool:
    return hasattr(weight, "device_mesh")  # a DTensor, whose module takes long to import


def why_not_split(geometry: Geometry, parts: Parts, size: int) -> str | None:
    """What about a model cannot be split over so many processes; None where there is nothing."""
    layer: Any = parts.layers[0]
    heads = layer.q.out_features // geometry.head_dim
    if heads % size or geometry.num_kv_heads % size:
        return f"the model has {heads} heads, {geometry.num_kv_heads} of keys; takes what divides both"
    if isinstance(parts.head, nn.Embedding):
        return "the model's embedding is its head; takes 1"
    if any(getattr(module, "bias", None) is not None for one in parts.layers for module in (one.o, one.down)):
        return "what is summed over processes has a bias; takes 1"
    return None


@torch.no_grad()
def split(parts: Parts, mesh: DeviceMesh) -> None:
    """Splits a model, which every process of the mesh has whole, and moves it to the mesh's device.

    Weight by weight: what is not of this process is not moved.
    """
    for layer in parts.layers:
        for module in (layer.q, layer.k, layer.v, layer.gate, layer.up):
            _split(module, mesh, 0)
        for module in (layer.o, layer.down):
            _split(module, mesh, 1)
    _split(parts.head, mesh, 0)
    for whole in (parts.embedding, parts.norm, *(n for x in parts.layers for n in (x.attn_norm, x.mlp_norm))):
        whole.to(mesh.device_type)


def _split(module: Any, mesh: DeviceMesh, dim: int) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    for name, weight in list(module.named_parameters(recurse=False)):
        shard = distribute_tensor(weight.detach(), mesh, [Shard(dim)], src_data_rank=None)
        setattr(module, name, nn.Parameter(shard, requires_grad=weight.requires_grad))
