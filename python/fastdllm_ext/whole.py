"""Forwards of whole rows that keep nothing for the next: what the model itself says, without a cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastdllm_ext.cache import PagedKVCache
from fastdllm_ext.forward import Attention, device_of, dtype_of, place_of_keys, whole_rows
from fastdllm_ext.patching.family import Geometry, Parts
from fastdllm_ext.patching.registry import Options, patched_family, patched_options, unwrapped
from fastdllm_ext.runtime import make_runtime

HEAD_ROWS = 1024  # positions whose logits exist at once: 0.5 GB in float32 for 126k tokens


class Scratch(PagedKVCache):
    """Pages that the layers of a device share: each overwrites what the one before has no more need of.

    A forward of whole rows keeps nothing for the next, and keys and values of every layer would be most of
    its memory.
    """

    def __init__(self, geometry: Geometry, parts: Parts, options: Options, num_pages: int) -> None:
        (_, heads, head_dim), dtype, devices = place_of_keys(geometry, parts, options)
        places = list(dict.fromkeys(devices))
        super().__init__(
            len(places),
            heads,
            head_dim,
            num_pages=num_pages,
            dtype=dtype,
            device=places,
        )
        self._place = [places.index(device) for device in devices]
        self.devices = [self.devices[place] for place in self._place]

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """The pages of the layer's device."""
        return super().layer(self._place[index])

    def scales(self, index: int) -> tuple[Tensor | None, Tensor | None]:
        """Those of the layer's device."""
        return super().scales(self._place[index])


class WholeRows:
    """Forwards of whole rows of one model.

    Args:
        model: a patched model, in evaluation mode (``forward.evaluating``) while this is used.
        longest: positions of the longest row.
        at_once: rows of a forward, at most.

    Attributes:
        geometry: the model's.
        device: where rows go in.
    """

    def __init__(self, model: nn.Module, longest: int, at_once: int) -> None:
        family, options, model = patched_family(model), patched_options(model), unwrapped(model)
        parts = family.parts(model)
        self.geometry = family.geometry(model)
        self.device = device_of(parts.embedding)
        self._shift = int(family.shift)
        pages = Scratch(self.geometry, parts, options, PagedKVCache.pages_for([longest] * at_once))
        self._attention = Attention(self.geometry, pages, longest, dtype_of(parts))
        self._runtime = make_runtime(options, family, parts)

    def hidden(self, rows: Sequence[Tensor], positions: Sequence[Tensor]) -> Tensor:
        """[W, hidden] that the logits of some positions of each row come from, row by row.

        Args:
            rows: 1-D int64, masks among them.
            positions: 1-D int64 on the CPU, for each row.
        """
        cache, lengths = self._attention.cache, [len(row) for row in rows]
        sequences = cache.add(lengths)
        wanted = [where - self._shift for where in positions]
        self._attention.attend_over(whole_rows(cache, sequences, lengths, wanted))
        states = self._runtime.hidden(torch.cat(list(rows)).to(self.device), self._attention)
        for sequence in sequences:
            cache.free(sequence)
        return states

    def head(self, states: Tensor) -> Tensor:
        """[R, hidden] -> [R, vocab], which is the caller's to change; :data:`HEAD_ROWS` rows at most."""
        return self._runtime.head(states)
