"""Breaks engines under load and checks that no stream notices, but for the wait.

Clients stream completions without pause while, in turn, shards get SIGKILL, SIGSTOP or an injected
error. Every stream must end with the text of an undisturbed run; afterwards every block must be
free, and no process, shared memory or socket directory may be left.

With --resume, so many of the clients go on by themselves where a stream breaks, which may then also
be of a replica, the proxy (with --haproxy: HAProxy), Serve's controller or a node that is killed:
they must have the same texts, too, and the others an error. A node is one of several raylets of
this machine, beside a head without replicas, and as many stand by. "poison" is a request that kills
its engine.

With --hostile nothing is broken; other clients send what may cost others something, from a process
of their own, in the second half of the run. The pauses of the streams are told for both halves.

    python -m benchmarks.chaos --seconds 180 --clients 64
    python -m benchmarks.chaos --replicas 2 --resume 0.5 --faults replica node controller poison
    python -m benchmarks.chaos --seconds 120 --clients 64 --hostile
"""

import argparse
import asyncio
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deployments import local_ray

os.environ.update(local_ray.prepare("--haproxy" in sys.argv), MANTA_FAULT_INJECTION="1")

import psutil
import ray
from ray import serve
from ray.cluster_utils import Cluster

from benchmarks.chaos_faults import BREAKING, FAULTS, NODE, Breaker
from benchmarks.chaos_streams import Report, client, undisturbed_texts
from deployments import app
from deployments.args import AppArgs

# What other clients' requests may cost a stream.
_NOTICED_S = 0.1


async def run(
    arguments: argparse.Namespace, url: str, cluster: Cluster | None, wanted: list[str]
) -> Report:
    report = Report()
    until = time.monotonic() + arguments.seconds
    async with asyncio.TaskGroup() as group:
        for i in range(arguments.clients):
            group.create_task(client(url, i, wanted, arguments, until, report))
        if arguments.hostile:
            report.attacked_at = until - arguments.seconds / 2
            group.create_task(hostile_clients(url, report.attacked_at, until))
        else:
            breaker = Breaker(url, cluster)
            group.create_task(breaker.run(arguments.faults, arguments.interval, until, report))
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


def print_report(report: Report, kinds: list[str]) -> None:
    print(
        f"{report.streams} streams; with another text: {len(report.wrong)}, with an error: "
        f"{len(report.errors)}; {report.resumed} times a client went on where its stream broke"
    )
    for error, count in Counter(report.errors).most_common():
        print(f"{count:6} times {error}")
    counts = Counter(kind for *_, kind in report.faults)
    for kind in kinds:
        pauses = report.pauses_of(kind)
        if len(pauses) > 1:
            cuts = statistics.quantiles(pauses, n=100)
            told = f"p50 {cuts[49]:.1f} s, p99 {cuts[98]:.1f} s"
        else:
            told = f"{pauses[0]:.1f} s" if pauses else "none"
        print(f"{kind}, {counts[kind]} times: {len(pauses)} pauses of streams, {told}")


@contextmanager
def server(arguments: argparse.Namespace) -> Iterator[tuple[str, Cluster | None]]:
    cluster = None
    try:
        if "node" in arguments.faults:
            cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
            num_faults = int(arguments.seconds / arguments.interval)  # nobody starts one later
            for _ in range(arguments.replicas + num_faults):
                cluster.add_node(**NODE)
            ray.init(address=cluster.address, log_to_driver=False)
        else:
            ray.init("local", num_cpus=16, include_dashboard=False, log_to_driver=False)
        http = {"host": "127.0.0.1", "port": arguments.port, "location": "HeadOnly"}
        serve.start(http_options=http)
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
        yield f"http://127.0.0.1:{arguments.port}", cluster
    finally:
        serve.shutdown()
        ray.shutdown()
        if cluster is not None:
            cluster.shutdown()


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
    parser.add_argument("--faults", nargs="+", default=FAULTS[:3], choices=FAULTS)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument(
        "--resume", type=float, default=0, help="share of clients that go on by themselves"
    )
    parser.add_argument("--haproxy", action="store_true", help="in place of Serve's own proxy")
    parser.add_argument("--hostile", action="store_true", help="break nothing, but bother")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--heartbeat-timeout", type=float, default=5)
    parser.add_argument("--port", type=int, default=18234)
    arguments = parser.parse_args()
    before = leftovers()
    wanted = undisturbed_texts(arguments)
    with server(arguments) as (url, cluster):
        report = asyncio.run(run(arguments, url, cluster, wanted))
        stats = serve.get_app_handle("chaos").stats.remote().result()
    time.sleep(2)
    if arguments.hostile:
        print_gaps(report)
    print_report(report, arguments.faults)
    held, left = stats["num_blocks"] - stats["free_blocks"], sorted(leftovers() - before)
    print(f"blocks held at the end: {held}")
    print(f"left behind: {left or 'nothing'}")
    is_idle = not (report.faults or arguments.hostile)
    # Streams of who does not go on are lost with their replica or proxy, and say so.
    may_break = arguments.resume < 1 and not set(BREAKING).isdisjoint(arguments.faults)
    if report.wrong or (report.errors and not may_break) or held or left or is_idle:
        raise SystemExit("failed")


if __name__ == "__main__":
    main()
