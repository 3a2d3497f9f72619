"""Clients that stream without pause, and know what they must get; for benchmarks.chaos."""

import argparse
import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from deployments.cli.client import EventLines
from engine import LLM, SamplingParams

# Pauses longer than this are taken for recoveries.
_PAUSE_S = 0.5
# How long a stream may say nothing, and be asked for where it cannot go on: what is longer, hangs.
_HANG_S = 120.0


@dataclass
class Report:
    """What the clients and the breaker saw; times are those of time.monotonic()."""

    streams: int = 0
    resumed: int = 0
    breaks: list[str] = field(default_factory=list)  # of streams that then went on
    wrong: list[int] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    faults: list[tuple[float, float, str]] = field(default_factory=list)  # (begin, end, kind)
    pauses: list[tuple[float, float]] = field(default_factory=list)  # (end, seconds)
    attacked_at: float = 0.0
    gaps: list[tuple[float, float]] = field(default_factory=list)  # (end, seconds), of all events

    def note_gap(self, seconds: float, now: float) -> None:
        self.gaps.append((now, seconds))
        if seconds > _PAUSE_S:
            self.pauses.append((now, seconds))

    def pauses_of(self, kind: str) -> list[float]:
        """Seconds until streams went on that a fault found, or that stopped right after it."""
        faults = [(begin, end + _PAUSE_S) for begin, end, own in self.faults if own == kind]
        return [
            seconds
            for end, seconds in self.pauses
            if any(begin <= end and end - seconds <= until for begin, until in faults)
        ]


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
    async with httpx.AsyncClient(timeout=_HANG_S) as http:
        while time.monotonic() < until:
            stream = _Stream(f"{url}/v1/completions", request(i, arguments), report)
            while not stream.has_ended:
                try:
                    await stream.ask(http)
                except httpx.HTTPError as error:
                    goes_on = resumes and time.monotonic() - stream.last < _HANG_S
                    report.resumed += goes_on
                    (report.breaks if goes_on else report.errors).append(repr(error))
                    await asyncio.sleep(0.2)
                    if not goes_on:
                        break
            report.streams += 1
            if stream.has_ended and stream.text != wanted[i]:
                report.wrong.append(i)
            i = (i + 1) % len(wanted)


class _Stream:
    """One answer, over as many connections as it takes."""

    def __init__(self, url: str, body: dict[str, Any], report: Report) -> None:
        self.text, self.has_ended, self.last = "", False, time.monotonic()
        self._url, self._body, self._report = url, body | {"stream": True}, report
        self._last_id = ""

    async def ask(self, http: httpx.AsyncClient) -> None:
        """Raises HTTPError where the events end before the end."""
        headers = {"last-event-id": self._last_id} if self._last_id else {}
        async with http.stream("POST", self._url, json=self._body, headers=headers) as response:
            if response.status_code != 200:
                await response.aread()
                raise httpx.HTTPError(f"{response.status_code} {response.text[:80]}")
            async for event_id, added in _events(response):
                now = time.monotonic()
                self._report.note_gap(now - self.last, now)
                self.text, self.last = self.text + added, now
                self._last_id = event_id or self._last_id
        self.has_ended = True


async def _events(response: httpx.Response) -> AsyncIterator[tuple[str, str]]:
    """(id or "", text) of each; raises HTTPError where they end before the end."""
    lines = EventLines()
    async for line in response.aiter_lines():
        for event_id, event in lines.read(line):
            if "choices" not in event:
                raise httpx.HTTPError(line)
            yield event_id, event["choices"][0]["text"]
        if lines.have_ended:
            return
    raise httpx.RemoteProtocolError("a stream without an end")
