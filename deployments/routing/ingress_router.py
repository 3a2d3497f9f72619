"""Where HAProxy asks which replica gets a request. It sees the body, so it knows the prompt.

HAProxy posts the body here and connects the client straight to the replica of the answer: about
2 ms per request, and nothing per token. A body that cannot be read is not refused here, for the
replica says better what is wrong with it: it goes to the replica with the least load. So does one
that is not worth the work: of a client without a key, one too many at a time, or one that takes too
long to read. What HAProxy or the reader has cut is routed by its beginning.
"""

import asyncio
import logging
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments import ray_private
from deployments.api.keys import KeyRing
from deployments.args import AppArgs
from deployments.peers import Peers, own_name
from deployments.routing.balancer import PrefixBalancer, ReplicaReport, RoutedPrompt, Sent
from deployments.routing.prompt_reader import PromptReader
from engine.checkpoint.directory import directory_of
from engine.text.tokenizer import load_tokenizer

SESSION_HEADER = "x-session-id"

# How often routers tell each other what they have sent; and look for others, where there are none.
_TELL_S = 0.2
_LOOK_S = 2.0

_api = FastAPI()
logger = logging.getLogger("ray.serve")


@serve.deployment
@serve.ingress(_api)
class IngressRouter:
    """One runs beside every proxy. Replicas tell all of them what they hold."""

    async def __init__(self, replicas: DeploymentHandle[Any], args: AppArgs) -> None:  # type: ignore[misc]
        tokenizer = await asyncio.to_thread(lambda: load_tokenizer(directory_of(args)))
        await asyncio.to_thread(tokenizer.warm_up)
        keys = KeyRing.load(args) if ray_private.routers_see_keys() else None
        self._replicas = replicas
        self._balancer = PrefixBalancer()
        self._reader = PromptReader(args, tokenizer, keys, ray_private.haproxy_room())
        self._telling = asyncio.create_task(self._tell_forever())
        ray_private.start_routing(replicas)

    @_api.post("/internal/route")
    async def route(self, request: Request) -> dict[str, Any]:
        """HAProxy's question; anything but a 200 becomes a 503 for the client."""
        body = await self._reader.read(request)
        session = request.headers.get(SESSION_HEADER, "")
        handle = self._replicas.options(session_id=session) if session else self._replicas
        try:
            host, port, replica_id = await ray_private.choose_endpoint(
                handle, self._balancer, body.prompt if body else RoutedPrompt()
            )
        except (RuntimeError, LookupError) as error:
            raise HTTPException(503, str(error)) from error
        answer: dict[str, Any] = {"host": host, "port": port, "replica_id": replica_id}
        return answer | {"request_headers": body.headers} if body and body.headers else answer

    async def take_report(self, replica: str, report: ReplicaReport) -> bool:
        """Called by every replica, once in about a second; see `PrefixBalancer.take_report`."""
        return self._balancer.take_report(replica, report)

    async def note_sent(self, router: str, sent: list[Sent]) -> None:
        """Called by every router, this one included."""
        if router != own_name():
            self._balancer.note_sent(sent)

    async def _tell_forever(self) -> None:
        routers, wait_s = Peers(), _TELL_S
        while True:
            await asyncio.sleep(wait_s)
            sent = self._balancer.take_sent()
            try:
                if sent or wait_s == _LOOK_S:
                    answers = await routers.ask("note_sent", own_name(), sent)
                    wait_s = _TELL_S if len(answers) > 1 else _LOOK_S
            except Exception as error:
                logger.debug("other routers were not told: %r", error)

    async def __del__(self) -> None:
        self._telling.cancel()
