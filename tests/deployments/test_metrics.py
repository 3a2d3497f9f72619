"""What operators see: numbers that add up to what was asked, under the names they know."""

import asyncio
import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as openmetrics_families,
)
from prometheus_client.parser import text_string_to_metric_families

from deployments.api.schema import answers
from deployments.args import AppArgs
from deployments.observe.metrics import Metrics
from engine.schedule.scheduler import SchedulerStats
from engine.speculation.costs import StepCosts
from tests.deployments.conftest import wait_until
from tests.deployments.in_process import serve_in_process
from tests.deployments.local_server import LocalServer, serve_locally

ROOT = Path(__file__).resolve().parent.parent.parent
Samples = dict[str, float]


@pytest.fixture
def fresh(tiny_model: Path, request: pytest.FixtureRequest) -> Iterator[LocalServer]:
    """Without drafts, so that each token comes with a step of its own."""
    with serve_locally(
        model=str(tiny_model),
        served_model_name="tiny",
        num_blocks=32,
        block_size=8,
        max_num_seqs=4,
        speculation=getattr(request, "param", "off"),
    ) as server:
        yield server


def parse(text: str) -> Samples:
    """Values by name and labels, without those that are the same everywhere."""
    samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
            written = ",".join(f"{k}={v}" for k, v in sorted(labels.items()))
            samples[f"{sample.name}{{{written}}}" if written else sample.name] = sample.value
    return samples


def scrape(server: LocalServer) -> Samples:
    answer = httpx.get(f"{server.url}/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return parse(answer.text)


def complete(server: LocalServer, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/completions", json=body)


def test_counts_and_times_of_what_was_asked(fresh: LocalServer) -> None:
    prompt = "abcdefgh" * 3
    for _ in range(2):  # the second finds two of the prompt's three blocks: its last is computed
        complete(fresh, prompt=prompt, max_tokens=5, ignore_eos=True)
    complete(fresh, prompt="abc", max_tokens=7, ignore_eos=True, n=2, stream=True)
    complete(fresh, prompt="abc", max_tokens=0)  # refused
    wait_until(fresh.is_idle)
    seen = scrape(fresh)
    num_prompt, num_output, num_requests = 24 * 2 + 3 * 2, 5 * 2 + 7 * 2, 4
    assert seen["vllm:prompt_tokens_total"] == num_prompt
    assert seen["vllm:generation_tokens_total"] == num_output
    assert seen["vllm:prefix_cache_queries_total"] == num_prompt
    assert seen["vllm:prefix_cache_hits_total"] == 16
    assert seen["vllm:request_success_total{finished_reason=length}"] == num_requests
    assert seen["vllm:request_success_total{finished_reason=stop}"] == 0
    assert seen["vllm:request_prompt_tokens_sum"] == num_prompt
    assert seen["vllm:request_generation_tokens_sum"] == num_output
    assert seen["vllm:request_params_max_tokens_sum"] == num_output
    assert seen["manta:request_errors_total{code=400}"] == 1
    assert seen["http_requests_total{handler=/v1/completions,method=POST,status=2xx}"] == 3
    assert seen["http_requests_total{handler=/v1/completions,method=POST,status=4xx}"] == 1
    assert seen["vllm:num_requests_running"] == seen["vllm:kv_cache_usage_perc"] == 0
    assert seen["manta:engine_starts_total"] == 1
    for name in ("time_to_first_token", "e2e_request_latency", "request_decode_time"):
        assert seen[f"vllm:{name}_seconds_count"] == num_requests, name
        assert seen[f"vllm:{name}_seconds_bucket{{le=+Inf}}"] == num_requests
        assert 0 < seen[f"vllm:{name}_seconds_sum"] < 60
    # A request waits, computes its prompt and decodes, and no time is left over.
    queued, prefilled, decoded, inferred = (
        seen[f"vllm:request_{name}_time_seconds_sum"]
        for name in ("queue", "prefill", "decode", "inference")
    )
    assert queued > 0 and queued + prefilled == pytest.approx(
        seen["vllm:time_to_first_token_seconds_sum"]
    )
    assert prefilled + decoded == pytest.approx(inferred)
    assert seen["vllm:request_queue_time_seconds_count"] == num_requests
    assert seen["vllm:prompt_tokens_by_source_total{source=local_cache_hit}"] == 16
    assert seen["vllm:prompt_tokens_by_source_total{source=local_compute}"] == num_prompt - 16
    assert seen["vllm:request_prefill_kv_computed_tokens_sum"] == num_prompt - 16
    # All that steps have computed: a request's last token is never read.
    computed = num_prompt - 16 + num_output - num_requests
    assert seen["vllm:iteration_tokens_total_sum"] == computed
    assert seen["vllm:iteration_tokens_total_count"] == fresh.engine.num_steps
    assert seen["vllm:request_num_preemptions_sum"] == 0
    info = [name for name in seen if name.startswith("vllm:cache_config_info")]
    assert len(info) == 1 and "block_size=8," in info[0] and "num_gpu_blocks=32," in info[0]
    assert any(name.startswith("vllm:lora_requests_info{max_lora=0,") for name in seen)
    # Answers that are not streamed count tokens as they come from the engine, too.
    assert seen["vllm:inter_token_latency_seconds_count"] == num_output - num_requests
    assert (
        seen["vllm:e2e_request_latency_seconds_sum"] > seen["vllm:request_decode_time_seconds_sum"]
    )


def test_a_request_that_runs_and_is_given_up(fresh: LocalServer) -> None:
    body = {"prompt": "ab", "stream": True, "ignore_eos": True, "max_tokens": 200}
    url = f"{fresh.url}/v1/completions"
    with fresh.slowed(), httpx.stream("POST", url, json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        during = scrape(fresh)
    wait_until(fresh.is_idle)
    after = scrape(fresh)
    assert during["vllm:num_requests_running"] == 1 and during["vllm:kv_cache_usage_perc"] > 0
    assert after["vllm:num_requests_running"] == 0 and after["vllm:kv_cache_usage_perc"] == 0
    assert after["vllm:request_success_total{finished_reason=abort}"] == 1


def test_preemptions_are_counted(fresh: LocalServer) -> None:
    """Two requests grow until the pool holds but one."""
    complete(fresh, prompt=["ab", "cd"], ignore_eos=True, max_tokens=150)
    wait_until(fresh.is_idle)
    seen = scrape(fresh)
    assert seen["vllm:num_preemptions_total"] >= 1
    assert seen["vllm:request_num_preemptions_sum"] == seen["vllm:num_preemptions_total"]


def test_what_waits_is_told_apart_by_why() -> None:
    """Five wait, two of them for a grammar."""
    stats = {"running": 4, "waiting": 5, "deferred": 2, "num_blocks": 8, "free_blocks": 1}
    counts = dict.fromkeys(SchedulerStats.__dataclass_fields__, 0)
    metrics = Metrics(AppArgs(), lambda: stats | counts | {"host_blocks": 0})
    seen = parse(metrics.exposition()[0].decode())
    assert seen["vllm:num_requests_waiting"] == 5
    assert seen["vllm:num_requests_waiting_by_reason{reason=capacity}"] == 3
    assert seen["vllm:num_requests_waiting_by_reason{reason=deferred}"] == 2


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_told_how_it_went(demo: LocalServer, path: str, stream: bool) -> None:
    asked: dict[str, Any] = {"prompt": "one two"}
    if "chat" in path:
        asked = {"messages": [{"role": "user", "content": "one two"}]}
    asked |= {"max_tokens": 6, "ignore_eos": True, "stream": stream, "return_metrics": True}
    told = httpx.post(f"{demo.url}{path}", json=asked)
    if stream:
        last = json.loads(told.text.strip().split("\n\n")[-2].removeprefix("data: "))
        assert last["choices"] == []
    else:
        last = told.json()
    went = answers.RequestMetrics.model_validate(last["metrics"], strict=True)
    assert 0 <= went.queue_time_ms < went.time_to_first_token_ms
    assert went.tokens_per_second and went.mean_itl_ms
    assert went.mean_itl_ms * 5 == pytest.approx(went.generation_time_ms, rel=0.01, abs=0.01)
    assert went.speculative_decoding is not None and went.num_preemptions == 0
    several = httpx.post(f"{demo.url}{path}", json=asked | {"n": 2, "stream": False}).json()
    assert several["metrics"] is None


def test_a_profile_shows_what_a_shard_did(tiny_model: Path, tmp_path: Path) -> None:
    """Twice; and what makes no sense is refused, and costs nobody anything."""
    directory = tmp_path / "profiles"
    options: dict[str, Any] = {"num_blocks": 32, "profile_directory": str(directory)}

    def post(path: str) -> int:
        return httpx.post(f"{server.url}{path}", timeout=60).status_code

    with serve_locally(model=str(tiny_model), served_model_name="tiny", **options) as server:
        assert post("/stop_profile") == 400
        assert (post("/start_profile"), post("/start_profile")) == (200, 400)
        complete(server, prompt="abc", max_tokens=3)
        assert post("/stop_profile") == 200
        (trace,) = directory.iterdir()
        directory.joinpath(trace.name).rename(tmp_path / "first.json.gz")
        directory.rmdir()
        assert (post("/start_profile"), post("/stop_profile")) == (200, 400)  # nowhere to write it
        assert complete(server, prompt="abc", max_tokens=3).status_code == 200
    assert "-rank0.json.gz" in trace.name
    events = json.loads(gzip.decompress((tmp_path / "first.json.gz").read_bytes()))["traceEvents"]
    assert any("aten::" in event.get("name", "") for event in events)


def test_an_engine_that_sleeps_serves_again_when_it_is_awake(tiny_model: Path) -> None:
    def post(path: str) -> httpx.Response:
        return httpx.post(f"{server.url}{path}", timeout=60)

    def is_sleeping() -> bool:
        is_ready = httpx.get(f"{server.url}/ready").status_code == 200
        is_sleeping = bool(httpx.get(f"{server.url}/is_sleeping").json()["is_sleeping"])
        assert is_ready != is_sleeping, "who sleeps is alive, and not for requests"
        assert httpx.get(f"{server.url}/health").status_code == 200
        return is_sleeping

    options: dict[str, Any] = {"num_blocks": 32, "enable_sleep_mode": True}
    with serve_locally(model=str(tiny_model), served_model_name="tiny", **options) as server:
        said = complete(server, prompt="abc", max_tokens=3, temperature=0).json()["choices"]
        assert post("/wake_up").status_code == 200, "it is awake"
        assert post("/sleep").json() == {"status": "asleep"} and is_sleeping()
        refused = complete(server, prompt="abc", max_tokens=3)
        assert refused.status_code == 503 and "/wake_up" in refused.json()["error"]["message"]
        assert post("/wake_up").json() == {"status": "awake"} and not is_sleeping()
        again = complete(server, prompt="abc", max_tokens=3, temperature=0).json()["choices"]
    assert again == said


def test_what_comes_with_the_order_to_sleep_is_answered_or_told_to_come_again(
    tiny_model: Path,
) -> None:
    async def ask() -> int:
        answer = await api.http.post("/v1/completions", json={"prompt": "abc", "max_tokens": 3})
        return answer.status_code

    async def before_the_order() -> tuple[str | None, int]:
        asked = asyncio.create_task(ask())
        while not client.num_live:
            await asyncio.sleep(0)
        return await client.order("sleep"), await asked

    async def behind_it() -> tuple[str | None, int]:
        ordered = asyncio.create_task(client.order("sleep"))
        status = await ask()
        return await ordered, status

    with serve_in_process(str(tiny_model), enable_sleep_mode=True) as api:
        client = api.front.client
        failure, status = api.run(before_the_order())
        assert failure is not None and "has requests" in failure and status == 200
        assert api.run(behind_it()) == (None, 503)


def test_nobody_puts_an_engine_to_sleep_that_may_not(demo: LocalServer) -> None:
    told = httpx.post(f"{demo.url}/sleep")
    assert told.status_code == 400 and "enable_sleep_mode" in told.json()["error"]["message"]


def test_without_a_directory_there_is_no_profile(demo: LocalServer) -> None:
    told = httpx.post(f"{demo.url}/start_profile")
    assert told.status_code == 400 and "profile_directory" in told.json()["error"]["message"]


@pytest.mark.parametrize("fresh", ["suffix"], indirect=True)
def test_drafts_are_counted_by_drafter(fresh: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model repeats itself soon; whoever asks the same again is foretold all of it."""
    monkeypatch.setattr(StepCosts, "count", lambda *_: None)  # what is not known costs nothing
    for _ in range(2):
        complete(fresh, prompt="abcabcabc", temperature=0, ignore_eos=True, max_tokens=60)
    seen = scrape(fresh)
    drafted, accepted = (
        seen[f"vllm:spec_decode_num_{name}_tokens_total{{drafter=suffix}}"]
        for name in ("draft", "accepted")
    )
    assert drafted >= accepted >= 20
    assert 0 < seen["vllm:spec_decode_num_drafts_total{drafter=suffix}"] < drafted
    assert seen["vllm:generation_tokens_total"] == 120


def test_the_dashboard_shows_what_is_there(demo: LocalServer) -> None:
    """Every metric that it asks for is one that a server has."""
    httpx.post(f"{demo.url}/v1/completions", json={"prompt": "a", "max_tokens": 2})
    httpx.post(f"{demo.url}/v1/completions", json={})
    there = {name.partition("{")[0] for name in scrape(demo)}
    dashboard = json.loads((ROOT / "docs/examples/grafana-dashboard.json").read_text())
    asked = {
        name.replace("${prefix}", "vllm:").replace("${own}", "manta:")
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"\$\{(?:prefix|own)\}\w+", target["expr"])
    }
    assert len(asked) > 15
    assert asked <= there, asked - there


def test_rays_metrics_have_them_too(server: str) -> None:
    """On the port of the replica's node, with the replica's name."""
    import ray

    httpx.post(f"{server}/v1/completions", json={"prompt": "a", "max_tokens": 2})
    (node,) = [node for node in ray.nodes() if node["Alive"]]
    url = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"

    def seen() -> Samples:
        return parse(httpx.get(url).text)

    def of(name: str) -> list[str]:
        samples = [sample for sample in seen() if sample.startswith(f"ray_vllm_{name}{{")]
        return [sample for sample in samples if "application=demo" in sample]  # others' may be left

    # The agent may report while the replica is halfway through its metrics.
    names = ("generation_tokens_total", "time_to_first_token_seconds_bucket", "kv_cache_usage_perc")
    wait_until(lambda: all(map(of, names)), 30, "the replica's metrics at Ray's")
    (sample,) = of("generation_tokens_total")
    assert "deployment=Replica" in sample and "replica=" in sample


# Spans


@contextmanager
def _collector() -> Iterator[tuple[str, list[Any]]]:
    """An OTLP collector: its address, and the spans that it has been sent."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    spans: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent = self.rfile.read(int(self.headers["content-length"]))
            for resource in ExportTraceServiceRequest.FromString(sent).resource_spans:
                spans.extend(span for scope in resource.scope_spans for span in scope.spans)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}", spans
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


def test_a_span_for_each_request_where_a_collector_is_configured(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    with _collector() as (address, spans):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
        with serve_locally(
            model=str(tiny_model), served_model_name="tiny", num_blocks=32
        ) as server:
            httpx.post(
                f"{server.url}/v1/completions",
                json={"prompt": "abc", "max_tokens": 4, "ignore_eos": True, "n": 2},
                headers={"traceparent": f"00-{trace}-{parent}-01", "x-request-id": "mine"},
            )
            wait_until(lambda: bool(spans), timeout_s=10)
            accept = {"accept": "application/openmetrics-text; version=1.0.0"}
            scraped = httpx.get(f"{server.url}/metrics", headers=accept).text
            samples = [one for family in openmetrics_families(scraped) for one in family.samples]
            plain = httpx.get(f"{server.url}/metrics")
    exemplars = {s.name: s.exemplar.labels for s in samples if s.exemplar is not None}
    assert exemplars == {
        "vllm:time_to_first_token_seconds_bucket": {"trace_id": trace},
        "vllm:e2e_request_latency_seconds_bucket": {"trace_id": trace},
    }
    assert plain.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert trace not in plain.text
    (span,) = spans
    assert span.name == "POST /v1/completions"
    assert span.trace_id.hex() == trace and span.parent_span_id.hex() == parent
    assert 0 < span.end_time_unix_nano - span.start_time_unix_nano < 60e9
    told = {item.key: item.value for item in span.attributes}
    assert told["gen_ai.request.id"].string_value == "mine"
    assert told["gen_ai.request.model"].string_value == "tiny"
    assert told["gen_ai.usage.output_tokens"].int_value == 8
    assert told["gen_ai.server.time_to_first_token"].double_value > 0
    assert [event.name for event in span.events] == ["first token"] * 2
    assert all(
        span.start_time_unix_nano <= event.time_unix_nano <= span.end_time_unix_nano
        for event in span.events
    )
