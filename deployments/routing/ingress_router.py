"""Where HAProxy asks which replica gets a request. It sees the body, so it knows the prompt.

HAProxy posts the body here and connects the client straight to the replica of the answer: about
2 ms per request, and nothing per token. A body that cannot be read is not refused here, for the
replica says better what is wrong with it: it goes to the replica with the least load. So does one
that is not worth the work: of a client without a key, very large, or one too many at a time.
"""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments import ray_private
from deployments.api.bodies import read
from deployments.api.errors import ApiError
from deployments.api.keys import KeyRing
from deployments.api.schema.protocol import ChatCompletionRequest, CompletionRequest
from deployments.args import AppArgs
from deployments.routing.balancer import RoutedPrompt, short
from engine import checkpoint
from engine.schedule.block_pool import BlockHasher
from engine.text.tokenizer import Tokenizer

SESSION_HEADER = "x-session-id"

_TRUNCATED = "x-body-truncated"  # HAProxy sends as much of a body as its buffer holds
# A prefix that is longer than some hundred thousand tokens is not looked for.
_MAX_BYTES = 2**20
# As many threads tokenize; more would keep each other, and the event loop, waiting.
_MAX_READERS = 2

_api = FastAPI()


class PromptReader:
    """Reads what is worth it, off the event loop; None for the rest, at once.

    Args:
        keys: those of the API; None where HAProxy does not show the client's.
    """

    def __init__(self, read: Callable[[bytes], RoutedPrompt | None], keys: KeyRing | None) -> None:
        self._read = read
        self._keys = keys
        self._free = threading.Semaphore(_MAX_READERS)

    async def prompt(self, request: Request) -> RoutedPrompt | None:
        body = bytearray()
        size = 0
        async for chunk in request.stream():  # to its end: HAProxy listens only then
            size += len(chunk)
            if size <= _MAX_BYTES:
                body += chunk
        is_whole = size <= _MAX_BYTES and _TRUNCATED not in request.headers
        if not is_whole or not self._has_key(request) or not self._free.acquire(False):
            return None
        return await asyncio.to_thread(self._read_and_leave, bytes(body))

    def _has_key(self, request: Request) -> bool:
        return self._keys is None or self._keys.find(request.headers) is not None

    def _read_and_leave(self, body: bytes) -> RoutedPrompt | None:
        try:
            return self._read(body)
        finally:
            self._free.release()


@serve.deployment
@serve.ingress(_api)
class IngressRouter:
    """One runs beside every proxy; what they know of the replicas comes from Serve's controller."""

    def __init__(self, replicas: DeploymentHandle[Any], args: AppArgs) -> None:
        self._replicas = replicas
        self._block_size = args.block_size
        self._hasher = BlockHasher(args.block_size, args.block_key)
        self._tokenizer = Tokenizer(checkpoint.resolve(args.model, args.revision))
        keys = KeyRing.load(args) if ray_private.routers_see_keys() else None
        self._reader = PromptReader(self._read_prompt, keys)
        ray_private.start_routing(replicas)

    @_api.post("/internal/route")
    async def route(self, request: Request) -> dict[str, Any]:
        """HAProxy's question; anything but a 200 becomes a 503 for the client."""
        prompt = await self._reader.prompt(request)
        session = request.headers.get(SESSION_HEADER, "")
        handle = self._replicas.options(session_id=session) if session else self._replicas
        try:
            host, port, replica_id = await ray_private.choose_endpoint(
                handle, *([prompt] if prompt else [])
            )
        except (RuntimeError, LookupError) as error:
            raise HTTPException(503, str(error)) from error
        return {"host": host, "port": port, "replica_id": replica_id}

    def _read_prompt(self, body: bytes) -> RoutedPrompt | None:
        """The prompt's blocks, named as the replica will; None when the body is not valid."""
        try:
            request: ChatCompletionRequest | CompletionRequest
            if b'"messages"' in body:
                request = read(ChatCompletionRequest, body, _MAX_BYTES)
                tokens = self._tokenizer.encode_chat(
                    [message.for_template() for message in request.messages],
                    **request.template_options(),
                )
            else:
                request = read(CompletionRequest, body, _MAX_BYTES)
                first = request.prompts[0]
                tokens = self._tokenizer.encode(first) if isinstance(first, str) else first
            hashes: list[bytes] = []
            self._hasher.extend(hashes, tokens, request.cache_salt)
        except (ApiError, ValueError, OverflowError):
            return None
        return RoutedPrompt([short(h) for h in hashes], len(tokens), self._block_size)
