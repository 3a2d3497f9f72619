"""Offline generation in this process: `from engine import LLM`."""

import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.checkpoint.directory import directory_of
from engine.config import EngineConfig
from engine.engine import Engine
from engine.generation_config import (
    EmbeddingConfig,
    PoolingKind,
    classifier_config,
    embedding_config,
    sampling_defaults,
)
from engine.outputs import (
    ClassificationOutput,
    ClassificationRequestOutput,
    CompletionOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    Logprob,
    RequestMetrics,
    RequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
)
from engine.progress import PromptProgress
from engine.ranks.group import Leader
from engine.runner.local_followers import LocalFollowers
from engine.sampling_params import MAX_SEED, Pooling, SamplingParams
from engine.schedule.request import Request
from engine.schedule.step import TokenDelta, TokenLogprobs
from engine.text.chat_template import check_variables
from engine.text.detokenizer import Detokenizer
from engine.text.messages import for_template
from engine.text.prompts import Prompt, as_list, one_each, token_ids_of
from engine.text.tokenizer import Tokenizer, has_tokenizer


@dataclass
class _Choice:
    """One of the outputs of a prompt, on its way through `generate`."""

    request: Request
    index: int
    detokenizer: Detokenizer | None
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    output: CompletionOutput | None = None


@dataclass
class _Prompted:
    """A prompt and its choices."""

    request_id: str
    prompt: str | None
    token_ids: list[int]
    choices: list[_Choice]
    arrival_time: float = field(default_factory=time.monotonic)
    first_token_time: float = 0.0
    num_cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs] | None = None
    vector: list[float] | None = None


class LLM:
    """A model for batches of prompts.

    `LLM("Qwen/Qwen3-0.6B", max_model_len=4096).generate(["Hello"], SamplingParams(max_tokens=8))`

    Args:
        model: checkpoint directory or Hugging Face hub id.
        config: the other fields of `EngineConfig`.
    """

    def __init__(self, model: str, **config: Any) -> None:
        self.config = EngineConfig(model=str(model), **config)
        leader = Leader(self.config.num_ranks)
        self._followers = LocalFollowers(self.config, leader)
        try:
            self.engine = Engine(self.config, leader, show_progress=True)
        except BaseException:
            leader.close()
            self._followers.close(patience_s=0)
            raise
        directory = directory_of(self.config)
        self.tokenizer = Tokenizer(directory) if has_tokenizer(directory) else None
        self._embedding = embedding_config(directory)
        self._classifier = classifier_config(directory)
        self._default_params = SamplingParams(**sampling_defaults(directory))
        self._seeds = random.Random(self.config.seed)
        self._next_id = 0

    def close(self) -> None:
        """End the other ranks' processes. The weights go with the object."""
        self.engine.close()
        self._followers.close()

    def start_profile(self) -> None:
        """Record what every rank does from now on; raises ValueError without profile_directory."""
        self.engine.start_profile()

    def stop_profile(self) -> None:
        """Write it to profile_directory."""
        self.engine.stop_profile()

    def sleep(self, level: int = 1) -> None:
        """See `Engine.sleep`."""
        self.engine.sleep(level)

    def wake_up(self) -> None:
        self.engine.wake_up()

    def update_weights_from_disk(self, model_path: str) -> None:
        """See `Engine.update_weights_from_disk`."""
        self.engine.update_weights_from_disk(model_path)

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's authors recommend (generation_config.json), else the usual defaults."""
        return self._default_params

    def get_tokenizer(self) -> Tokenizer:
        """Raises ValueError for a checkpoint without one: its prompts are token ids."""
        if self.tokenizer is None:
            raise ValueError("this checkpoint has no tokenizer; give prompts as token ids")
        return self.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete prompts, in the order given.

        Args:
            prompts: one or many; each a text, a list of token ids, or a dict with "prompt" or
                "prompt_token_ids" and optionally "cache_salt".
            sampling_params: one for all, or one for each prompt; requests without a seed get one
                from the engine's, so that a program's outputs are the same in every run.
        Raises:
            ValueError: a prompt is empty, too long or malformed, and nothing has been generated;
                or structured_outputs cannot be compiled, and all prompts are given up.
        """
        listed = as_list(prompts)
        params = one_each(sampling_params or self._default_params, len(listed))
        prompted: list[_Prompted] = []
        for i, (prompt, own_params) in enumerate(zip(listed, params, strict=True)):
            try:
                prompted.append(self._prepare(prompt, own_params))
            except ValueError as error:
                raise ValueError(f"prompt {i}: {error}") from error
        return self._run(prompted, use_tqdm)

    def chat(
        self,
        messages: Sequence[dict[str, Any]] | Sequence[Sequence[dict[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation (a list of messages) or many, through the chat template.

        Messages and tools are as in the OpenAI API; raises ValueError for what is not.
        """
        conversations: Sequence[Any] = messages
        if messages and isinstance(messages[0], Mapping):
            conversations = [messages]
        variables = check_variables(dict(chat_template_kwargs or {}))
        prompts = []
        for conversation in conversations:
            given, offered = for_template(conversation, tools)
            tokens = self.get_tokenizer().encode_chat(
                given,
                tools=offered,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **variables,
            )
            prompts.append(tokens)
        return self.generate(prompts, sampling_params, use_tqdm)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling: PoolingKind | None = None,
        use_tqdm: bool = True,
    ) -> list[EmbeddingRequestOutput]:
        """The prompts as vectors.

        Args:
            pooling: default: as the checkpoint's config of sentence-transformers has it.
        Raises:
            ValueError: there is none, and no pooling is given; or as `generate`.
        """
        config = EmbeddingConfig(pooling) if pooling is not None else self._embedding
        if config is None:
            raise ValueError("this checkpoint is not made for embeddings; say which pooling to use")
        params = SamplingParams(max_tokens=1, temperature=0, pooling=Pooling(kind=config.kind))
        outputs = []
        for output in self.generate(prompts, params, use_tqdm):
            vector = output.vector or []
            length = math.hypot(*vector) if config.normalizes else 1.0
            embedding = EmbeddingOutput([x / max(length, 1e-12) for x in vector])
            outputs.append(
                EmbeddingRequestOutput(output.request_id, embedding, output.prompt_token_ids)
            )
        return outputs

    def classify(
        self, prompts: Prompt | Sequence[Prompt], use_activation: bool = True, use_tqdm: bool = True
    ) -> list[ClassificationRequestOutput]:
        """What a classifier gives each of its labels.

        Args:
            use_activation: False: the logits as they are, of a reward model for example.
        Raises:
            ValueError: the model is no classifier; or as `generate`.
        """
        config = self._classifier
        if config is None:
            raise ValueError("this checkpoint is no classifier: its head writes words")
        params = SamplingParams(max_tokens=1, temperature=0, pooling=Pooling(kind="labels"))
        outputs = []
        for output in self.generate(prompts, params, use_tqdm):
            logits = output.vector or []
            probs = config.probabilities(logits) if use_activation else logits
            outputs.append(
                ClassificationRequestOutput(
                    output.request_id, ClassificationOutput(probs), output.prompt_token_ids
                )
            )
        return outputs

    def score(
        self,
        text_1: str | Sequence[str],
        text_2: str | Sequence[str],
        pooling: PoolingKind | None = None,
        use_tqdm: bool = True,
    ) -> list[ScoringRequestOutput]:
        """The cosine of the angle between text_1, one or as many, and each of text_2."""
        first, second = ([t] if isinstance(t, str) else list(t) for t in (text_1, text_2))
        first = first * len(second) if len(first) == 1 else first
        if len(first) != len(second):
            raise ValueError(f"text_1: {len(first)} texts, but text_2 has {len(second)}")
        found = [o.outputs.embedding for o in self.embed([*first, *second], pooling, use_tqdm)]
        pairs = zip(found[: len(first)], found[len(first) :], strict=True)
        return [
            ScoringRequestOutput(str(i), ScoringOutput(_cosine(a, b)))
            for i, (a, b) in enumerate(pairs)
        ]

    def _prepare(self, prompt: Prompt, params: SamplingParams) -> _Prompted:
        text, token_ids, salt = self._parse(prompt)
        token_ids = params.truncated(token_ids, self.engine.limits.max_len)
        if params.stop or params.bad_words:
            params = params.in_tokens(self.get_tokenizer().encode_bad_words)
        seed = params.seed if params.seed is not None else self._seeds.randint(0, MAX_SEED)
        request_id, self._next_id = str(self._next_id), self._next_id + 1
        choices = []
        for i, (own_params, own_seed) in enumerate(params.choices(seed)):
            self.engine.limits.check(token_ids, own_params)
            request = Request(f"{request_id}.{i}", token_ids, own_params, own_seed, salt)
            detokenizer = (
                Detokenizer(self.tokenizer, token_ids, own_params) if self.tokenizer else None
            )
            choices.append(_Choice(request, i, detokenizer))
        return _Prompted(request_id, text, token_ids, choices)

    def _parse(self, prompt: Prompt) -> tuple[str | None, list[int], str]:
        """(text if given, token ids, cache salt)"""
        if isinstance(prompt, str):
            return prompt, self.get_tokenizer().encode(prompt), ""
        if not isinstance(prompt, Mapping):
            return None, token_ids_of(prompt), ""
        known = ("prompt", "prompt_token_ids", "cache_salt")
        if unknown := set(prompt).difference(known):
            raise ValueError(f"unknown keys {sorted(unknown)}; known: {', '.join(known)}")
        if isinstance(prompt.get("prompt_token_ids"), str):
            raise ValueError("prompt_token_ids: should be a list of token ids; a text is a prompt")
        inner = prompt.get("prompt_token_ids", prompt.get("prompt"))
        if inner is None:
            raise ValueError("a dict prompt needs 'prompt' or 'prompt_token_ids'")
        text, token_ids, _ = self._parse(inner)
        if text is None and isinstance(prompt.get("prompt"), str):  # what these tokens say
            text = prompt["prompt"]
        return text, token_ids, str(prompt.get("cache_salt", ""))

    def _run(self, prompted: list[_Prompted], use_tqdm: bool) -> list[RequestOutput]:
        by_id = {choice.request.id: (one, choice) for one in prompted for choice in one.choices}
        finished: dict[str, RequestOutput] = {}
        with PromptProgress(len(prompted), disable=not use_tqdm) as progress:
            try:
                for _, choice in by_id.values():
                    self.engine.add(choice.request)
                while len(finished) < len(prompted):
                    for delta in self.engine.step():
                        output = self._advance(*by_id[delta.request_id], delta)
                        if output is not None:
                            finished[output.request_id] = output
                            progress.count_finished()
                    stats = self.engine.scheduler.stats
                    progress.show_speed(stats.prompt_tokens, stats.output_tokens)
            finally:  # an interrupt in a notebook must not leave requests behind
                for request_id in by_id:
                    self.engine.abort(request_id)
                while self.engine.has_work:
                    self.engine.step()
        return [finished[one.request_id] for one in prompted]

    def _advance(self, one: _Prompted, choice: _Choice, delta: TokenDelta) -> RequestOutput | None:
        """Take in one step's tokens; the finished output if they end the prompt's last choice."""
        if delta.error is not None:
            raise ValueError(f"request {one.request_id}: {delta.error}")
        if not one.first_token_time:
            one.first_token_time = time.monotonic()
            one.num_cached_tokens = delta.num_cached_tokens
        if delta.prompt_logprobs is not None:
            one.prompt_logprobs = delta.prompt_logprobs
        one.vector = delta.vector or one.vector
        choice.token_ids += delta.token_ids
        choice.logprobs += delta.logprobs or []
        reason: str | None = delta.finish_reason
        stop_reason: int | str | None = delta.stop_token
        num_tokens = len(choice.token_ids)
        if choice.detokenizer is not None:
            choice.text += choice.detokenizer.push(
                delta.token_ids, last=reason is not None, stopped=reason == "stop"
            )
            if choice.detokenizer.stop_string is not None:
                reason, stop_reason = "stop", choice.detokenizer.stop_string
                num_tokens = choice.detokenizer.num_tokens
                self.engine.abort(choice.request.id)
        if reason is None:
            return None
        choice.output = self._finish(choice, num_tokens, reason, stop_reason)
        outputs = [choice.output for choice in one.choices if choice.output is not None]
        if len(outputs) < len(one.choices):
            return None
        prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        if one.prompt_logprobs is not None:
            prompt_logprobs = [None, *map(self._by_token, one.prompt_logprobs)]
        return RequestOutput(
            one.request_id,
            one.prompt,
            one.token_ids,
            outputs,
            one.num_cached_tokens,
            RequestMetrics(one.arrival_time, one.first_token_time, time.monotonic()),
            prompt_logprobs,
            vector=one.vector,
        )

    def _finish(
        self, choice: _Choice, num_tokens: int, reason: str, stop_reason: int | str | None
    ) -> CompletionOutput:
        logprobs, cumulative = None, None
        if choice.request.params.logprobs is not None:
            taken = choice.logprobs[:num_tokens]
            logprobs = [self._by_token(position) for position in taken]
            cumulative = sum(position.logprobs[0] for position in taken)
        token_ids = choice.token_ids[:num_tokens]
        return CompletionOutput(
            choice.index, choice.text, token_ids, reason, stop_reason, cumulative, logprobs
        )

    def _by_token(self, position: TokenLogprobs) -> dict[int, Logprob]:
        ranks = [position.rank, *range(1, len(position.token_ids))]
        return {
            token: Logprob(logprob, rank, self._token_text(token))
            for token, logprob, rank in zip(
                position.token_ids, position.logprobs, ranks, strict=True
            )
        }

    def _token_text(self, token: int) -> str | None:
        if self.tokenizer is None:
            return None
        return self.tokenizer.token_bytes(token).decode(errors="replace")


def _cosine(first: Sequence[float], second: Sequence[float]) -> float:
    product = sum(a * b for a, b in zip(first, second, strict=True))
    return product / max(math.hypot(*first) * math.hypot(*second), 1e-12)
