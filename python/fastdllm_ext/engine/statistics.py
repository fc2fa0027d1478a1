"""What an engine counts."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["EngineStats"]


@dataclass
class EngineStats:
    """State now, and counters since the engine's start.

    Attributes:
        queued, running: requests that wait, and that hold pages.
        num_pages, free_pages, peak_pages: of the cache: all, free now, most ever used.
        finished, cancelled, failed: requests that have ended so.
        put_aside: times that a request gave its pages up to be continued later.
        shared_refreshes: forwards of rows that were read off another's.
        reused_tokens: of prompts, whose keys were taken over from earlier ones.
        prompt_tokens, tokens: of finished requests; the latter are answers, up to and including EOS.
        nfe: forwards of finished requests, each counted for itself.
        forwards: of the model, in which any number of rows took part.
        row_forwards: the rows that took part in them, those lost when a request was put aside included.
        blocks: filled.
        queue_seconds, first_block_seconds, request_seconds: sums over finished requests.
        block_seconds: sum over the blocks of finished requests.
        busy_seconds: in turns.
    """

    queued: int = 0
    running: int = 0
    num_pages: int = 0
    free_pages: int = 0
    peak_pages: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    put_aside: int = 0
    shared_refreshes: int = 0
    reused_tokens: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    nfe: int = 0
    forwards: int = 0
    row_forwards: int = 0
    blocks: int = 0
    queue_seconds: float = 0.0
    first_block_seconds: float = 0.0
    request_seconds: float = 0.0
    block_seconds: float = 0.0
    busy_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens of finished requests for each second of work."""
        return self.tokens / self.busy_seconds if self.busy_seconds else 0.0

    @property
    def tokens_per_forward(self) -> float:
        """Of finished requests, each counted for itself."""
        return self.tokens / self.nfe if self.nfe else 0.0

    @property
    def summary(self) -> str:
        """In a few words."""
        return f"{self.tokens_per_second:.0f} tokens/s, {self.tokens_per_forward:.1f} tokens/forward"

    @property
    def rows_per_forward(self) -> float:
        """How many rows share a forward."""
        return self.row_forwards / self.forwards if self.forwards else 0.0
