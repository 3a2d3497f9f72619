"""The front: text in, text out. Owns the tokenizer and the connection to the engine."""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from deployments.args import DeploymentArgs
from deployments.engine_client import EngineClient, EngineUnavailableError
from engine import checkpoint
from engine.detokenizer import Detokenizer
from engine.sampling_params import SamplingParams
from engine.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What one engine step brought a request, as text."""

    text: str
    num_tokens: int  # output tokens so far
    num_cached_tokens: int
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class Front:
    """Serves one model by one engine. Knows nothing of HTTP or of how engines are started."""

    def __init__(self, args: DeploymentArgs) -> None:
        directory = checkpoint.resolve(args.model, args.revision)
        self.model_name = args.model_name
        self.tokenizer = Tokenizer(directory)
        self.sampling_defaults = checkpoint.sampling_defaults(directory)
        self.client = EngineClient()
        # What is to be seen of every replica of this model; a replica among several asks them all.
        self.watch: Callable[[], Awaitable[list[dict[str, Any]]]] = self.watch_own_engine
        self._heartbeat_timeout_s = args.heartbeat_timeout_s

    async def encode(self, text: str) -> list[int]:
        """Off the event loop, which must go on streaming while a long prompt is tokenized."""
        return await asyncio.to_thread(self.tokenizer.encode, text)

    async def encode_chat(self, messages: list[dict[str, Any]], **options: Any) -> list[int]:
        return await asyncio.to_thread(self.tokenizer.encode_chat, messages, **options)

    def check(self, prompt_token_ids: list[int], params: SamplingParams) -> None:
        """Raises ValueError for a request that can never be served.

        Raises EngineUnavailableError when there will be no engine to serve it.
        """
        self.client.check_available()
        if self.client.limits is None:
            raise EngineUnavailableError("the engine is still starting")
        self.client.limits.check(prompt_token_ids, params)

    async def generate(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        cache_salt: str = "",
        stream: bool = True,
    ) -> AsyncGenerator[TextDelta]:
        """The text of one request; at least one delta, the last one with a finish_reason.

        Without `stream` the text comes in one piece where nothing in it can end the request.
        Leaving the iteration early aborts the request. Raises EngineUnavailableError when there is
        no engine. The caller has passed the request to `check`.
        """
        seed = params.seed if params.seed is not None else secrets.randbits(63)
        detokenizer = Detokenizer(self.tokenizer, prompt_token_ids, params)
        stream = stream or bool(params.stop)  # a stop string is found only in the text
        tokens = self.client.generate(prompt_token_ids, params, seed, cache_salt, stream)
        async with aclosing(tokens):
            async for delta in tokens:
                reason, stop_reason = delta.finish_reason, delta.stop_token
                text = detokenizer.push(delta.token_ids, last=reason is not None)
                if detokenizer.stop_string is not None:
                    yield TextDelta(
                        text,
                        detokenizer.num_tokens,
                        delta.num_cached_tokens,
                        "stop",
                        detokenizer.stop_string,
                    )
                    return
                yield TextDelta(
                    text, detokenizer.num_tokens, delta.num_cached_tokens, reason, stop_reason
                )

    async def watch_own_engine(self) -> list[dict[str, Any]]:
        return [{"replica": "", **self.client.watch()}]

    def check_health(self) -> None:
        """Raises EngineUnavailableError when the engine is gone or has stopped beating."""
        if not self.client.is_connected:
            raise EngineUnavailableError("the engine is being restarted")
        if self.client.is_silent(self._heartbeat_timeout_s):
            raise EngineUnavailableError(
                f"the engine has been silent for more than {self._heartbeat_timeout_s:g} s"
            )
