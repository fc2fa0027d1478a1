"""What an engine takes: a request is checked before it is submitted, which needs no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastdllm_ext.arguments import (
    append_masks,
    check_settings,
    check_tokens,
    read_prompts,
    row_seeds,
    with_token_ids,
)
from fastdllm_ext.cache import PagedKVCache
from fastdllm_ext.decoder import Common
from fastdllm_ext.decoding import GenerationConfig
from fastdllm_ext.patching.family import Family, Geometry
from fastdllm_ext.rows import DecodingRow

__all__ = ["Admission", "RequestTooLong"]


class RequestTooLong(ValueError):
    """Prompt and answer need more positions than the model, or the pages, have."""


@dataclass(frozen=True)
class Admission:
    """Of an engine.

    Attributes:
        family, geometry: of its model.
        num_pages, page_size: of its cache.
    """

    family: Family
    geometry: Geometry
    num_pages: int
    page_size: int

    @property
    def longest(self) -> int:
        """Positions, prompt and answer together, that a request may have."""
        return min(self.geometry.max_positions, self.num_pages * self.page_size)

    def row(
        self, input_ids: Tensor | Sequence[int], config: GenerationConfig, stream: int
    ) -> tuple[DecodingRow, Common]:
        """A request's row, checked, and what it has in common with others.

        Raises:
            TypeError, ValueError: as :func:`fastdllm_ext.generate` raises them. RequestTooLong.
        """
        geometry = with_token_ids(self.geometry, config)
        (prompt,) = read_prompts([as_tensor(input_ids)], None, geometry, torch.device("cpu"))
        check_tokens([prompt], geometry, self.family, config.infill)
        (tokens,) = [prompt] if config.infill else append_masks([prompt], config, geometry)
        if len(tokens) > self.longest:
            raise RequestTooLong(
                f"input_ids: {len(tokens)} positions, {len(tokens) - len(prompt)} of them gen_length; "
                f"takes {self.longest} together"
            )
        check_settings(self.family, geometry, config, [prompt], [tokens], None)
        if not geometry.eos_ids:
            config = replace(config, stop_on_eos=False)
        key, first = row_seeds(config, 1)[0]
        row = DecodingRow.of(tokens, config, (key, first + stream), geometry.mask_id)
        pages = PagedKVCache.pages_for(row.page_lengths(self.family.shift, self.page_size), self.page_size)
        if pages > self.num_pages:
            raise RequestTooLong(f"input_ids: needs {pages} pages; num_pages={self.num_pages}")
        return row, Common.of(geometry, config)


def as_tensor(input_ids: Tensor | Sequence[int]) -> Tensor:
    """A prompt on the CPU, its dtype as it came. TypeError for a list of anything but ints."""
    if isinstance(input_ids, Tensor):
        return input_ids.cpu()
    ids = list(input_ids)
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int):
            raise TypeError(f"input_ids holds {token!r}; takes ints")
        if not -(2**63) <= token < 2**63:
            raise ValueError(f"input_ids holds token {token}; takes those of the vocabulary")
    return torch.tensor(ids, dtype=torch.int64)
