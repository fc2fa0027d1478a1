"""Numbers for Prometheus, in a registry of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fastdllm_ext.serve.answers import Answer
from fastdllm_ext.serve.logs import Record

if TYPE_CHECKING:
    from fastdllm_ext.engine import EngineStats

__all__ = ["Metrics"]

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)
TOKENS_PER_FORWARD = (0.25, 0.5, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32)

# Field of EngineStats, or of ClusterStats: name, and what it is.
GAUGES = {
    "queued": ("fastdllm_answers_queued", "Answers that wait"),
    "running": ("fastdllm_answers_running", "Answers that hold pages"),
    "num_pages": ("fastdllm_pages", "Pages of keys and values"),
    "free_pages": ("fastdllm_pages_free", "Pages that no answer holds"),
    "replicas": ("fastdllm_replicas", "Replicas that are alive"),
}
COUNTERS = {
    "finished": ("fastdllm_answers_finished", "Answers that came to their end"),
    "cancelled": ("fastdllm_answers_cancelled", "Answers that were given up, at stop strings too"),
    "failed": ("fastdllm_answers_failed", "Answers that failed"),
    "put_aside": ("fastdllm_preemptions", "Times that an answer gave its pages up to be continued later"),
    "forwards": ("fastdllm_forwards", "Forwards of the model, in which any number of answers took part"),
}


class Metrics:
    """Counts requests and answers; reads the engine when it is asked.

    Args:
        engine: its statistics; None while there are none.
    """

    def __init__(self, engine: Callable[[], EngineStats | None]) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, words: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"fastdllm_{name}", words, labels, registry=self.registry)

        def histogram(
            name: str, words: str, labels: tuple[str, ...] = (), buckets: tuple[float, ...] = SECONDS
        ) -> Histogram:
            return Histogram(f"fastdllm_{name}", words, labels, registry=self.registry, buckets=buckets)

        self.requests = counter(
            "requests", "HTTP requests; status 499: the client left", ("endpoint", "status")
        )
        self.seconds = histogram("request_seconds", "Of an HTTP request", ("endpoint",))
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts")
        self.tokens = counter("tokens", "Tokens of answers, end of text included")
        self.nfe = counter("nfe", "Forwards of answers, each counted for itself")
        self.first_block = histogram("first_block_seconds", "From an answer's submission to its first block")
        self.block = histogram("block_seconds", "Of each block of an answer, from the one before")
        self.density = histogram("tokens_per_forward", "Of an answer", buckets=TOKENS_PER_FORWARD)
        self.registry.register(_EngineCollector(engine))

    def request(self, record: Record) -> None:
        """An HTTP request has ended."""
        self.requests.labels(record.endpoint, str(record.status)).inc()
        self.seconds.labels(record.endpoint).observe(record.seconds)

    def answers(self, prompt_tokens: int, answers: Sequence[Answer]) -> None:
        """A request's answers have ended, at their end or before."""
        self.prompt_tokens.inc(prompt_tokens)
        for answer in answers:
            self.tokens.inc(answer.tokens)
            self.nfe.inc(answer.nfe)
            for begin, end in zip([0.0, *answer.blocks], answer.blocks, strict=False):
                (self.block if begin else self.first_block).observe(end - begin)
            if answer.finish_reason is not None:
                self.density.observe(answer.tokens / answer.nfe)

    def text(self) -> bytes:
        """All of it, in Prometheus's text format."""
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    def __init__(self, engine: Callable[[], EngineStats | None]) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        stats = self._engine()
        if stats is None:
            return
        for field, (name, words) in GAUGES.items():
            if hasattr(stats, field):
                yield GaugeMetricFamily(name, words, value=getattr(stats, field))
        for field, (name, words) in COUNTERS.items():
            yield CounterMetricFamily(name, words, value=getattr(stats, field))
