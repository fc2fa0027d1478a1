"""Keys and values of prompts, kept for requests that begin with the same tokens.

In a bidirectional model a token's keys depend on all that stands in its row, so those of another row are not
its own: what is decoded with them may differ. docs/engine.md says by how much.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator

from torch import Tensor

from fastdllm_ext.cache import PagedKVCache

__all__ = ["KeptPrompts"]


class KeptPrompts:
    """Whole pages of prompts as their first refresh left them, the least recently used given back first.

    Args:
        cache: that the pages are of.
    """

    def __init__(self, cache: PagedKVCache) -> None:
        self.cache = cache
        self._kept: OrderedDict[bytes, tuple[int, int]] = (
            OrderedDict()
        )  # (sequence, positions) by their tokens

    def find(self, prompt: Tensor) -> tuple[int, int] | None:
        """The longest beginning of a prompt [P] that is kept: its sequence and positions.

        The prompt's last token is never among them: what reads its logits computes it.
        """
        for key, _ in reversed(list(self._beginnings(prompt[:-1]))):
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        return None

    def keep(self, prompt: Tensor, sequence: int) -> None:
        """Keeps what a sequence holds of a prompt [P], for every beginning of it that is not kept yet."""
        for key, end in self._beginnings(prompt):
            if key not in self._kept:
                self._kept[key] = self.cache.branch(sequence, end, end), end

    def give_back(self) -> bool:
        """Gives the pages of one beginning back; False where none is kept."""
        if not self._kept:
            return False
        self.cache.free(self._kept.popitem(last=False)[1][0])
        return True

    def _beginnings(self, prompt: Tensor) -> Iterator[tuple[bytes, int]]:
        """Of whole pages, the shortest first: a key, and where it ends."""
        size, key = self.cache.page_size, b""
        pages = prompt.cpu().numpy()[: len(prompt) // size * size].reshape(-1, size)
        for number, page in enumerate(pages, 1):
            key = hashlib.sha256(key + page.tobytes()).digest()
            yield key, number * size
