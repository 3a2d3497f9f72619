"""The front: text in, text out. Owns the tokenizer and the connection to the engine."""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from deployments.args import DeploymentArgs
from deployments.front.engine_client import EngineClient, EngineUnavailableError
from deployments.front.request_options import RequestOptions
from deployments.observe.request_record import RequestRecord
from deployments.off_loop import off_loop
from deployments.parsing import reasoning_format, tool_format
from deployments.version import VERSION
from engine.checkpoint import directory_of
from engine.generation_config import (
    EmbeddingConfig,
    classifier_config,
    embedding_config,
    sampling_defaults,
)
from engine.sampling_params import SamplingParams
from engine.schedule.step import TokenDelta, TokenLogprobs
from engine.text.detokenizer import Detokenizer
from engine.text.tokenizer import load_tokenizer

# How long proxies may take to pass on the end of an answer.
_DRAIN_S = 0.5


@dataclass(slots=True)  # not frozen, which would double what making one costs
class TextDelta:
    """What one engine step brought a request, as text."""

    text: str
    num_tokens: int  # output tokens so far
    num_cached_tokens: int
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    # If asked for: of the tokens whose text has come, and of the prompt, once.
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    token_ids: Sequence[int] = ()  # that the step brought, also where their text is held back
    is_known: bool = False  # the client has it, of a stream that broke


# Sending it True ends the request: its text is complete.
TextStream = AsyncGenerator[TextDelta, bool | None]


class Front:
    """Serves one model by one engine, however that is started, until it drains."""

    def __init__(self, args: DeploymentArgs) -> None:
        directory = directory_of(args)
        self.model = args.model
        self.model_name = args.model_name
        self.block_key = args.block_key
        config = args.engine_config.model_dump_json()
        # Of what decides about an answer beside its request.
        self.fingerprint = f"fp_{hashlib.sha256(f'{VERSION} {config}'.encode()).hexdigest()[:12]}"
        self.tokenizer = load_tokenizer(directory)
        self.sampling_defaults = sampling_defaults(directory)
        templates = self.tokenizer.chat_templates
        self.tool_format = tool_format(args.tool_parser, templates.source(with_tools=True))
        self.embedding = embedding_config(directory)
        if args.pooling != "auto":
            self.embedding = EmbeddingConfig(args.pooling)
        self.classifier = classifier_config(directory)
        self.judges = args.reranker == "qwen3"
        self.reasoning = reasoning_format(args.reasoning_parser, templates.source())
        self.has_priorities = args.scheduling_policy == "priority"
        self.client = EngineClient(args)
        # What is to be seen of every replica of this model; a replica among several asks them all.
        self.watch: Callable[[], Awaitable[list[dict[str, Any]]]] = self.watch_own_engine
        self.num_open = 0  # requests being answered
        self.is_draining = False

    def special_tokens(self, marks: Iterable[str]) -> dict[str, int]:
        """Those of the marks that are special tokens, which have no text of their own."""
        ids = {mark: self.tokenizer.fast.token_to_id(mark) for mark in marks}
        return {m: i for m, i in ids.items() if i is not None and self.tokenizer.is_special(i)}

    async def encode(
        self, text: str, add_special_tokens: bool = True, max_len: int | None = None
    ) -> list[int]:
        return await off_loop(len(text), self.tokenizer.encode, text, add_special_tokens, max_len)

    async def encode_chat(self, messages: list[dict[str, Any]], **options: Any) -> list[int]:
        size = sum(len(message["content"]) for message in messages)
        return await off_loop(size, self.tokenizer.encode_chat, messages, **options)

    async def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        return await off_loop(len(token_ids), self.tokenizer.decode, token_ids, skip_special_tokens)

    async def in_tokens(self, params: SamplingParams) -> SamplingParams:
        """The parameters as `generate` takes them; raises ValueError when no engine does."""
        size = sum(map(len, params.bad_words))
        return await off_loop(size, params.in_tokens, self.tokenizer.encode_bad_words)

    def check(self, prompt_token_ids: list[int], params: SamplingParams) -> None:
        """Raises ValueError for a request that can never be served.

        Raises EngineUnavailableError when there will be no engine to serve it.
        """
        self.client.check_available()
        if self.client.is_sleeping:
            raise EngineUnavailableError("the engine is asleep; POST /wake_up wakes it up")
        if self.client.limits is None:
            raise EngineUnavailableError("the engine is still starting")
        if params.stop and not self.tokenizer.knows_text:
            raise ValueError("stop: this checkpoint has no tokenizer to find stop strings by")
        self.client.limits.check(prompt_token_ids, params)

    def max_prompt_len(self, params: SamplingParams) -> int | None:
        """Tokens that a prompt may have; None if any number, as it will be truncated."""
        limits = self.client.limits
        return limits.max_len if limits and params.truncate_prompt_tokens is None else None

    def truncate(self, prompt_token_ids: list[int], params: SamplingParams) -> list[int]:
        """The prompt as the request's truncate_prompt_tokens has it."""
        limits = self.client.limits
        return params.truncated(prompt_token_ids, limits.max_len) if limits else prompt_token_ids

    def generate_choices(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        options: RequestOptions,
    ) -> list[TextStream]:
        """The texts of a request's n choices, each as `generate` has it."""
        assert params.seed is not None  # the request has been admitted with one
        return [
            self.generate(prompt_token_ids, own, seed, options)
            for own, seed in params.choices(params.seed)
        ]

    async def generate(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        seed: int,
        options: RequestOptions,
    ) -> TextStream:
        """The text of one request; at least one delta, the last one with a finish_reason.

        Without `options.stream` the text comes in one piece where nothing in it can end the
        request. Leaving the iteration early aborts it. Raises EngineUnavailableError when there is
        no engine, RequestTimeoutError when its time is up, RequestFailedError when the engine
        fails at it. The caller has passed it to `in_tokens` and `check`.
        """
        detokenizer = Detokenizer(self.tokenizer, prompt_token_ids, params, options.shown_tokens)
        # A stop string is found only in the text, and logprobs come token by token.
        stream = options.stream or bool(params.stop) or params.logprobs is not None
        stream = stream or params.prompt_logprobs is not None
        record = RequestRecord(len(prompt_token_ids), params.max_tokens)
        options.records.append(record)
        options = replace(options, stream=stream)
        tokens = self.client.generate(prompt_token_ids, params, seed, options, record)
        if options.position:
            tokens = _parted(tokens, options)
        held: list[TokenLogprobs] = []  # of tokens whose text is held back
        async with aclosing(tokens):
            async for delta in tokens:
                reason: str | None = delta.finish_reason
                stop_reason: int | str | None = delta.stop_token
                logprobs: list[TokenLogprobs] | None = None
                text = detokenizer.push(
                    delta.token_ids, last=reason is not None, stopped=reason == "stop"
                )
                if detokenizer.stop_string is not None:
                    reason, stop_reason = "stop", detokenizer.stop_string
                    record.finish_reason = reason
                if delta.logprobs is not None:
                    held += delta.logprobs
                    if reason or not detokenizer.holds_back:
                        logprobs, held = held, []
                is_complete = yield TextDelta(
                    text,
                    detokenizer.num_tokens,
                    record.num_cached,
                    reason,
                    stop_reason,
                    logprobs,
                    delta.prompt_logprobs,
                    delta.token_ids,
                    is_known=detokenizer.num_tokens <= options.position,
                )
                if is_complete:
                    record.finish_reason = "stop"
                if is_complete or detokenizer.stop_string is not None:
                    return

    async def embed(
        self, prompt_token_ids: list[int], params: SamplingParams, options: RequestOptions
    ) -> list[float]:
        """The prompt as `params.pooling` has it; raises what `generate` does."""
        record = RequestRecord(len(prompt_token_ids), params.max_tokens)
        options.records.append(record)
        options = replace(options, stream=False)
        async with aclosing(
            self.client.generate(prompt_token_ids, params, 0, options, record)
        ) as deltas:
            async for delta in deltas:
                if delta.vector is not None:
                    return delta.vector
        raise EngineUnavailableError("the engine has started anew; try again")

    async def watch_own_engine(self) -> list[dict[str, Any]]:
        return [{"replica": "", **self.client.watch()}]

    async def drain(self) -> None:
        """Let no more requests in; returns when the last one has been answered."""
        self.is_draining = True
        while self.num_open:
            await asyncio.sleep(_DRAIN_S / 10)
        await asyncio.sleep(_DRAIN_S)

    def check_open(self) -> None:
        """Raises EngineUnavailableError while draining."""
        if self.is_draining:
            raise EngineUnavailableError("the server is shutting down")

    def check_health(self) -> None:
        """Raises EngineUnavailableError when draining, or the engine is gone or does not beat."""
        self.check_open()
        if not self.client.is_connected:
            raise EngineUnavailableError("the engine is being restarted")
        if self.client.is_silent:
            limit = self.client.heartbeat.timeout_s
            raise EngineUnavailableError(f"the engine has been silent for more than {limit:.0f} s")


async def _parted(
    deltas: AsyncGenerator[TokenDelta], options: RequestOptions
) -> AsyncGenerator[TokenDelta]:
    """With the tokens that are there already before them, and none across `options.position`."""
    num_tokens = len(options.known_tokens)
    if num_tokens:
        yield TokenDelta(request_id="", token_ids=list(options.known_tokens))
    async with aclosing(deltas):
        async for delta in deltas:
            cut = options.position - num_tokens
            num_tokens += len(delta.token_ids)
            if 0 < cut < len(delta.token_ids):
                ids, logprobs = delta.token_ids, delta.logprobs
                first = replace(delta, token_ids=ids[:cut], finish_reason=None, stop_token=None)
                yield replace(first, logprobs=logprobs and logprobs[:cut])
                rest = replace(delta, token_ids=ids[cut:], prompt_logprobs=None)
                delta = replace(rest, logprobs=logprobs and logprobs[cut:])
            yield delta
