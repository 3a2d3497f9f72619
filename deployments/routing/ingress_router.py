"""Where HAProxy asks which replica gets a request. It sees the body, so it knows the prompt.

HAProxy posts the body here and connects the client straight to the replica of the answer: about
2 ms per request, and nothing per token. A body that cannot be read is not refused here, for the
replica says better what is wrong with it: it goes to the replica with the least load.
"""

import asyncio
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from pydantic import ValidationError
from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments import ray_private
from deployments.api.schema.protocol import ChatCompletionRequest, CompletionRequest
from deployments.args import AppArgs
from deployments.routing.balancer import RoutedPrompt, short
from engine import checkpoint
from engine.schedule.block_pool import BlockHasher
from engine.text.tokenizer import Tokenizer

SESSION_HEADER = "x-session-id"

_api = FastAPI()


@serve.deployment
@serve.ingress(_api)
class IngressRouter:
    """One runs beside every proxy; what they know of the replicas comes from Serve's controller."""

    def __init__(self, replicas: DeploymentHandle[Any], args: AppArgs) -> None:
        self._replicas = replicas
        self._block_size = args.block_size
        self._hasher = BlockHasher(args.block_size, args.block_key)
        self._tokenizer = Tokenizer(checkpoint.resolve(args.model, args.revision))
        ray_private.start_routing(replicas)

    @_api.post("/internal/route")
    async def route(self, request: Request) -> dict[str, Any]:
        """HAProxy's question; anything but a 200 becomes a 503 for the client."""
        prompt = await asyncio.to_thread(self._read_prompt, await request.body())
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
                request = ChatCompletionRequest.model_validate_json(body)
                tokens = self._tokenizer.encode_chat(
                    [message.for_template() for message in request.messages],
                    **request.template_options(),
                )
            else:
                request = CompletionRequest.model_validate_json(body)
                first = request.prompts[0]
                tokens = self._tokenizer.encode(first) if isinstance(first, str) else first
            hashes: list[bytes] = []
            self._hasher.extend(hashes, tokens, request.cache_salt)
        except (ValidationError, ValueError, OverflowError):
            return None
        return RoutedPrompt([short(h) for h in hashes], len(tokens), self._block_size)
