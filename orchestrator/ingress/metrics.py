"""Prometheus metrics of one ingress, in a registry of its own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from .lane import Lane

FIRST_TOKEN_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
BETWEEN_TOKENS_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)

WORKER_GAUGES: dict[str, tuple[str, Callable[[Lane], float]]] = {
    "connected": ("1 while the connection is up", lambda lane: lane.connected),
    "outstanding_tokens": ("Tokens asked of the worker by this ingress and not come yet", lambda x: x.outstanding),
    "sequences": ("Sequences of this ingress on the worker", lambda lane: lane.sequences),
    "engine_waiting": ("Sequences that wait in the engine", lambda lane: lane.load.waiting),
    "engine_running": ("Sequences that run in the engine", lambda lane: lane.load.running),
    "kv_blocks_used": ("KV blocks in use", lambda lane: lane.load.kv_blocks_used),
    "kv_blocks": ("KV blocks in all", lambda lane: lane.load.kv_blocks),
}


class Metrics:
    """Everything under ``/metrics``; names begin with ``concertina_``.

    Parameters
    ----------
    lanes : callable
        The workers of now, read when metrics are asked for.
    """

    def __init__(self, lanes: Callable[[], Collection[Lane]]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "concertina_requests", "Requests answered", ["endpoint", "status"], registry=self.registry
        )
        self.running = self._gauge("running", "Sequences that have their first token")
        self.waiting = self._gauge("waiting", "Sequences that wait for their first token")
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of accepted requests")
        self.cached_tokens = self._counter("cached_prompt_tokens", "Prompt tokens that came from a prefix cache")
        self.generated_tokens = self._counter("generated_tokens", "Tokens generated")
        self.first_token_s = Histogram(
            "concertina_time_to_first_token_seconds",
            "From a request's arrival to its first token",
            buckets=FIRST_TOKEN_BUCKETS_S,
            registry=self.registry,
        )
        self.between_tokens_s = Histogram(
            "concertina_inter_token_seconds",
            "Between two outputs of one sequence",
            buckets=BETWEEN_TOKENS_BUCKETS_S,
            registry=self.registry,
        )
        self.registry.register(_Workers(lanes))

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"concertina_{name}", text, registry=self.registry)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"concertina_{name}", text, registry=self.registry)


class _Workers(Collector):
    """Gauges of the workers that are members now; one that has left is not shown any more."""

    def __init__(self, lanes: Callable[[], Collection[Lane]]) -> None:
        self._lanes = lanes

    def collect(self) -> Iterator[GaugeMetricFamily]:
        for name, (text, read) in WORKER_GAUGES.items():
            family = GaugeMetricFamily(f"concertina_worker_{name}", text, labels=["worker"])
            for lane in self._lanes():
                family.add_metric([lane.member.name], float(read(lane)))
            yield family
