"""Answers that are not streamed.

With log-probabilities they are as large as anything here: tens of megabytes. Such an answer is put
together and written in a thread, and in pieces, for the encoder in C lets nothing else run.
"""

from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi.responses import Response

from deployments.api.streaming import to_json
from deployments.front.generation import TextDelta, TextDeltas
from deployments.off_loop import off_loop
from engine.schedule.step import TokenLogprobs

T = TypeVar("T")

_SHORT = 64 * 1024  # characters, written in about a millisecond
_POSITION_CHARACTERS = 1000  # of a token with its log-probabilities
_PIECE_DEPTH = 5  # lists of tokens are in: the answer, its choices, one of them, its logprobs


@dataclass
class Output:
    """An output as far as it has come: whole in the end, for answers that are not streamed."""

    parts: list[str] = field(default_factory=list)  # of its text
    num_tokens: int = 0
    num_cached_tokens: int = 0
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    token_ids: list[int] = field(default_factory=list)

    def add(self, delta: TextDelta, finish_reason: str | None) -> None:
        self.parts.append(delta.text)
        self.num_tokens = delta.num_tokens
        self.num_cached_tokens = delta.num_cached_tokens
        self.finish_reason, self.stop_reason = finish_reason, delta.stop_reason
        if delta.logprobs is not None:
            self.logprobs = self.logprobs or []
            self.logprobs += delta.logprobs
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        self.token_ids += delta.token_ids

    @property
    def text(self) -> str:
        return "".join(self.parts)

    @property
    def mean_logprob(self) -> float:
        """Per token, if it has logprobs."""
        if not self.logprobs:
            return 0.0
        return sum(position.logprobs[0] for position in self.logprobs) / len(self.logprobs)


async def collect(steps: AsyncIterator[TextDeltas], num_outputs: int) -> list[Output]:
    """Raises what the iteration raises."""
    outputs = [Output() for _ in range(num_outputs)]
    async for news in steps:
        for index, delta in news:
            outputs[index].add(delta, delta.finish_reason)
    return outputs


@dataclass(frozen=True)
class Whole:
    """An answer, once all of it is there."""

    outputs: list[Output]
    put_together: Callable[[list[Output]], dict[str, Any]]

    async def content(self) -> dict[str, Any]:
        return await self._work(lambda: self.put_together(self.outputs))

    async def response(self) -> Response:
        body = await self._work(
            lambda: "".join(_pieces(self.put_together(self.outputs), _PIECE_DEPTH)).encode()
        )
        return Response(body, media_type="application/json")

    async def _work(self, work: Callable[[], T]) -> T:
        """At once where it is short, else in a thread; what it leaves behind is freed there too."""
        size = sum(map(_size, self.outputs))
        return work() if size < _SHORT else await off_loop(size, work)


def _size(output: Output) -> int:
    positions = len(output.logprobs or ()) + len(output.prompt_logprobs or ())
    return len(output.text) + positions * _POSITION_CHARACTERS


def _pieces(value: Any, depth: int) -> Iterator[str]:
    """JSON, of which no piece is long."""
    if not (depth and value and isinstance(value, dict | list)):
        yield to_json(value)
        return
    is_dict = isinstance(value, dict)
    separator = "{" if is_dict else "["
    for item in value:
        yield f"{separator}{to_json(item)}:" if is_dict else separator
        yield from _pieces(value[item] if is_dict else item, depth - 1)
        separator = ","
    yield "}" if is_dict else "]"
