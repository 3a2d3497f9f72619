"""The front's side of the wire: hands requests to the engine and tokens to whoever awaits them.

The client owns every live request, with the tokens it has had so far; engines come and go. Whenever
one connects, it is given all of them, and each goes on where it stopped.
"""

import asyncio
import itertools
import tempfile
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deployments.metrics import Metrics
from deployments.places import Places
from deployments.request_record import RequestOptions, RequestRecord
from deployments.wire import Message, decode_delta, encode_request, pack, read_message
from engine.request import Request, RequestLimits
from engine.sampling_params import SamplingParams
from engine.step import TokenDelta

# How long an engine draws views for a front that does not ask again, in seconds.
_WATCH_S = 2.0


class EngineUnavailableError(Exception):
    """No engine is there to serve the request, and none is about to be."""


class RequestRefusedError(Exception):
    """The engine cannot serve the request as it is."""


class RequestTimeoutError(Exception):
    """The request has had all the time that it may take."""


@dataclass(eq=False)
class _Live:
    request: Request
    stream: bool
    record: RequestRecord
    is_queued: bool = True  # no token has come yet
    arrived: asyncio.Queue[TokenDelta | Exception] = field(default_factory=asyncio.Queue)


class EngineClient:
    """Listens on a Unix socket for one engine at a time."""

    def __init__(self, model_name: str = "") -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="manta-")
        self.address = str(Path(self._directory.name) / "engine.sock")
        self.limits: RequestLimits | None = None  # from the first hello
        self.stats: dict[str, Any] = {}
        self.metrics = Metrics(model_name, lambda: self.stats)
        self.queue = Places()  # of requests without a token yet
        self.queue_tokens = Places()  # of their prompts
        self.view: dict[str, Any] | None = None  # the latest `EngineView`, while watched
        self.cached_blocks: set[bytes] = set()  # hashes of the blocks in the engine's prefix cache
        self._live: dict[str, _Live] = {}
        self._ids = itertools.count()
        self._server: asyncio.Server | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._outbox: Message = {}
        self._connected = asyncio.Event()
        self._failure: EngineUnavailableError | None = None
        self._last_beat = time.monotonic()
        self._watched_until = 0.0

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, self.address)

    @property
    def is_connected(self) -> bool:
        return self._writer is not None

    async def wait_connected(self) -> None:
        """Returns once an engine has said hello."""
        await self._connected.wait()

    def check_available(self) -> None:
        """Raises EngineUnavailableError when no engine will come, not while one restarts."""
        if self._failure is not None:
            raise self._failure

    @property
    def num_live(self) -> int:
        return len(self._live)

    def is_silent(self, timeout_s: float) -> bool:
        """Whether an engine is connected but has sent nothing for so long.

        An engine sends a message every step and, when idle, every heartbeat.
        """
        return self._writer is not None and time.monotonic() - self._last_beat > timeout_s

    async def generate(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        seed: int,
        options: RequestOptions,
        record: RequestRecord,
    ) -> AsyncGenerator[TokenDelta]:
        """The tokens of one request, as they come; leaving the iteration early aborts it.

        Without `options.stream` they come all at once with the last one: nobody is woken every
        step. Raises EngineUnavailableError, RequestRefusedError, and RequestTimeoutError.
        """
        self.check_available()
        request = Request(
            str(next(self._ids)),
            prompt_token_ids,
            params,
            seed,
            options.cache_salt,
            priority=options.priority,
            flow=options.flow,
        )
        live = self._live[request.id] = _Live(request, options.stream, record)
        self.queue.take(request.flow, 1)
        self.queue_tokens.take(request.flow, len(prompt_token_ids))
        self._send("add", encode_request(request))
        deadline = self._set_deadline(live, options.timeout_s)
        try:
            while True:
                delta = await live.arrived.get()
                if isinstance(delta, Exception):
                    record.finish_reason = _reason(delta)
                    raise delta
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            if deadline is not None:
                deadline.cancel()
            if self._live.pop(request.id, None) is not None:
                self._send("abort", request.id)
            self._leave_queue(live)
            self.metrics.count_end(record, time.monotonic())

    def _set_deadline(self, live: _Live, timeout_s: float | None) -> asyncio.TimerHandle | None:
        if timeout_s is None:
            return None
        error = RequestTimeoutError(f"the request took longer than its {timeout_s:g} s")
        return asyncio.get_running_loop().call_later(timeout_s, live.arrived.put_nowait, error)

    def _leave_queue(self, live: _Live) -> None:
        if live.is_queued:
            live.is_queued = False
            self.queue.give_back(live.request.flow, 1)
            self.queue_tokens.give_back(live.request.flow, len(live.request.prompt_token_ids))

    def watch(self) -> dict[str, Any]:
        """The engine as it is now: {"connected", "live", "view"}.

        The engine draws the view only while somebody calls this, and the first one takes a step
        to come: until then it is None.
        """
        now = time.monotonic()
        if now > self._watched_until:
            self.view = None  # from an earlier watch
        if now > self._watched_until - _WATCH_S / 2 and self._writer is not None:
            self._watched_until = now + _WATCH_S
            self._writer.write(pack({"watch": _WATCH_S}))
        return {"connected": self.is_connected, "live": self.num_live, "view": self.view}

    def fail(self, error: EngineUnavailableError) -> None:
        """End every live request with an error, and refuse new ones: no engine will come."""
        self._failure = error
        for live in self._live.values():
            live.arrived.put_nowait(error)
        self._live.clear()

    def _send(self, kind: str, item: Any) -> None:
        """Queue for the next message; all that one turn of the event loop brings goes into one."""
        if self._writer is None:
            return  # live requests are sent when an engine connects
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outbox.setdefault(kind, []).append(item)

    def _flush(self) -> None:
        message, self._outbox = self._outbox, {}
        if self._writer is not None:
            self._writer.write(pack(message))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Talk to one engine until it goes away."""
        try:
            hello = await read_message(reader)
            self.limits = RequestLimits(**hello["hello"]["limits"])
            self._adopt(writer)
            while True:
                message = await read_message(reader)
                if self._writer is not writer:
                    break  # given up meanwhile: its requests are another engine's now
                self._take_in(message)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            if self._writer is writer:
                self.disconnect()
            writer.close()

    def disconnect(self) -> None:
        """Give up the engine, if there is one; its requests wait for the next."""
        if self._writer is not None:
            self._writer.close()
        self._writer = None
        self.stats, self.view = {}, None
        self._watched_until = 0.0
        self._connected.clear()

    def _adopt(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._outbox = {}
        self.cached_blocks.clear()
        self._last_beat = time.monotonic()
        self.metrics.engine_starts += 1
        self._connected.set()
        if self._live:
            requests = [encode_request(live.request) for live in self._live.values()]
            writer.write(pack({"add": requests}))

    def _take_in(self, message: Message) -> None:
        self._last_beat = time.monotonic()
        self.stats = message["stats"]
        self.view = message.get("view", self.view)
        for block_hash, cached in message["cache"]:
            if cached:
                self.cached_blocks.add(block_hash)
            else:
                self.cached_blocks.discard(block_hash)
        for fields in message["deltas"]:
            delta = decode_delta(fields)
            live = self._live.get(delta.request_id)
            if live is None:
                continue  # aborted while the step ran
            live.request.output_token_ids += delta.token_ids
            self.metrics.count_tokens(live.record, len(delta.token_ids), self._last_beat)
            if live.is_queued:
                self._leave_queue(live)
                live.record.num_cached = delta.num_cached_tokens
            if delta.finish_reason is not None:
                del self._live[delta.request_id]
                live.record.finish_reason = delta.finish_reason
            if live.stream:
                live.arrived.put_nowait(delta)
            elif delta.finish_reason is not None:
                whole = replace(delta, token_ids=live.request.output_token_ids)
                live.arrived.put_nowait(whole)
        for request_id, reason in message["errors"]:
            refused = self._live.pop(request_id, None)
            if refused is not None:
                refused.arrived.put_nowait(RequestRefusedError(reason))

    async def close(self) -> None:
        """Let the engine go: it ends when the connection does."""
        self.fail(EngineUnavailableError("the server is shutting down"))
        self.disconnect()
        if self._server is not None:
            self._server.close()
        self._directory.cleanup()


def _reason(error: Exception) -> str:
    return "timeout" if isinstance(error, RequestTimeoutError) else "error"
