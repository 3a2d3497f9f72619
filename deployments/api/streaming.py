"""Server-sent events, and several streams as one."""

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

import pydantic_core
from fastapi.responses import StreamingResponse

from deployments.api.errors import report

T = TypeVar("T")

_STARTED_AT_ONCE = 16


async def start_all(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list["asyncio.Task[T]"]:
    """A few at a time: each has something to do before it first waits, and others want to run too.

    When it is cancelled, so are those that it has started.
    """
    tasks: list[asyncio.Task[T]] = []
    try:
        for number, coroutine in enumerate(coroutines, start=1):
            tasks.append(asyncio.create_task(coroutine))
            if number % _STARTED_AT_ONCE == 0:
                await asyncio.sleep(0)
    except asyncio.CancelledError:
        await cancel_all(tasks)
        raise
    return tasks


async def cancel_all(tasks: Sequence["asyncio.Task[Any]"]) -> None:
    """Returns when they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


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

    tasks = await start_all(itertools.starmap(forward, enumerate(streams)))
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
        await cancel_all(tasks)


def to_json(value: Any) -> str:
    return pydantic_core.to_json(value).decode()


def event(content: dict[str, Any]) -> str:
    return f"data: {to_json(content)}\n\n"


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
        self._head = to_json(head)[:-1]

    def event(self, choice: dict[str, Any], usage: dict[str, Any] | None = None) -> str:
        counts = f',"usage":{to_json(usage)}' if usage is not None else ""
        return f'data: {self._head},"choices":[{to_json(choice)}]{counts}}}\n\n'


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
