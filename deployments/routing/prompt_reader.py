"""Reads what is worth it of the bodies that a router sees, off the event loop."""

import asyncio
from dataclasses import dataclass

from fastapi import Request

from deployments.api.keys import KeyRing
from deployments.api.requests.handed_tokens import HEADER, HandedTokens, TokenSeal
from deployments.api.requests.prompt_of_body import prompt_of
from deployments.args import AppArgs
from deployments.cached_blocks import short
from deployments.routing.balancer import RoutedPrompt
from engine.schedule.block_pool import BlockHasher
from engine.text.tokenizer import Tokenizer

# HAProxy sends as much of a body as its buffer holds; this says how much, and of how much.
_TRUNCATED = "x-body-truncated"
# A prefix that is longer than some hundred thousand tokens is not looked for.
_MAX_BYTES = 2**20
# As many threads tokenize; more would keep each other, and the event loop, waiting. Most bodies are
# read in milliseconds. What is longer has one thread for it all, so that nobody waits for it; so
# have those who show no key, for they may have one in a header that HAProxy does not show.
_MAX_READERS = 2
_SHORT_BYTES = 2**16
_MAX_OTHER_READERS = 1
# Others are waited for so long: on a busy machine longer than reading takes, and less than what is
# lost where a prompt's prefix is computed again.
_PATIENCE_S = 0.5
# HAProxy waits five seconds for an answer, and then has a 503 for the client.
_READ_S = 2.0


@dataclass(frozen=True)
class ReadBody:
    prompt: RoutedPrompt
    headers: dict[str, str]  # for the replica


class PromptReader:
    """
    Args:
        keys: those of the API; None where HAProxy does not show the client's.
        room: bytes that fit HAProxy's buffer: of a body, and the headers that are added to it.
    """

    def __init__(
        self, args: AppArgs, tokenizer: Tokenizer, keys: KeyRing | None, room: int
    ) -> None:
        self._hasher = BlockHasher(args.block_size, args.block_key)
        self._seal = TokenSeal(args.block_key)
        self._tokenizer = tokenizer
        self._keys = keys
        self._room = room
        self._free = asyncio.Semaphore(_MAX_READERS)
        self._free_for_others = asyncio.Semaphore(_MAX_OTHER_READERS)

    async def read(self, request: Request) -> ReadBody | None:
        """None, soon, for what is not worth it; for what has no prompt, or takes too long."""
        body = bytearray()
        size = 0
        async for chunk in request.stream():  # to its end: HAProxy listens only then
            body += chunk[: _MAX_BYTES - len(body)]
            size += len(chunk)
        _, _, announced = request.headers.get(_TRUNCATED, "").partition("/")
        size = max(size, int(announced) if announced.isdigit() else 0)
        shows_key = not self._keys or self._keys.find(request.headers) is not None
        if not shows_key and "authorization" in request.headers:
            return None
        is_soon_read = shows_key and len(body) <= _SHORT_BYTES
        free = self._free if is_soon_read else self._free_for_others
        try:
            await asyncio.wait_for(free.acquire(), _PATIENCE_S)
        except TimeoutError:
            return None
        reading = asyncio.ensure_future(asyncio.to_thread(self._read, bytes(body), size))
        reading.add_done_callback(lambda _: free.release())
        done, _ = await asyncio.wait({reading}, timeout=_READ_S)
        return reading.result() if done else None

    def _read(self, body: bytes, size: int) -> ReadBody | None:
        """
        Args:
            size: of the whole body, of which there may be less.
        """
        prompt = prompt_of(body, self._tokenizer, _MAX_BYTES)
        if prompt is None:
            return None
        hashes: list[bytes] = []
        sealed: str | None = None
        try:
            self._hasher.extend(hashes, prompt.tokens, prompt.cache_salt)
            if size == len(body):
                handed = HandedTokens(prompt.request_type, prompt.tokens)
                sealed = self._seal.seal(body, handed)
        except OverflowError:  # numbers that are no tokens
            return None
        has_room = sealed is not None and size + len(sealed) <= self._room
        headers = {HEADER: sealed} if sealed is not None and has_room else {}
        # Of what is known: where the body is cut in the middle of the prompt, so is that.
        whole = size / max(len(body), 1) if prompt.is_last else 1
        names = [short(block_hash) for block_hash in hashes]
        num_tokens, tokens_per_block = len(prompt.tokens) * whole, self._hasher.block_size * whole
        return ReadBody(RoutedPrompt(names, round(num_tokens), tokens_per_block), headers)
