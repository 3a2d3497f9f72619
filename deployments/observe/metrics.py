"""What an operator watches, as Prometheus metrics under the names that vLLM's dashboards know.

Everything is a plain number until somebody asks: a token costs one lookup in a list of bounds, and
the engine's own counts come once per step as they are. Histograms are not `prometheus_client`'s
because those take a lock, and a call per label, for every observation.
"""

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    Exemplar,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from deployments.args import DeploymentArgs
from deployments.observe.request_record import RequestRecord

_TEXT = "text/plain; version=0.0.4; charset=utf-8"
_OPENMETRICS = "application/openmetrics-text"

# Bounds of the buckets, as vLLM has them.
_TTFT_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_ITL_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0),
)
_LATENCY_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0),
    *(240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_STEP_TOKENS = (1.0, *(float(8 * 2**power) for power in range(12)))
_PREEMPTIONS = (1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0)
_TOKENS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))


# By drafter, as `Speculator.stats` calls them.
_DRAFTS = {
    "drafts": "Rows and steps with drafts.",
    "draft_tokens": "Tokens drafted.",
    "accepted_tokens": "Drafted tokens that were right.",
}


class Buckets:
    """A histogram: how many observations are at most each bound, and their sum."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        self._exemplars: dict[int, Exemplar] = {}  # the last of each bucket that has a trace

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def note_trace(self, value: float, trace_id: str) -> None:
        """Note the trace of a request whose `value` has been observed."""
        exemplar = Exemplar({"trace_id": trace_id}, value, time.time())
        self._exemplars[bisect_left(self._bounds, value)] = exemplar

    def cumulative(self) -> list[tuple[str, int] | tuple[str, int, Exemplar]]:
        """(upper bound, observations up to it[, exemplar]) as Prometheus has them."""
        total, buckets = 0, list[tuple[str, int] | tuple[str, int, Exemplar]]()
        for i, bound in enumerate((*self._bounds, None)):
            total += self._counts[i]
            bucket = "+Inf" if bound is None else str(bound), total
            exemplar = self._exemplars.get(i)
            buckets.append((*bucket, exemplar) if exemplar else bucket)
        return buckets

    @property
    def sum(self) -> float:
        return self._sum


class Metrics(Collector):
    """One front's metrics, and its engine's.

    Args:
        args: what the engine has been told.
        engine_stats: gives the engine's latest numbers, or {} while there is none.
    """

    def __init__(self, args: DeploymentArgs, engine_stats: Callable[[], dict[str, Any]]) -> None:
        self._args = args
        self._labels = {"model_name": args.model_name, "engine": "0"}
        self._engine_stats = engine_stats
        self._last_stats: dict[str, Any] = {}
        self.ttft = Buckets(_TTFT_S)
        self.itl = Buckets(_ITL_S)
        self._latency = Buckets(_LATENCY_S)
        self._mean_itl = Buckets(_ITL_S)
        self._queue_time = Buckets(_LATENCY_S)
        self._prefill_time = Buckets(_LATENCY_S)
        self._inference_time = Buckets(_LATENCY_S)
        self._decode_time = Buckets(_LATENCY_S)
        self._preemptions = Buckets(_PREEMPTIONS)
        self._step_tokens = Buckets(_STEP_TOKENS)
        self._num_prompt = Buckets(_TOKENS)
        self._num_prefilled = Buckets(_TOKENS)
        self._num_output = Buckets(_TOKENS)
        self._max_tokens = Buckets(_TOKENS)
        self.finished = Counter[str]({"stop": 0, "length": 0, "abort": 0, "timeout": 0, "error": 0})
        self.errors = Counter[str]()  # by code, or status where there is none
        self.key_tokens = Counter[tuple[str, str]]()  # (name of a key, which tokens)
        self.http = Counter[tuple[str, str, str]]()  # (method, handler, status as 2xx)
        self.engine_starts = 0
        self.startup_s: dict[str, float] = {}  # of the last engine, by phase
        self.registry = CollectorRegistry()
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    def count_step(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
        """The engine has told of its numbers again: once a step, and now and then while idle."""
        num_tokens = after.get("computed_tokens", 0) - before.get("computed_tokens", 0)
        if num_tokens:
            self._step_tokens.observe(num_tokens)

    def count_tokens(self, record: RequestRecord, num_tokens: int, now: float) -> None:
        """A step has brought a request tokens."""
        if record.first_token_at is None:
            record.first_token_at = now
            self.ttft.observe(now - record.arrived_at)
        else:
            self.itl.observe(now - record.last_token_at)
        record.last_token_at = now
        record.num_output += num_tokens

    def count_end(self, record: RequestRecord, now: float) -> None:
        """A request has ended, for whatever reason."""
        record.ended_at = now
        self.finished[record.finish_reason or "abort"] += 1
        self._latency.observe(now - record.arrived_at)
        self._num_prompt.observe(record.num_prompt)
        self._num_output.observe(record.num_output)
        if record.max_tokens is not None:
            self._max_tokens.observe(record.max_tokens)
        if record.ttft_s is not None:
            prefill_s = max(record.ttft_s - record.queue_s, 0.0)
            self._queue_time.observe(record.queue_s)
            self._prefill_time.observe(prefill_s)
            self._decode_time.observe(record.decode_s)
            self._inference_time.observe(prefill_s + record.decode_s)
            self._preemptions.observe(max(len(record.waits) - 1, 0))
            self._num_prefilled.observe(record.num_prompt - record.num_cached)
            if record.num_output > 1:
                self._mean_itl.observe(record.decode_s / (record.num_output - 1))

    def count_key(self, name: str, records: Sequence[RequestRecord]) -> None:
        """Requests of the API key of this name have ended."""
        for record in records if name else ():
            for kind, number in record.counts.items():
                self.key_tokens[name, kind] += number

    def note_trace(self, record: RequestRecord, trace_id: str) -> None:
        """Lets who looks at a slow bucket see one of its requests: exemplars, in OpenMetrics."""
        if record.ttft_s is not None:
            self.ttft.note_trace(record.ttft_s, trace_id)
        if record.ended_at is not None:
            self._latency.note_trace(record.ended_at - record.arrived_at, trace_id)

    def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """(metrics, their content type): Prometheus' text, or OpenMetrics for who accepts it."""
        if _OPENMETRICS not in accept:
            return generate_latest(self.registry), _TEXT
        # Escaped by its default, names lose their colons.
        text = openmetrics.generate_latest(self.registry, escaping="allow-utf-8")
        return text, f"{_OPENMETRICS}; version=1.0.0; charset=utf-8"

    def collect(self) -> Iterator[Metric]:
        yield from self._engine_metrics()
        yield from self._request_metrics()
        yield from self._server_metrics()

    def _engine_metrics(self) -> Iterator[Metric]:
        stats = self._engine_stats()
        self._last_stats = last = stats or self._last_stats
        yield self._gauge("num_requests_running", "Requests in the batch.", stats.get("running", 0))
        waiting, deferred = stats.get("waiting", 0), stats.get("deferred", 0)
        yield self._gauge("num_requests_waiting", "Requests queued.", waiting)
        yield self._by(
            GaugeMetricFamily,
            "vllm:num_requests_waiting_by_reason",
            "capacity: for room in the batch; deferred: for what they need, as a grammar.",
            "reason",
            {"capacity": waiting - deferred, "deferred": deferred},
        )
        used = 1 - stats["free_blocks"] / stats["num_blocks"] if stats else 0.0
        yield self._gauge("kv_cache_usage_perc", "Share of the KV cache held, 1 is full.", used)
        if not last:
            return
        for name, about, value in (
            ("prompt_tokens", "Prompt tokens of admitted requests.", last["prompt_tokens"]),
            ("generation_tokens", "Tokens generated.", last["output_tokens"]),
            ("prefix_cache_queries", "Prompt tokens looked up.", last["prompt_tokens"]),
            ("prefix_cache_hits", "Prompt tokens found in the cache.", last["cached_tokens"]),
            ("prompt_tokens_cached", "The same.", last["cached_tokens"]),
            ("num_preemptions", "Requests thrown out of the batch.", last["preemptions"]),
        ):
            yield self._counter(name, about, value)
        for name, about in _DRAFTS.items():
            prefix = f"{name}:"
            by_drafter = Counter(
                {key.removeprefix(prefix): last[key] for key in last if key.startswith(prefix)}
            )
            name = f"vllm:spec_decode_num_{name}"
            yield self._by(CounterMetricFamily, name, about, "drafter", by_drafter)
        sources = {"local_cache_hit": last["cached_tokens"]}
        sources["local_compute"] = last["prompt_tokens"] - last["cached_tokens"]
        name, about = "vllm:prompt_tokens_by_source", "Where they came from."
        yield self._by(CounterMetricFamily, name, about, "source", sources)
        yield self._cache_config(last)
        # Kubernetes' gateways read which adapters a replica has, and take silence for a fault.
        adapters = {"max_lora": "0", "running_lora_adapters": "", "waiting_lora_adapters": ""}
        yield self._info("lora_requests_info", "Of LoRA adapters: there are none.", adapters)

    def _cache_config(self, stats: Mapping[str, Any]) -> Metric:
        """What there is of a cache, as labels."""
        args = self._args
        info = {
            "block_size": str(args.block_size),
            "cache_dtype": args.kv_cache_dtype,
            "enable_prefix_caching": str(args.enable_prefix_caching),
            "gpu_memory_utilization": str(args.gpu_memory_utilization),
            "num_gpu_blocks": str(stats["num_blocks"]),
            "num_cpu_blocks": str(stats["host_blocks"]),
            "num_gpu_blocks_override": str(args.num_blocks),
        }
        return self._info("cache_config_info", "Of the KV cache; always 1.", info)

    def _info(self, name: str, about: str, info: Mapping[str, str]) -> Metric:
        labels = {**self._labels, **info}
        family = GaugeMetricFamily(f"vllm:{name}", about, labels=list(labels))
        family.add_metric(list(labels.values()), 1)
        return family

    def _request_metrics(self) -> Iterator[Metric]:
        for name, about, buckets in (
            ("time_to_first_token_seconds", "From arrival to the first token.", self.ttft),
            ("inter_token_latency_seconds", "Between a request's tokens.", self.itl),
            ("request_time_per_output_token_seconds", "Its mean, by request.", self._mean_itl),
            ("e2e_request_latency_seconds", "From arrival to the end.", self._latency),
            ("request_queue_time_seconds", "Waiting for the batch.", self._queue_time),
            ("request_prefill_time_seconds", "From there to the first token.", self._prefill_time),
            ("request_decode_time_seconds", "From the first token to the end.", self._decode_time),
            ("request_inference_time_seconds", "Both of these.", self._inference_time),
            ("request_num_preemptions", "Times thrown out of the batch.", self._preemptions),
            ("request_prefill_kv_computed_tokens", "Not found cached.", self._num_prefilled),
            ("iteration_tokens_total", "Tokens computed, by step.", self._step_tokens),
            ("request_prompt_tokens", "Prompt tokens, by request.", self._num_prompt),
            ("request_generation_tokens", "Generated tokens, by request.", self._num_output),
            ("request_params_max_tokens", "max_tokens, where it is given.", self._max_tokens),
        ):
            family = HistogramMetricFamily(f"vllm:{name}", about, labels=list(self._labels))
            family.add_metric(list(self._labels.values()), buckets.cumulative(), buckets.sum)
            yield family
        yield self._by(
            *(CounterMetricFamily, "vllm:request_success", "Requests ended."),
            *("finished_reason", self.finished),
        )

    def _server_metrics(self) -> Iterator[Metric]:
        about = "Requests answered with an error."
        yield self._by(CounterMetricFamily, "manta:request_errors", about, "code", self.errors)
        tokens = CounterMetricFamily(
            "manta:key_tokens",
            "Tokens by API key: of prompts, of those found cached, of outputs.",
            labels=(*self._labels, "key", "kind"),
        )
        for of, count in self.key_tokens.items():
            tokens.add_metric([*self._labels.values(), *of], count)
        yield tokens
        starts = CounterMetricFamily("manta:engine_starts", "Engines that came up.")
        starts.add_metric([], self.engine_starts)
        yield starts
        phases = GaugeMetricFamily(
            "manta:engine_startup_seconds",
            "How long the last engine took to come up, by phase.",
            labels=("phase",),
        )
        for phase, seconds in self.startup_s.items():
            phases.add_metric([phase], seconds)
        yield phases
        http = CounterMetricFamily(
            "http_requests", "HTTP requests.", labels=("method", "handler", "status")
        )
        for values, count in self.http.items():
            http.add_metric(values, count)
        yield http

    def _gauge(self, name: str, about: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"vllm:{name}", about, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _counter(self, name: str, about: str, value: float) -> Metric:
        family = CounterMetricFamily(f"vllm:{name}", about, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _by(
        self,
        kind: type[CounterMetricFamily] | type[GaugeMetricFamily],
        name: str,
        about: str,
        label: str,
        values: Mapping[str, float],
    ) -> Metric:
        family = kind(name, about, labels=(*self._labels, label))
        for value, number in values.items():
            family.add_metric([*self._labels.values(), value], number)
        return family
