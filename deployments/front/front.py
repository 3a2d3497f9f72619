"""The front: text in, text out. Owns the tokenizer and the connection to the engine."""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from deployments.args import DeploymentArgs
from deployments.front.arrivals import Arrivals
from deployments.front.engine_client import EngineAsleepError, EngineClient, EngineUnavailableError
from deployments.front.generation import Generation
from deployments.front.request_options import RequestOptions
from deployments.observe.request_record import RequestRecord
from deployments.off_loop import off_loop
from deployments.parsing import reasoning_format, tool_format
from deployments.version import VERSION
from engine.checkpoint.directory import directory_of
from engine.generation_config import (
    EmbeddingConfig,
    classifier_config,
    embedding_config,
    sampling_defaults,
)
from engine.sampling_params import SamplingParams
from engine.schedule.request import RequestLimits
from engine.text.tokenizer import load_tokenizer

# How long proxies may take to pass on the end of an answer.
_DRAIN_S = 0.5


class Front:
    """Serves one model by one engine, however that is started, until it drains."""

    def __init__(self, args: DeploymentArgs) -> None:
        directory = directory_of(args)
        self.model = args.model
        self.model_name = args.model_name
        self.block_key = args.block_key
        self.tokenizer = load_tokenizer(directory)
        self.sampling_defaults = sampling_defaults(directory)
        templates = self.tokenizer.chat_templates
        self.tool_format = tool_format(args.tool_parser, templates.source(with_tools=True))
        self.embedding = embedding_config(directory)
        if args.pooling != "auto":
            self.embedding = EmbeddingConfig(args.pooling)
        self.classifier = classifier_config(directory)
        self.judges = args.reranker == "qwen3"  # scores are its yes or no, no angle of embeddings
        self.reasoning = reasoning_format(args.reasoning_parser, templates.source())
        self.has_priorities = args.scheduling_policy == "priority"
        self.client = EngineClient(args)
        settings = f"{VERSION} {args.engine_config.model_dump_json()}"
        self._settings = hashlib.sha256(settings.encode()).hexdigest()
        # Of every replica of this model, what is to be seen, and what is computed with: a replica
        # among several asks them all.
        self.watch: Callable[[], Awaitable[list[dict[str, Any]]]] = self.watch_own_engine
        self.update_weights: Callable[[str], Awaitable[None]] = self.update_own_weights
        self.num_open = 0  # requests being answered
        self.is_draining = False

    @property
    def fingerprint(self) -> str:
        """Of what decides about an answer beside its request."""
        state = f"{self._settings} {self.client.weights}"
        return f"fp_{hashlib.sha256(state.encode()).hexdigest()[:12]}"

    async def update_own_weights(self, path: str) -> None:
        """Have the engine, and what comes in its place, compute with those of a checkpoint.

        Raises ValueError where it cannot, and goes on with those that it has.
        """
        failure = await self.client.order("update_weights_from_disk", path)
        if failure is not None:
            raise ValueError(failure)
        self.client.weights = path

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

    def check(
        self, prompt_token_ids: list[int], params: SamplingParams, known: Sequence[int] = ()
    ) -> None:
        """Raises ValueError for a request that can never be served.

        Raises EngineUnavailableError when there will be no engine to serve it.

        Args:
            known: tokens of the output that are there already.
        """
        limits = self.check_ready()
        if params.stop and not self.tokenizer.knows_text:
            raise ValueError("stop: this checkpoint has no tokenizer to find stop strings by")
        limits.check(prompt_token_ids, params, known)

    def check_ready(self) -> RequestLimits:
        """What requests may ask of the engine.

        Raises EngineUnavailableError when there will be none, or none that takes any.
        """
        self.client.check_available()
        if self.client.is_sleeping:
            raise EngineAsleepError
        if self.client.limits is None:
            raise EngineUnavailableError("the engine is still starting")
        return self.client.limits

    def max_prompt_len(self, params: SamplingParams) -> int | None:
        """Tokens that a prompt may have; None if any number, as it will be truncated."""
        limits = self.client.limits
        return limits.max_len if limits and params.truncate_prompt_tokens is None else None

    def truncate(self, prompt_token_ids: list[int], params: SamplingParams) -> list[int]:
        """The prompt as the request's truncate_prompt_tokens has it."""
        limits = self.client.limits
        return params.truncated(prompt_token_ids, limits.max_len) if limits else prompt_token_ids

    def generate(
        self, prompts: Sequence[list[int]], params: SamplingParams, options: RequestOptions
    ) -> Generation:
        """The outputs of a request: of each prompt its n choices, one after another."""
        assert params.seed is not None  # the request has been admitted with one
        choices = params.choices(params.seed)
        asked = [(prompt, own, seed) for prompt in prompts for own, seed in choices]
        return Generation(self.client, self.tokenizer, asked, options)

    async def embed(
        self, prompt_token_ids: list[int], params: SamplingParams, options: RequestOptions
    ) -> list[float]:
        """The prompt as `params.pooling` has it; raises what `generate` does."""
        record = RequestRecord(len(prompt_token_ids), params.max_tokens)
        options.records.append(record)
        options = replace(options, stream=False)
        arrivals = Arrivals()
        live = self.client.start(prompt_token_ids, params, 0, options, record, arrivals)
        try:
            (delta,) = (await arrivals.take()).values()
        finally:
            self.client.leave(live)
        if delta.vector is None:
            raise EngineUnavailableError("the engine has started anew; try again")
        return delta.vector

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
