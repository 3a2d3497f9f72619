"""What HTTP costs: the same requests over HTTP and through LLM.generate, taking turns.

The server is a front and an engine in processes of their own, as under Ray, where no call of Ray's
is on the way of a token; `--url` takes one that runs already, with the same model and settings. The
offline engine lives in this process; whichever is not asked sits idle.

    python -m benchmarks.serving_overhead --clients 64 --requests 256 --rounds 3
    python -m benchmarks.serving_overhead --rate 20   # Poisson arrivals: for latency, not the ratio

Prints tokens/s of both and their ratio, TTFT, ITL and latency of the requests over HTTP, and the
CPU time of the front per streamed token.
"""

import argparse
import asyncio
import json
import multiprocessing
import random
import socket
import statistics
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any
from urllib.parse import urlsplit

import psutil

from benchmarks.serving import quantile
from deployments.args import AppArgs

_START_TIMEOUT_S = 600


@dataclass
class Timing:
    """One streamed answer, in seconds."""

    latency: float
    arrivals: list[float] = field(default_factory=list)  # of its tokens, since it was asked for

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in zip(self.arrivals, self.arrivals[1:], strict=False)]


def make_bodies(count: int, vocabulary: int, longest: int, seed: int) -> list[dict[str, Any]]:
    """Random prompts and lengths, each half to all of `longest` tokens."""
    draw = random.Random(seed)
    return [
        {
            "prompt": [
                draw.randrange(vocabulary) for _ in range(draw.randint(longest // 2, longest))
            ],
            "max_tokens": draw.randint(longest // 2, longest),
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
        }
        for _ in range(count)
    ]


async def ask(host: str, port: int, prefix: str, body: dict[str, Any]) -> Timing:
    """Reads raw bytes: the client shares the machine and must cost little."""
    content = json.dumps(body).encode()
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection(host, port, limit=1 << 20)
    writer.write(
        f"POST {prefix}/v1/completions HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n".encode()
        + content
    )
    timing, is_done = Timing(0.0), False
    while chunk := await reader.read(1 << 16):
        now = time.perf_counter() - start
        timing.arrivals += [now] * chunk.count(b'data: {"')
        is_done = is_done or b"data: [DONE]" in chunk
    writer.close()
    if not is_done or not timing.arrivals:
        raise SystemExit("error: the server broke a stream off, or refused a request")
    timing.latency = time.perf_counter() - start
    return timing


async def run_http(
    url: str, bodies: list[dict[str, Any]], clients: int, rate: float | None
) -> tuple[float, list[Timing]]:
    """Seconds for all, and each one's timing."""
    parts = urlsplit(url)
    address = (parts.hostname or "127.0.0.1", parts.port or 80, parts.path.rstrip("/"))
    draw = random.Random(0)
    timings: list[Timing] = []
    todo = iter(bodies)

    async def client() -> None:
        for body in todo:
            timings.append(await ask(*address, body))

    start = time.perf_counter()
    if rate is None:
        await asyncio.gather(*(client() for _ in range(clients)))
    else:
        async with asyncio.TaskGroup() as group:
            tasks = []
            for body in bodies:
                tasks.append(group.create_task(ask(*address, body)))
                await asyncio.sleep(draw.expovariate(rate))
        timings = [task.result() for task in tasks]
    return time.perf_counter() - start, timings


def serve(args: AppArgs, ready: Connection) -> None:
    """A front and uvicorn, with the engine in a process below; tells (url, pid) when it serves."""
    import uvicorn

    from deployments.api import build_api
    from deployments.front.front import Front

    async def main() -> None:
        front = Front(args)
        address = await front.client.listen()
        context = multiprocessing.get_context("spawn")
        engine = context.Process(target=run_engine, args=(args, address), daemon=True)
        engine.start()
        await front.client.wait_connected()
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            ready.send((f"http://127.0.0.1:{listening.getsockname()[1]}", psutil.Process().pid))
            config = uvicorn.Config(build_api(front, args), log_level="error")
            await uvicorn.Server(config).serve(sockets=[listening])
        await front.client.close()
        engine.join(10)

    asyncio.run(main())


def run_engine(args: AppArgs, address: str) -> None:
    from deployments.shards.engine_loop import EngineLoop
    from engine.engine import Engine

    EngineLoop(Engine(args.engine_config), address).run()


def compare(arguments: argparse.Namespace, args: AppArgs, url: str, pid: int | None) -> None:
    from engine import LLM, SamplingParams

    llm = LLM(args.model, **args.engine_config.model_dump(exclude={"model"}, exclude_unset=True))
    bodies = make_bodies(
        arguments.requests, llm.engine.limits.vocab_size, arguments.longest, arguments.seed
    )
    params = [
        SamplingParams(temperature=0, ignore_eos=True, max_tokens=body["max_tokens"])
        for body in bodies
    ]
    num_tokens = sum(body["max_tokens"] for body in bodies)
    prompts = [body["prompt"] for body in bodies]

    def offline() -> float:
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - start

    def over_http() -> tuple[float, list[Timing]]:
        return asyncio.run(run_http(url, bodies, arguments.clients, arguments.rate))

    over_http(), offline()  # both warm: what is slow the first time is no one's cost
    ratios, all_timings, front_us = [], [], []
    for number in range(arguments.rounds):
        offline_s = offline() if number % 2 else 0.0  # they take turns at going first, too
        before = _cpu_s(pid)
        seconds, timings = over_http()
        front_us.append((_cpu_s(pid) - before) / num_tokens * 1e6)
        offline_s = offline_s or offline()
        ratios.append(offline_s / seconds)
        all_timings += timings
        print(
            f"round {number + 1}: HTTP {num_tokens / seconds:,.0f} tokens/s, "
            f"LLM.generate {num_tokens / offline_s:,.0f} tokens/s, ratio {ratios[-1]:.3f}",
            flush=True,
        )
    report(all_timings)
    print(f"median ratio {statistics.median(ratios):.3f}")
    if pid is not None:
        print(f"front: {statistics.median(front_us):.1f} µs CPU per streamed token")


def report(timings: list[Timing]) -> None:
    print(f"{'ms':>8}{'p50':>10}{'p99':>10}")
    for name, values in (
        ("TTFT", [timing.arrivals[0] for timing in timings]),
        ("ITL", [gap for timing in timings for gap in timing.gaps]),
        ("latency", [timing.latency for timing in timings]),
    ):
        print(f"{name:>8}{quantile(values, 0.5) * 1e3:10.1f}{quantile(values, 0.99) * 1e3:10.1f}")


def _cpu_s(pid: int | None) -> float:
    if pid is None:
        return 0.0
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", help="of a running server; default: start one")
    parser.add_argument("--model", default="manta-demo")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rate", type=float, help="requests per second, at Poisson's intervals")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--longest", type=int, default=128, help="tokens of prompts and of outputs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--load-format", default="safetensors", choices=["safetensors", "dummy"])
    parser.add_argument("--num-threads", type=int, help="of each engine")
    arguments = parser.parse_args()
    options = {"num_threads": arguments.num_threads} if arguments.num_threads else {}
    args = AppArgs(
        model=arguments.model,
        load_format=arguments.load_format,
        max_num_seqs=arguments.clients,
        max_model_len=2 * arguments.longest,
        enable_prefix_caching=False,  # the rounds are alike
        request_log="off",
        **options,
    )
    if arguments.url:
        compare(arguments, args, arguments.url, None)
        return
    context = multiprocessing.get_context("spawn")
    ready, ready_there = context.Pipe()
    server = context.Process(target=serve, args=(args, ready_there))
    server.start()
    try:
        if not ready.poll(_START_TIMEOUT_S):
            raise SystemExit("error: the server did not start")
        compare(arguments, args, *ready.recv())
    finally:
        server.terminate()
        server.join(20)


if __name__ == "__main__":
    main()
