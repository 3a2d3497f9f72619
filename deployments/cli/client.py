"""The little that the command needs of an HTTP client for a server of ours."""

import json
from collections.abc import Iterator
from typing import Any

import httpx


class ServerError(Exception):
    """The server refused, in its own words, or cannot be reached (status 0)."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


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
        """Server-sent events; leaving the iteration closes the connection. Raises ServerError."""
        method = "GET" if body is None else "POST"
        try:
            with self._http.stream(method, path, json=body) as response:
                if response.status_code != 200:
                    response.read()
                    self._check(response)
                for line in response.iter_lines():
                    if not line.startswith("data: {"):
                        continue
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise ServerError(event["error"]["message"])
                    yield event
        except httpx.TransportError as error:
            raise self._unreachable(error) from error

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
        except (ValueError, KeyError, TypeError):
            message = f"{response.status_code} {response.reason_phrase}"
        if response.status_code == 401:
            message += " (give it by --key or MANTA_API_KEY)"
        raise ServerError(message, response.status_code)

    def _unreachable(self, error: Exception) -> ServerError:
        return ServerError(
            f"no server of ours answers at {self.url} ({error}); start one with: manta serve"
        )
