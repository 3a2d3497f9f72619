"""Breaks engines under load and checks that no stream notices, but for the wait.

Clients stream completions without pause while shards get SIGKILL, SIGSTOP or an injected error at
random moments. Every stream must end with the text of an undisturbed run; afterwards every block
must be free, and no process, shared memory or socket directory may be left.

With --resume, so many of the clients go on by themselves where a stream breaks, which may then also
be of a replica, Serve's proxy or its controller that is killed: they must have the same texts, too.

With --hostile nothing is broken; other clients send what may cost others something, from a process
of their own, in the second half of the run. The pauses of the streams are told for both halves.

    python -m benchmarks.chaos --seconds 180 --clients 64
    python -m benchmarks.chaos --replicas 2 --resume 0.5 --faults kill replica proxy controller
    python -m benchmarks.chaos --seconds 120 --clients 64 --hostile
"""

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deployments import local_ray

os.environ.update(local_ray.prepare(), MANTA_FAULT_INJECTION="1")

import httpx
import psutil
import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from deployments import app
from deployments.args import AppArgs
from engine import LLM, SamplingParams

# To shards, and processes of others that get SIGKILL.
FAULTS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "error": signal.SIGUSR1}
PROCESSES = {
    "replica": "ray::ServeReplica:chaos:Replica",
    "proxy": "ray::ProxyActor",
    "controller": "ray::ServeController",
}
# Pauses longer than this are taken for recoveries.
_PAUSE_S = 0.5
# What other clients' requests may cost a stream.
_NOTICED_S = 0.1


@dataclass
class Report:
    """What the clients and the breaker saw."""

    streams: int = 0
    resumed: int = 0
    breaks: list[str] = field(default_factory=list)  # of streams that then went on
    wrong: list[int] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    faults: list[tuple[float, str]] = field(default_factory=list)
    pauses: list[float] = field(default_factory=list)
    attacked_at: float = 0.0
    gaps: list[tuple[float, float]] = field(default_factory=list)  # (when, how long), of all events


def request(i: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """The i-th request's prompt and sampling parameters."""
    return {
        "prompt": f"{i} apple river",
        "max_tokens": arguments.tokens,
        "temperature": arguments.temperature,
        "seed": i,
        "ignore_eos": True,
    }


def undisturbed_texts(arguments: argparse.Namespace) -> list[str]:
    """The texts by `LLM.generate`, on as many ranks, for sums of others round differently."""
    llm = LLM(
        arguments.model,
        dtype=arguments.dtype,
        tensor_parallel_size=arguments.tensor_parallel_size,
        max_model_len=1024,
        num_blocks=4000,
    )
    requests = [request(i, arguments) for i in range(arguments.clients)]
    prompts = [own.pop("prompt") for own in requests]
    outputs = llm.generate(prompts, [SamplingParams(**own) for own in requests])
    llm.close()
    return [output.outputs[0].text for output in outputs]


async def client(
    url: str,
    i: int,
    wanted: list[str],
    arguments: argparse.Namespace,
    until: float,
    report: Report,
) -> None:
    """Streams one request after another, each with another seed."""
    resumes = i < arguments.resume * arguments.clients
    async with httpx.AsyncClient(timeout=300) as http:
        while time.monotonic() < until:
            text, last_id, ended = "", "", False
            while not ended:
                headers = {"last-event-id": last_id} if last_id else {}
                body = request(i, arguments) | {"stream": True}
                begun = time.monotonic()
                try:
                    async with http.stream(
                        "POST", f"{url}/v1/completions", json=body, headers=headers
                    ) as response:
                        if response.status_code != 200:
                            raise httpx.HTTPError(f"{response.status_code}")
                        events = _events(response, last_id, begun, report)
                        async for event_id, added in events:
                            last_id, text = event_id, text + added
                    break
                except httpx.HTTPError as error:
                    ended = not resumes
                    report.resumed += not ended
                    (report.errors if ended else report.breaks).append(repr(error))
                    await asyncio.sleep(0.2)
            report.streams += 1
            if not ended and text != wanted[i]:
                report.wrong.append(i)
            i = (i + 1) % len(wanted)


async def _events(
    response: httpx.Response, event_id: str, last: float, report: Report
) -> AsyncIterator[tuple[str, str]]:
    """(id, text) of each; raises HTTPError where they end before the end."""
    async for line in response.aiter_lines():
        if line.startswith("id: "):
            event_id = line.removeprefix("id: ")
        elif line == "data: [DONE]":
            return
        elif line.startswith("data: {"):
            event = json.loads(line.removeprefix("data: "))
            if "choices" not in event:
                raise httpx.HTTPError(line)
            now = time.monotonic()
            report.gaps.append((now, now - last))
            if now - last > _PAUSE_S:
                report.pauses.append(now - last)
            last = now
            yield event_id, event["choices"][0]["text"]
    raise httpx.RemoteProtocolError("a stream without an end")


async def breaker(kinds: list[str], interval_s: float, until: float, report: Report) -> None:
    """Sends a random signal to a random shard, or kills another process, in about `interval_s`."""
    handle = serve.get_app_handle("chaos")
    draw = random.Random(0)
    while True:
        await asyncio.sleep(interval_s * draw.uniform(0.5, 1.5))
        if time.monotonic() > until - interval_s:
            return
        kind = draw.choice(kinds)
        try:
            if kind in PROCESSES:
                pids = await asyncio.to_thread(_pids, PROCESSES[kind])
            else:
                pids = await handle.shard_pids.remote()
            os.kill(draw.choice(pids), FAULTS.get(kind, signal.SIGKILL))
        except (ProcessLookupError, IndexError, RayError, RayServeException):
            continue  # it is still starting after the last fault
        report.faults.append((time.monotonic(), kind))


def _pids(title: str) -> list[int]:
    """Of processes of this run."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if title in " ".join(process.cmdline()):
                found.append(process.pid)
    return found


async def run(arguments: argparse.Namespace, url: str, wanted: list[str]) -> Report:
    report = Report()
    until = time.monotonic() + arguments.seconds
    async with asyncio.TaskGroup() as group:
        for i in range(arguments.clients):
            group.create_task(client(url, i, wanted, arguments, until, report))
        if arguments.hostile:
            report.attacked_at = until - arguments.seconds / 2
            group.create_task(hostile_clients(url, report.attacked_at, until))
        else:
            group.create_task(breaker(arguments.faults, arguments.interval, until, report))
    return report


async def hostile_clients(url: str, start: float, until: float) -> None:
    """In a process of their own: what they need to make their requests holds up no honest one."""
    await asyncio.sleep(start - time.monotonic())
    command = [sys.executable, "-m", "benchmarks.hostile", url, str(until - time.monotonic())]
    process = await asyncio.create_subprocess_exec(*command)
    await process.wait()


def print_gaps(report: Report) -> None:
    for name, gaps in (
        ("alone", [gap for at, gap in report.gaps if at < report.attacked_at]),
        ("beside hostile clients", [gap for at, gap in report.gaps if at >= report.attacked_at]),
    ):
        cuts = statistics.quantiles(gaps, n=1000)
        noticed = sum(gap > _NOTICED_S for gap in gaps)
        print(
            f"between events, {name}: p50 {cuts[499] * 1e3:.0f} ms, p99 {cuts[989] * 1e3:.0f} ms, "
            f"p99.9 {cuts[998] * 1e3:.0f} ms, most {max(gaps) * 1e3:.0f} ms; "
            f"{noticed} of {len(gaps)} over {_NOTICED_S * 1e3:.0f} ms"
        )


@contextmanager
def server(arguments: argparse.Namespace) -> Iterator[str]:
    ray.init(num_cpus=16, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": arguments.port})
    args = AppArgs(
        model=arguments.model,
        dtype=arguments.dtype,
        max_model_len=1024,
        num_blocks=4000,
        tensor_parallel_size=arguments.tensor_parallel_size,
        num_replicas=arguments.replicas,
        heartbeat_timeout_s=arguments.heartbeat_timeout,
        max_restarts=10_000,
    )
    serve.run(app(args), name="chaos", route_prefix="/")
    try:
        yield f"http://127.0.0.1:{arguments.port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def leftovers() -> set[str]:
    """What a run may leave behind: shard processes, socket directories, shared memory."""
    processes = {
        f"process {p.pid} {p.info['name']}"
        for p in psutil.process_iter(["name", "cmdline"])
        if "EngineShard" in " ".join(p.info["cmdline"] or []) or "EngineShard" in p.info["name"]
    }
    directories = {str(path) for path in Path("/tmp").glob("manta-*")}
    return processes | directories | {f"/dev/shm/{name}" for name in os.listdir("/dev/shm")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="manta-demo")
    parser.add_argument("--dtype", default="auto", help="as of the engine")
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=200, help="output length of a stream")
    parser.add_argument("--temperature", type=float, default=0.5)
    parser.add_argument("--interval", type=float, default=15, help="seconds between faults")
    parser.add_argument("--faults", nargs="+", default=list(FAULTS), choices=FAULTS | PROCESSES)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument(
        "--resume", type=float, default=0, help="share of clients that go on by themselves"
    )
    parser.add_argument("--hostile", action="store_true", help="break nothing, but bother")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--heartbeat-timeout", type=float, default=5)
    parser.add_argument("--port", type=int, default=18234)
    arguments = parser.parse_args()
    before = leftovers()
    wanted = undisturbed_texts(arguments)
    with server(arguments) as url:
        report = asyncio.run(run(arguments, url, wanted))
        stats = serve.get_app_handle("chaos").stats.remote().result()
    time.sleep(2)
    counts = {kind: sum(k == kind for _, k in report.faults) for kind in arguments.faults}
    print(f"{report.streams} streams ended, {len(report.faults)} faults: {counts}")
    print(
        f"streams with another text: {len(report.wrong)}, errors: {len(report.errors)}; "
        f"{report.resumed} times a client went on where its stream broke"
    )
    if arguments.hostile:
        print_gaps(report)
    if len(report.pauses) > 1:
        cuts = statistics.quantiles(report.pauses, n=100)
        print(f"pauses of streams: p50 {cuts[49]:.1f} s, p99 {cuts[98]:.1f} s")
    held, left = stats["num_blocks"] - stats["free_blocks"], sorted(leftovers() - before)
    print(f"blocks held at the end: {held}")
    print(f"left behind: {left or 'nothing'}")
    is_idle = not (report.faults or arguments.hostile)
    # Streams of who does not go on are lost with their replica or proxy, and say so.
    may_break = arguments.resume < 1 and PROCESSES.keys() & set(arguments.faults)
    if report.wrong or (report.errors and not may_break) or held or left or is_idle:
        raise SystemExit(f"failed: {report.errors[:3]}")


if __name__ == "__main__":
    main()
