"""The little that the command needs of an HTTP client for a server of ours."""

import json
import math
import time
from collections.abc import Iterator
from typing import Any

import httpx

# How long a stream that broke is asked for, and how often, in seconds.
_GIVE_UP_S = 60.0
_PAUSE_S = 0.5


class ServerError(Exception):
    """The server refused, in its own words, or cannot be reached (status 0)."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class ProxyError(ServerError):
    """A proxy's own words: it reached no server of ours."""


class _Known:
    """What has come of an answer. Events after the last id come again when it goes on."""

    def __init__(self) -> None:
        self.held: list[dict[str, Any]] = []  # until an id comes
        self.came_at = -math.inf  # when there was a server last
        self._last_id = ""
        self._token_ids: list[int] = []

    @property
    def is_lost(self) -> bool:
        return time.monotonic() - self.came_at > _GIVE_UP_S

    def take(self, event_id: str, event: dict[str, Any]) -> list[dict[str, Any]]:
        """What is certain now."""
        self.came_at = time.monotonic()
        self.held.append(event)
        if event_id or not self._last_id:  # a server that sends no ids lets nothing be held
            self._last_id = event_id
            certain, self.held = self.held, []
            for choice in (choice for known in certain for choice in known.get("choices", ())):
                self._token_ids += choice.get("token_ids") or ()
            return certain
        return []

    def resume(self, body: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        """(body, headers) of the request for what is left: by its tokens, if they are known."""
        self.held = []
        seed, _, position = self._last_id.partition(".")
        if not position:
            return body, {}
        if len(self._token_ids) == int(position):
            return body | {"resume": {"seed": int(seed), "token_ids": self._token_ids}}, {}
        return body, {"last-event-id": self._last_id}


def _ended(error: dict[str, Any]) -> ServerError:
    """By an error that a stream carries: another replica may go on where this one had to stop."""
    return ServerError(error["message"], 503 if error.get("code") == "engine_unavailable" else 0)


class EventLines:
    """What the lines of a stream of events say, one after another."""

    def __init__(self) -> None:
        self.have_ended = False
        self._id = ""

    def read(self, line: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """(its id or "", what it says) of an event that the line ends."""
        if line.startswith("id: "):
            self._id = line.removeprefix("id: ")
        elif line == "data: [DONE]":
            self.have_ended = True
        elif line.startswith("data: {"):
            event_id, self._id = self._id, ""
            yield event_id, json.loads(line.removeprefix("data: "))


class Client:
    def __init__(self, url: str, key: str = "") -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(
            base_url=self.url, headers=headers, timeout=httpx.Timeout(10, read=600)
        )

    def get(self, path: str) -> Any:
        """The JSON at a path; raises ServerError."""
        try:
            response = self._http.get(path)
            self._check(response)
            return response.json()
        except (httpx.TransportError, ValueError) as error:
            raise self._unreachable(error) from error

    def stream(self, path: str, body: dict[str, Any] | None = None) -> Iterator[dict[str, Any]]:
        """Server-sent events; leaving the iteration closes the connection. Raises ServerError.

        An answer whose stream breaks goes on where it was, from whichever server then answers.
        """
        known, asked_at = _Known(), time.monotonic()
        while True:
            try:
                for event_id, event in self._events(path, body, known):
                    yield from known.take(event_id, event)
                yield from known.held
                return
            except httpx.TransportError as error:
                if body is None or known.is_lost:
                    raise self._unreachable(error) from error
            except ServerError as error:
                is_proxys = isinstance(error, ProxyError)
                if is_proxys and error.status >= 500:  # there are servers behind it
                    known.came_at = max(known.came_at, asked_at)
                if not (is_proxys or error.status == 503) or known.is_lost:
                    raise
            time.sleep(_PAUSE_S)

    def _events(
        self, path: str, body: dict[str, Any] | None, known: "_Known"
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Events with their ids. Raises TransportError for an answer that breaks off."""
        method = "GET" if body is None else "POST"
        request, headers = known.resume(body) if body is not None else (None, {})
        with self._http.stream(method, path, json=request, headers=headers) as response:
            if response.status_code != 200:
                response.read()
                self._check(response)
            known.came_at = time.monotonic()
            lines = EventLines()
            for line in response.iter_lines():
                for event_id, event in lines.read(line):
                    if "error" in event:
                        raise _ended(event["error"])
                    yield event_id, event
                if lines.have_ended:
                    return
        if body is not None:
            raise httpx.RemoteProtocolError("the answer has no end")

    def first_view(self) -> dict[str, Any] | None:
        """A picture of the first engine (`engine.view.EngineView`); None if it sends none."""
        for event in self.stream("/engine/events"):
            for replica in event["replicas"]:
                if replica["view"]:
                    return replica["view"]
        return None

    def _check(self, response: httpx.Response) -> None:
        if response.status_code == 200:
            return
        try:
            message = response.json()["error"]["message"]
        except (ValueError, KeyError, TypeError) as error:
            message = f"{response.status_code} {response.reason_phrase}"
            raise ProxyError(message, response.status_code) from error
        if response.status_code == 401:
            message += " (give it by --key or MANTA_API_KEY)"
        raise ServerError(message, response.status_code)

    def _unreachable(self, error: Exception) -> ServerError:
        return ServerError(
            f"no server of ours answers at {self.url} ({error}); start one with: manta serve"
        )
