"""Server-sent events, and the outputs of several prompts as one stream."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi.responses import StreamingResponse

from deployments.api.errors import report
from deployments.front.front import TextDelta
from engine.schedule.step import TokenLogprobs

T = TypeVar("T")


@dataclass(frozen=True)
class Output:
    """A whole output, for answers that are not streamed."""

    text: str
    num_tokens: int
    num_cached_tokens: int
    finish_reason: str | None
    stop_reason: int | str | None
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    token_ids: Sequence[int] = ()

    @property
    def mean_logprob(self) -> float:
        """Per token, if it has logprobs."""
        if not self.logprobs:
            return 0.0
        return sum(position.logprobs[0] for position in self.logprobs) / len(self.logprobs)


async def collect(deltas: AsyncGenerator[TextDelta]) -> Output:
    """Raises what the stream raises."""
    text: list[str] = []
    token_ids: list[int] = []
    logprobs, prompt_logprobs = None, None
    async for delta in deltas:
        text.append(delta.text)
        token_ids += delta.token_ids
        if delta.logprobs is not None:
            logprobs = (logprobs or []) + delta.logprobs
        prompt_logprobs = prompt_logprobs or delta.prompt_logprobs
    return Output(
        "".join(text),
        delta.num_tokens,
        delta.num_cached_tokens,
        delta.finish_reason,
        delta.stop_reason,
        logprobs,
        prompt_logprobs,
        token_ids,
    )


async def collect_all(streams: Sequence[AsyncGenerator[TextDelta]]) -> list[Output]:
    """As `collect`, of several at once; if one fails the others are given up."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(collect(stream)) for stream in streams]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None  # one answer has one error
    return [task.result() for task in tasks]


async def merge(
    streams: Sequence[AsyncGenerator[T]],
) -> AsyncGenerator[list[tuple[int, T]]]:
    """(index of stream, item) as items come, those of one step together.

    Leaving early closes all streams.
    """
    if len(streams) == 1:
        async for item in streams[0]:
            yield [(0, item)]
        return
    arrived: asyncio.Queue[tuple[int, T] | Exception | None] = asyncio.Queue()

    async def forward(index: int, stream: AsyncGenerator[T]) -> None:
        try:
            async for item in stream:
                arrived.put_nowait((index, item))
            arrived.put_nowait(None)
        except Exception as error:
            arrived.put_nowait(error)

    tasks = [asyncio.create_task(forward(i, stream)) for i, stream in enumerate(streams)]
    try:
        open_streams = len(tasks)
        while open_streams:
            news = [await arrived.get()]
            while not arrived.empty():  # a step's tokens have come in one turn of the event loop
                news.append(arrived.get_nowait())
            for error in news:
                if isinstance(error, Exception):
                    raise error
            open_streams -= news.count(None)
            if items := [item for item in news if isinstance(item, tuple)]:
                yield items
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def event(content: dict[str, Any]) -> str:
    return f"data: {_to_json(content)}\n\n"


async def await_first(events: AsyncGenerator[T]) -> AsyncGenerator[T]:
    """The same once the first is there. What is raised until then is an answer of its own."""
    first = await anext(events)

    async def rest() -> AsyncGenerator[T]:
        async with aclosing(events):
            yield first
            async for item in events:
                yield item

    return rest()


class Chunks:
    """Events of one choice each that all begin alike, which is encoded once."""

    def __init__(self, head: dict[str, Any]) -> None:
        self._head = _to_json(head)[:-1]

    def event(self, choice: dict[str, Any], usage: dict[str, Any] | None = None) -> str:
        counts = f',"usage":{_to_json(usage)}' if usage is not None else ""
        return f'data: {self._head},"choices":[{_to_json(choice)}]{counts}}}\n\n'


def named_event(content: dict[str, Any]) -> str:
    """An event that says its type twice, as the Responses API has it."""
    return f"event: {content['type']}\n{event(content)}"


def end_of_chunks(error: Exception | None) -> str:
    """How streams of completions end: an error after the first byte becomes the last event."""
    return ("" if error is None else event(report(error).body())) + "data: [DONE]\n\n"


def event_stream(
    events: AsyncGenerator[str],
    end: Callable[[Exception | None], str] = end_of_chunks,
    headers: Mapping[str, str] | None = None,
) -> StreamingResponse:
    """The response.

    Args:
        end: what comes last, given what went wrong, if anything did.
    """

    async def guarded() -> AsyncGenerator[str]:
        failure: Exception | None = None
        try:
            async with aclosing(events):
                async for item in events:
                    yield item
        except Exception as error:
            failure = error
        if last := end(failure):
            yield last

    return StreamingResponse(
        guarded(),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache", **(headers or {})},
    )
