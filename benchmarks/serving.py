"""Throughput and latency of a running server over the number of clients, as a table and a plot.

Each client sends one chat after the other and streams the answer; with more clients the server does
more at once, until its devices are full. Prompts begin with a shared part, as most do in practice.

    manta serve                                            # in another shell
    manta bench serving --clients 1,4,16,64 --plot load.svg
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

_WORDS = [
    "apple",
    "river",
    "stone",
    "cloud",
    "house",
    "tree",
    "bread",
    "light",
    "music",
    "horse",
    "paper",
    "glass",
]
_BARS = 24


@dataclass
class Level:
    """What one number of clients got."""

    clients: int
    requests: int
    seconds: float
    output_tokens: int
    ttft_s: list[float] = field(repr=False, default_factory=list)
    itl_s: list[float] = field(repr=False, default_factory=list)  # mean of each request

    @property
    def tokens_per_s(self) -> float:
        return self.output_tokens / self.seconds


def quantile(values: list[float], share: float) -> float:
    """The value that `share` of the values do not exceed; nan when there is none."""
    if len(values) < 2:
        return values[0] if values else float("nan")
    return statistics.quantiles(values, n=100, method="inclusive")[round(share * 100) - 1]


def make_body(draw: random.Random, shared_words: int, own_words: int, max_tokens: int) -> Any:
    shared = " ".join(_WORDS[i % len(_WORDS)] for i in range(shared_words))
    own = " ".join(draw.choice(_WORDS) for _ in range(own_words))
    return {
        "messages": [{"role": "user", "content": f"{shared} Repeat these words: {own}"}],
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def ask(http: httpx.AsyncClient, body: Any, level: Level) -> None:
    """One streamed answer; raises httpx.HTTPStatusError unless the server gives one."""
    sent, first, last, tokens = time.perf_counter(), 0.0, 0.0, 0
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
            elif event["choices"][0]["delta"].get("content"):
                last = time.perf_counter()
                first = first or last
    level.requests += 1
    level.output_tokens += tokens
    if first:
        level.ttft_s.append(first - sent)
        if tokens > 1:
            level.itl_s.append((last - first) / (tokens - 1))


async def measure(
    http: httpx.AsyncClient, clients: int, bodies: list[Any], warm_up: bool = False
) -> Level:
    level = Level(clients, 0, 0.0, 0)
    todo = iter(bodies[: clients if warm_up else len(bodies)])

    async def client() -> None:
        for body in todo:
            await ask(http, body, level)

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    level.seconds = time.perf_counter() - start
    return level


async def run(arguments: argparse.Namespace) -> list[Level]:
    draw = random.Random(arguments.seed)
    key = os.environ.get("MANTA_API_KEY", "")
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=max(arguments.clients))
    headers = {"authorization": f"Bearer {key}"} if key else {}
    named = {"model": arguments.model} if arguments.model else {}
    levels = []
    async with httpx.AsyncClient(
        base_url=arguments.url, headers=headers, limits=limits, timeout=600
    ) as http:
        print(_line("clients", "req", "tok/s", "TTFT p50", "p95 ms", "ITL p50", "p95 ms"))
        for clients in arguments.clients:
            count = max(arguments.requests, 2 * clients)
            bodies = [
                named | make_body(draw, arguments.shared_words, arguments.words, arguments.tokens)
                for _ in range(count)
            ]
            await measure(http, clients, bodies, warm_up=True)
            levels.append(await measure(http, clients, bodies))
            print(_row(levels[-1], max(level.tokens_per_s for level in levels)), flush=True)
    return levels


def _line(*cells: str) -> str:
    return "  ".join(f"{cell:>9}" for cell in cells)


def _row(level: Level, most: float) -> str:
    times = [
        f"{quantile(values, share) * 1e3:.1f}"
        for values in (level.ttft_s, level.itl_s)
        for share in (0.5, 0.95)
    ]
    bar = "▇" * max(1, round(level.tokens_per_s / most * _BARS))
    return _line(
        str(level.clients), str(level.requests), f"{level.tokens_per_s:,.0f}", *times
    ) + f"  {bar}"  # fmt: skip


def plot(levels: list[Level], path: Path, title: str) -> None:
    """Throughput over clients beside latency over clients. Needs matplotlib."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    clients = [level.clients for level in levels]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    left.plot(clients, [level.tokens_per_s for level in levels], "o-", color="#0b6a71")
    left.set(title="Output tokens/s", xlabel="clients", xscale="log", ylim=(0, None))
    for values, label, colour in (
        ([level.ttft_s for level in levels], "TTFT", "#d8961a"),
        ([level.itl_s for level in levels], "ITL", "#0b6a71"),
    ):
        right.plot(
            clients, [quantile(v, 0.5) * 1e3 for v in values], "o-", color=colour, label=label
        )
        right.plot(
            clients, [quantile(v, 0.95) * 1e3 for v in values], "o--", color=colour, alpha=0.5
        )
    right.set(
        title="Latency in ms, p50 and p95 (dashed)", xlabel="clients", xscale="log", yscale="log"
    )
    right.legend(frameon=False)
    for axes in (left, right):
        axes.set_xticks(clients, [str(c) for c in clients])
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--model", help="its name, for servers that want to be told")
    parser.add_argument(
        "--clients",
        type=lambda text: [int(part) for part in text.split(",")],
        default=[1, 2, 4, 8, 16, 32],
        help="numbers of clients, such as 1,4,16",
    )
    parser.add_argument(
        "--requests", type=int, default=32, help="requests at each number, at least"
    )
    parser.add_argument("--tokens", type=int, default=64, help="output tokens of each request")
    parser.add_argument("--words", type=int, default=24, help="words of each prompt's own part")
    parser.add_argument("--shared-words", type=int, default=64, help="words all prompts begin with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="needs matplotlib")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    arguments = parser.parse_args()
    try:
        levels = asyncio.run(run(arguments))
    except httpx.HTTPStatusError as error:
        raise SystemExit(f"error: the server answered {error.response.status_code}") from None
    except httpx.TransportError as error:
        raise SystemExit(f"error: {arguments.url} cannot be reached ({error})") from None
    if arguments.plot:
        plot(levels, arguments.plot, f"{arguments.tokens} tokens a request, {arguments.url}")
    if arguments.json:
        figures = [asdict(level) | {"tokens_per_s": level.tokens_per_s} for level in levels]
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
