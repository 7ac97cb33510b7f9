"""Prometheus metrics under SGLang's names, read from the scheduler when they are scraped."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from asyncrl_runtime.engine.requests import Request
from asyncrl_runtime.engine.scheduler import Scheduler

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class EngineMetrics(Collector):
    """Gauges and counters of the scheduler, read without a lock: the numbers may be a step apart."""

    def __init__(self, scheduler: Scheduler, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._scheduler = scheduler
        self._labels = {"model_name": model_name, "engine_type": "unified", "tp_rank": "0", "pp_rank": "0"}
        self.registry.register(self)
        self._latency = self._histogram("e2e_request_latency_seconds", "Time from arrival to the last token.")
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "Time from arrival to the first token."
        )

    def observe(self, request: Request) -> None:
        """Count a finished request."""
        self._latency.observe(request.finished - request.received)
        if request.prefilled:
            self._first_token.observe(request.prefilled - request.received)

    def collect(self) -> Iterator[Metric]:
        scheduler = self._scheduler
        num_running, num_waiting = len(scheduler.batch), len(scheduler.waiting)
        runner, limits = scheduler.runner, scheduler.limits
        num_prefilled = runner.num_cached_tokens + runner.num_computed_tokens
        gauges = {
            "num_running_reqs": num_running,
            "num_queue_reqs": num_waiting,
            "num_paused_reqs": num_running + num_waiting if scheduler.is_paused else 0,
            "num_retracted_reqs": scheduler.num_retracted,
            "num_used_tokens": scheduler.num_used_tokens,
            "max_total_num_tokens": limits.max_total_tokens,
            "token_usage": scheduler.num_used_tokens / limits.max_total_tokens,
            "utilization": num_running / limits.max_running_requests,
            "gen_throughput": scheduler.throughput if num_running and not scheduler.is_paused else 0.0,
            "cache_hit_rate": runner.num_cached_tokens / num_prefilled if num_prefilled else 0.0,
        }
        counters = {
            "prompt_tokens": scheduler.num_prompt_tokens,
            "generation_tokens": scheduler.num_output_tokens,
            "num_requests": scheduler.num_finished,
            "num_aborted_requests": scheduler.num_aborted,
        }
        for kind, values in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, value in values.items():
                metric = kind(f"sglang:{name}", name.replace("_", " "), labels=list(self._labels))
                metric.add_metric(list(self._labels.values()), value)
                yield metric

    def _histogram(self, name: str, description: str) -> Histogram:
        names = list(self._labels)
        metric = Histogram(f"sglang:{name}", description, names, buckets=SECONDS, registry=self.registry)
        return metric.labels(**self._labels)
