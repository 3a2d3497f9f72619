"""The engine's side of the wire: take in requests, step, send tokens, until the front is gone."""

import gc
import logging
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

from deployments.wire import Message, MessageSocket, decode_request, encode_delta
from engine.view import Watch

if TYPE_CHECKING:  # imports torch, which the front, sharing a module with this one, never does
    from engine.engine import Engine

logger = logging.getLogger(__name__)

# How often an idle engine says that it is alive, in seconds.
HEARTBEAT_S = 0.5


class EngineLoop:
    """Runs one engine for one front."""

    def __init__(
        self, engine: "Engine", address: str, startup_s: dict[str, float] | None = None
    ) -> None:
        """
        Args:
            startup_s: how long what came before the engine took.
        """
        self._startup_s = {**(startup_s or {}), **engine.runner.startup_s}
        self._engine = engine
        self._cache_changes = engine.scheduler.pool.changes = []
        self._socket = MessageSocket(address)
        self._watch = Watch(engine)
        self._orders: dict[str, Callable[..., None]] = {
            "start_profile": engine.start_profile,
            "stop_profile": engine.stop_profile,
            "sleep": engine.sleep,
            "wake_up": engine.wake_up,
            "update_weights_from_disk": engine.update_weights_from_disk,
        }
        self._done: list[str | None] = []  # what became of orders, to be told

    def run(self) -> None:
        """Serve until the front closes the connection; errors of the engine end the process."""
        # What has been loaded stays: to look through it at every collection takes a step's time.
        gc.collect()
        gc.freeze()
        hello = {"limits": asdict(self._engine.limits), "startup_s": self._startup_s}
        self._socket.send({"hello": hello})
        try:
            while True:
                timeout = 0.0 if self._engine.has_work else HEARTBEAT_S
                errors = []
                for message in self._socket.receive(timeout):
                    errors += self._accept(message)
                deltas = self._engine.step() if self._engine.has_work else []
                message = {
                    "deltas": [encode_delta(d) for d in deltas if d.error is None],
                    "errors": errors
                    + [(d.request_id, d.error) for d in deltas if d.error is not None],
                    "stats": self._engine.stats(),
                    "cache": self._cache_changes,
                }
                if self._done:
                    message["done"] = self._done.pop(0)
                if (picture := self._watch.picture()) is not None:
                    message["view"] = picture
                self._socket.send(message)
                self._cache_changes.clear()
        except ConnectionError:
            return  # the front's death or wish
        finally:
            self._socket.close()
            self._engine.close()

    def _accept(self, message: Message) -> list[tuple[str, str | None]]:
        """Returns (request id, reason) for what the engine refuses, without one where it fails.

        What is done for one request fails that request alone.
        """
        errors: list[tuple[str, str | None]] = []
        for request_id, packed in message.get("add", ()):
            try:
                self._engine.add(decode_request(packed))
            except ValueError as error:
                errors.append((request_id, str(error)))
            except Exception:
                logger.exception("A request could not be taken in")
                errors.append((request_id, None))
        for request_id in message.get("abort", ()):
            self._engine.abort(request_id)
        if "watch" in message:
            self._watch.renew(message["watch"])
        if "order" in message:
            self._done.append(self._obey(message["order"]))
        return errors

    def _obey(self, order: list[str]) -> str | None:
        """Why it was not done, if it was not."""
        what, *arguments = order
        try:
            self._orders[what](*arguments)
        except (ValueError, OSError) as error:
            return str(error)
        return None
