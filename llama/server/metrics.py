"""What a server counts and measures, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Metrics:
    """The numbers of one server."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("llama_requests", "Requests by path and status", ["path", "status"], registry=registry)
        self.prompt_tokens = Counter("llama_prompt_tokens", "Ids of prompts", registry=registry)
        self.cached_tokens = Counter("llama_cached_tokens", "Ids of prompts that the cache held", registry=registry)
        self.generated_tokens = Counter("llama_generated_tokens", "Ids that were generated", registry=registry)
        self.first = Histogram("llama_first_token_seconds", "Until the first text", buckets=SECONDS, registry=registry)
        self.gap = Histogram("llama_gap_seconds", "Between two pieces of a stream", buckets=SECONDS, registry=registry)
        self.whole = Histogram("llama_request_seconds", "Whole requests", ["path"], buckets=SECONDS, registry=registry)
        self.running = Gauge("llama_answers_running", "Answers that have a slot", registry=registry)
        self.waiting = Gauge("llama_answers_waiting", "Answers that wait for a slot", registry=registry)

    def text(self, running: int, waiting: int) -> bytes:
        """All numbers, in Prometheus' format. running, waiting: answers that have a slot, and that wait for one."""
        self.running.set(running)
        self.waiting.set(waiting)
        return generate_latest(self.registry)
