"""What a front costs per streamed token: HTTP, detokenizing and SSE, with a simulated engine.

The engine behind the front makes one token per request and step, a step every `--step-ms`; with 0
as fast as the front takes them, which then sends the tokens of several steps at once. Clients read
raw bytes and count events, in a process of their own. Under HAProxy, streams go straight from the
replica to the client; `--default-proxy` shows Serve's own proxy instead.

    python -m benchmarks.front --clients 64 --requests 1000
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import sys
import time
from typing import Any

from deployments import local_ray

os.environ.update(
    local_ray.prepare(haproxy=__name__ == "__main__" and "--default-proxy" not in sys.argv)
)

import psutil
import ray
from fastapi import FastAPI
from ray import serve

from deployments.api import build_api
from deployments.args import AppArgs
from deployments.front.front import Front
from deployments.wire import MessageSocket, decode_request

_PORT = 18345


@ray.remote(num_cpus=0)
class SimulatedEngine:
    """Speaks the engine's side of the wire; its model is a counter."""

    def run(self, address: str, step_s: float) -> None:
        connection = MessageSocket(address)
        limits = {
            "vocab_size": 1_000_000,
            "max_model_len": 100_000,
            "num_blocks": 10_000,
            "block_size": 32,
        }
        connection.send({"hello": {"limits": limits}})
        left: dict[str, int] = {}
        due = 0.0  # when the next step ends
        while True:
            wait = max(due - time.monotonic(), 0.0) if left else 0.5
            for message in connection.receive(wait):
                for request_id, packed in message.get("add", ()):
                    left[request_id] = decode_request(packed).params.max_tokens or 1
                for request_id in message.get("abort", ()):
                    left.pop(request_id, None)
            if left and time.monotonic() < due:
                continue
            due = time.monotonic() + step_s
            deltas = []
            for request_id in list(left):
                left[request_id] -= 1
                reason = None if left[request_id] else "length"
                deltas.append((request_id, [300 + left[request_id] % 500], reason, None, 0))
                if reason:
                    del left[request_id]
            connection.send({"deltas": deltas, "errors": [], "stats": {}, "cache": []})


@serve.deployment(max_ongoing_requests=10_000)
@serve.ingress()
class SimulatedReplica:
    """A real front before a simulated engine."""

    async def __init__(self, args: AppArgs, step_s: float) -> None:  # type: ignore[misc]
        self._front = Front(args)
        address = await self._front.client.listen()
        self._engine = SimulatedEngine.remote()  # type: ignore[attr-defined]
        self._run = self._engine.run.remote(address, step_s)
        await self._front.client.wait_connected()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self._front)

    async def cpu_seconds(self) -> float:
        times = psutil.Process().cpu_times()
        return times.user + times.system


async def _stream(body: bytes) -> tuple[int, float]:
    """(events, seconds to the first) of one request, read as raw bytes."""
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", _PORT)
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    )
    events, first = 0, 0.0
    while chunk := await reader.read(1 << 16):
        first = first or time.perf_counter() - start
        events += chunk.count(b'"delta":{"content"')
    writer.close()
    return events, first


async def _clients(num_clients: int, num_requests: int, num_tokens: int) -> dict[str, Any]:
    content = [{"role": "user", "content": "hello"}]
    body = json.dumps(
        {"messages": content, "max_tokens": num_tokens, "stream": True, "ignore_eos": True}
    ).encode()
    todo = iter(range(num_requests))
    results: list[tuple[int, float]] = []

    async def client() -> None:
        for _ in todo:
            results.append(await _stream(body))

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(num_clients)))
    return {
        "seconds": time.perf_counter() - start,
        "events": sum(events for events, _ in results),
        "ttft": statistics.median(first for _, first in results),
    }


def _run_clients(num_clients: int, num_requests: int, num_tokens: int, queue: Any) -> None:
    queue.put(asyncio.run(_clients(num_clients, num_requests, num_tokens)))


def measure(num_clients: int, num_requests: int, num_tokens: int) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(
        target=_run_clients, args=(num_clients, num_requests, num_tokens, queue)
    )
    process.start()
    result: dict[str, Any] = queue.get()
    process.join()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--step-ms", type=float, default=10.0, help="of the engine")
    parser.add_argument("--default-proxy", action="store_true", help="Serve's proxy, not HAProxy")
    arguments = parser.parse_args()
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": _PORT})
    args = AppArgs(max_model_len=2048)
    replica = SimulatedReplica.bind(args, arguments.step_ms / 1e3)  # type: ignore[attr-defined]
    handle = serve.run(replica, name="front")
    measure(arguments.clients, arguments.clients * 2, arguments.tokens)
    before = handle.cpu_seconds.remote().result()
    result = measure(arguments.clients, arguments.requests, arguments.tokens)
    cpu = handle.cpu_seconds.remote().result() - before
    num_tokens = arguments.requests * arguments.tokens
    print(
        f"{num_tokens} tokens in {result['events']} events and {result['seconds']:.1f} s: "
        f"{num_tokens / result['seconds']:.0f} tokens/s, "
        f"front CPU {cpu / num_tokens * 1e6:.1f} µs per token, "
        f"median time to first byte {result['ttft'] * 1e3:.0f} ms"
    )
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
