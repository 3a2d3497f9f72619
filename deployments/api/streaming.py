"""Server-sent events."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

import pydantic_core
from fastapi.responses import StreamingResponse
from starlette.types import Message, Send

from deployments.api.errors import report
from deployments.front.generation import STARTED_AT_ONCE
from engine.sampling_params import SamplingParams

T = TypeVar("T")


async def start_all(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list["asyncio.Task[T]"]:
    """A few at a time: each has something to do before it first waits, and others want to run too.

    When it is cancelled, so are those that it has started.
    """
    tasks: list[asyncio.Task[T]] = []
    try:
        for number, coroutine in enumerate(coroutines, start=1):
            tasks.append(asyncio.create_task(coroutine))
            if number % STARTED_AT_ONCE == 0:
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


def to_json(value: Any) -> str:
    return pydantic_core.to_json(value).decode()


def event(content: dict[str, Any]) -> str:
    return f"data: {to_json(content)}\n\n"


async def once_accepted(events: AsyncGenerator[T], params: SamplingParams) -> AsyncGenerator[T]:
    """The same events, to be streamed; raises what the engine says of a grammar that it refuses.

    It has looked at the grammar when the first event is there. Tools have one, too.
    """
    if params.structured_outputs is None:
        return events
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


class EventStream(StreamingResponse):
    """Texts of events as they come, each in a write of its own."""

    def __init__(
        self,
        events: AsyncGenerator[str],
        end: Callable[[Exception | None], str] = end_of_chunks,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            end: what comes last, given what went wrong, if anything did.
        """
        headers = {"Cache-Control": "no-cache", **(headers or {})}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._events = events
        self._end = end

    async def stream_response(self, send: Send) -> None:
        start = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **start})
        failure: Exception | None = None
        async with aclosing(self._events) as events:
            while True:
                try:
                    text = await anext(events)
                except StopAsyncIteration:
                    break
                except Exception as error:
                    failure = error
                    break
                await send(_body(text, more=True))
        await send(_body(self._end(failure), more=False))


def _body(text: str, more: bool) -> Message:
    return {"type": "http.response.body", "body": text.encode(), "more_body": more}
