"""The front's side of the wire: hands requests to the engine and tokens to whoever awaits them.

The client owns every live request, with the tokens it has had so far; engines come and go. Whenever
one connects, it is given all of them, and each goes on where it stopped.
"""

import asyncio
import itertools
import tempfile
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deployments.args import AppArgs, DeploymentArgs
from deployments.cached_blocks import CachedBlocks
from deployments.front.arrivals import Arrivals
from deployments.front.heartbeat import Heartbeat
from deployments.front.places import Places
from deployments.front.quarantine import MAX_DEATHS, Quarantine
from deployments.front.request_options import RequestOptions
from deployments.observe.metrics import Metrics
from deployments.observe.request_record import RequestRecord
from deployments.wire import Message, decode_delta, encode_request, pack, read_message
from engine.sampling_params import SamplingParams
from engine.schedule.request import Request, RequestLimits
from engine.schedule.step import TokenDelta

# How long an engine draws views for a front that does not ask again, in seconds.
_WATCH_S = 2.0
Order = Literal["start_profile", "stop_profile", "sleep", "wake_up", "update_weights_from_disk"]


class EngineUnavailableError(Exception):
    """No engine is there to serve the request, and none is about to be."""


class EngineAsleepError(EngineUnavailableError):
    """The engine is there and takes no requests until it is told to."""

    def __init__(self) -> None:
        super().__init__("the engine is asleep; POST /wake_up wakes it up")


class RequestRefusedError(Exception):
    """The engine cannot serve the request as it is."""


class RequestFailedError(Exception):
    """The engine fails at the request, through no fault that could be named."""


class RequestTimeoutError(Exception):
    """The request has had all the time that it may take."""


@dataclass(eq=False)
class Live:
    """A request that has been started and not left."""

    request: Request
    packed: bytes  # until it is sent
    stream: bool
    record: RequestRecord
    arrivals: Arrivals
    index: int  # in them
    is_queued: bool = True  # no token has come yet
    predicted_before: tuple[int, int] = (0, 0)  # by engines before this one
    deadline: asyncio.TimerHandle | None = None

    def fail(self, error: Exception) -> None:
        is_late = isinstance(error, RequestTimeoutError)
        self.record.finish_reason = "timeout" if is_late else "error"
        self.arrivals.fail(error)

    def count_predicted(self, delta: TokenDelta) -> None:
        accepted, rejected = self.predicted_before
        accepted += delta.num_predicted[0]
        self.record.num_predicted = accepted, rejected + delta.num_predicted[1]


class EngineClient:
    """Listens on a Unix socket for one engine at a time."""

    def __init__(self, args: DeploymentArgs | None = None) -> None:
        args = args or AppArgs()
        self.limits: RequestLimits | None = None  # from the first hello
        self.stats: dict[str, Any] = {}
        self.metrics = Metrics(args, lambda: self.stats)
        self.heartbeat = Heartbeat(args, lambda: self.stats)
        # The checkpoint of an engine that comes in this one's place; None: the model's own.
        self.weights = args.weights
        self._startup_timeout_s = args.startup_timeout_s
        self.queue = Places()  # of requests without a token yet
        self.queue_tokens = Places()  # of their prompts
        self.view: dict[str, Any] | None = None  # the latest `EngineView`, while watched
        self.cached_blocks = CachedBlocks()  # a new one for every engine
        self.num_blamed = 0  # deaths of engines that are laid to a request
        self._live: dict[str, Live] = {}
        self._ids = itertools.count()
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self._server: asyncio.Server | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._quarantine = Quarantine()
        self._aborted: list[str] = []  # to be told to the engine
        self._is_flush_due = False
        self._connected = asyncio.Event()
        self._failure: EngineUnavailableError | None = None
        self._watched_until = 0.0
        self._orders: deque[asyncio.Future[str | None]] = deque()  # not yet answered
        self.is_sleeping = False

    async def listen(self, directory: Path | None = None) -> str:
        """Expect an engine; returns the address of the socket, which is gone once it has come.

        So nothing is left of it when this process is killed, and no other engine gets in.

        Args:
            directory: where to put it, for nobody takes it away if this process is killed before.
        """
        self._stop_listening()
        self._directory = tempfile.TemporaryDirectory(prefix="manta-", dir=directory)
        address = str(Path(self._directory.name) / "engine.sock")
        self._server = await asyncio.start_unix_server(self._serve, address)
        return address

    def _stop_listening(self) -> None:
        if self._server is not None and self._directory is not None:
            self._server.close()
            self._directory.cleanup()
        self._server = self._directory = None

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

    @property
    def is_silent(self) -> bool:
        """Whether an engine is connected but has sent nothing for longer than it would.

        What it is ordered to do may take as long as a start, which loads weights too.
        """
        if self._orders:
            return time.monotonic() - self.heartbeat.last > self._startup_timeout_s
        return self._writer is not None and self.heartbeat.is_silent

    def start(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        seed: int,
        options: RequestOptions,
        record: RequestRecord,
        arrivals: Arrivals,
        index: int = 0,
    ) -> Live:
        """Have an engine make the output of one request; what comes of it is put into `arrivals`.

        Without `options.stream` nobody is woken before the last token. What fails it is one of the
        errors above. Whoever starts it must `leave` it.
        Raises EngineUnavailableError when there will be no engine.
        """
        self.check_available()
        request = Request(
            str(next(self._ids)),
            prompt_token_ids,
            params,
            seed,
            options.cache_salt,
            priority=options.priority,
            cache_owner=options.cache_owner,
            flow=options.flow,
            prediction_token_ids=options.prediction,
            weight=options.weight,
            output_token_ids=list(options.known_tokens),
        )
        # Packed here, where it fails nobody else if it cannot be.
        packed = encode_request(request)
        live = Live(request, packed, options.stream, record, arrivals, index)
        self._live[request.id] = live
        self.queue.take(request.flow, 1)
        self.queue_tokens.take(request.flow, record.num_prompt)
        self._quarantine.add(request.id)
        self._flush_soon()
        if options.timeout_s is not None:
            loop = asyncio.get_running_loop()
            live.deadline = loop.call_later(
                options.timeout_s, self._expire, live, options.timeout_s
            )
        return live

    def leave(self, live: Live) -> None:
        """Nobody waits for it any more: it is aborted, unless it has ended."""
        if live.deadline is not None:
            live.deadline.cancel()
        if self._live.pop(live.request.id, None) is not None:
            self._aborted.append(live.request.id)
        self._quarantine.remove(live.request.id)
        self._flush_soon()
        self._leave_queue(live)
        self.metrics.count_end(live.record, time.monotonic())

    def _expire(self, live: Live, timeout_s: float) -> None:
        if live.request.id in self._live:
            live.fail(RequestTimeoutError(f"the request took longer than its {timeout_s:g} s"))

    def _leave_queue(self, live: Live) -> None:
        if live.is_queued:
            live.is_queued = False
            self.queue.give_back(live.request.flow, 1)
            self.queue_tokens.give_back(live.request.flow, live.record.num_prompt)

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

    async def order(self, what: Order, *arguments: str) -> str | None:
        """Have the engine do this; returns why not, if it could not.

        Raises EngineUnavailableError while there is none, and when it goes before it has answered.
        """
        if self._writer is None:
            raise EngineUnavailableError("there is no engine")
        self._flush()  # what has come before it is there before it
        answer = asyncio.get_running_loop().create_future()
        self._orders.append(answer)
        self._writer.write(pack({"order": [what, *arguments]}))
        failure: str | None = await asyncio.shield(answer)
        return failure

    def fail(self, error: EngineUnavailableError) -> None:
        """End every live request with an error, and refuse new ones: no engine will come."""
        self._failure = error
        for live in self._live.values():
            live.fail(error)
        self._live.clear()
        self._quarantine = Quarantine()

    def _flush_soon(self) -> None:
        """All that one turn of the event loop brings goes into one message."""
        if not self._is_flush_due:
            self._is_flush_due = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        """Send the engine the requests whose turn it is, and what has been aborted."""
        self._is_flush_due = False
        if self._writer is None:
            return  # live requests are sent when an engine connects
        added = []
        for request_id in self._quarantine.take():
            live = self._live[request_id]
            added.append((request_id, live.packed))
            live.packed = b""
        if added or self._aborted:
            self._writer.write(pack({"add": added, "abort": self._aborted}))
            self._aborted = []

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Talk to one engine until it goes away."""
        try:
            hello = await read_message(reader)
            self.limits = RequestLimits(**hello["hello"]["limits"])
            self.metrics.startup_s = hello["hello"].get("startup_s", {})
            self._adopt(writer)
            while True:
                message = await read_message(reader)
                if self._writer is not writer:
                    break  # given up meanwhile: its requests are another engine's now
                self._receive(message)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            if self._writer is writer:
                self.disconnect()
            writer.close()

    def disconnect(self) -> None:
        """Give up the engine, if there is one; its requests wait for the next.

        All but the one that it died of, if that has been found.
        """
        if self._writer is None:
            return
        self._writer.close()
        self._writer = None
        self.stats, self.view = {}, None
        self._watched_until = 0.0
        self.is_sleeping = False
        while self._orders:
            gone = EngineUnavailableError("the engine has gone, and all it had with it")
            self._orders.popleft().set_exception(gone)
        self._connected.clear()
        culprit = self._quarantine.blame()
        if culprit is not None:
            self.num_blamed += 1
            if self._quarantine.is_guilty(culprit):
                self._end(
                    culprit,
                    RequestFailedError(
                        f"the engine has failed {MAX_DEATHS} times in a row at this request, and "
                        "lastly with no other that could be the cause; it is not tried again"
                    ),
                )

    def _end(self, request_id: str, error: Exception) -> None:
        self._quarantine.remove(request_id)
        live = self._live.pop(request_id, None)
        if live is not None:
            live.fail(error)

    def _adopt(self, writer: asyncio.StreamWriter) -> None:
        self._stop_listening()
        self._writer = writer
        self._aborted = []
        self.cached_blocks = CachedBlocks()
        self.heartbeat.start()
        self.metrics.engine_starts += 1
        self._connected.set()
        for live in self._live.values():
            live.packed = encode_request(live.request)
            live.predicted_before = live.record.num_predicted
        self._quarantine.restart(self._live)
        self._flush()

    def _receive(self, message: Message) -> None:
        if "done" in message:
            self.heartbeat.start()
        else:
            self.heartbeat.beat()
        self.metrics.count_step(self.stats, message["stats"])
        self.stats = message["stats"]
        self.is_sleeping = bool(self.stats.get("sleeping"))
        self.view = message.get("view", self.view)
        for block_hash, is_cached in message["cache"]:
            self.cached_blocks.note(block_hash, is_cached)
        for fields in message["deltas"]:
            delta = decode_delta(fields)
            live = self._live.get(delta.request_id)
            if live is None:
                continue  # aborted while the step ran
            live.request.output_token_ids += delta.token_ids
            self.metrics.count_tokens(live.record, len(delta.token_ids), self.heartbeat.last)
            self._quarantine.acquit(delta.request_id)
            if live.is_queued:
                self._leave_queue(live)
                live.record.num_cached = delta.num_cached_tokens
            live.count_predicted(delta)
            if delta.waits:
                live.record.waits += delta.waits
            if delta.finish_reason is not None:
                live.record.num_drafted = delta.num_drafted
                del self._live[delta.request_id]
                live.record.finish_reason = delta.finish_reason
            is_due = live.stream or delta.finish_reason is not None
            live.arrivals.put(live.index, delta, wakes=is_due)
        for request_id, reason in message["errors"]:
            self._end(request_id, EngineAsleepError() if self.is_sleeping else _refusal(reason))
        if "done" in message and self._orders:
            self._orders.popleft().set_result(message["done"])
        self._flush()  # somebody's turn may have come

    async def close(self) -> None:
        """Let the engine go: it ends when the connection does."""
        self.fail(EngineUnavailableError("the server is shutting down"))
        self.disconnect()
        self._stop_listening()


def _refusal(reason: str | None) -> Exception:
    if reason is None:
        return RequestFailedError("the engine could not take the request in; its log says why")
    return RequestRefusedError(reason)
