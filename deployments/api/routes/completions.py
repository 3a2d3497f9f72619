"""POST /v1/completions."""

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from deployments.api.admission import (
    check_model,
    check_prompt,
    check_queue,
    metrics,
    prompt_error,
    request_options,
    sampling_params,
    usage,
)
from deployments.api.bodies import BodyRoute
from deployments.api.requests.resume import event_id, given_resume, go_on
from deployments.api.schema import answers
from deployments.api.schema.answers import documented
from deployments.api.schema.completion_request import CompletionRequest
from deployments.api.schema.openai_logprobs import TextLogprobs, prompt_logprobs
from deployments.api.scope import scope
from deployments.api.streaming import Chunks, EventStream, event, once_accepted
from deployments.api.whole import Output, Whole, collect
from deployments.front.front import Front
from deployments.front.generation import Generation, TextDelta, TextDeltas
from deployments.front.request_options import RequestOptions
from engine.sampling_params import SamplingParams


@dataclass(frozen=True)
class _Started:
    """A request under way: each prompt has num_choices outputs, one after another."""

    front: Front
    request: CompletionRequest
    params: SamplingParams
    options: RequestOptions
    head: dict[str, Any]  # what all answers begin with
    prompts: list[list[int]]
    num_outputs: int
    steps: Generation | AsyncGenerator[TextDeltas]

    def logprobs(self, prompt: list[int]) -> TextLogprobs | None:
        """What makes the logprobs of a choice, if they are asked for."""
        if self.request.logprobs is None:
            return None
        echoed = prompt if self.request.echo else None
        skips, as_ids = self.request.skip_special_tokens, self.request.return_tokens_as_token_ids
        return TextLogprobs(self.front.tokenizer, echoed, skips, as_ids)

    def token_ids(
        self, prompt: list[int], output: Output | TextDelta, is_first: bool
    ) -> dict[str, Any]:
        """A choice's fields with token ids, if they are asked for."""
        if not self.request.return_token_ids:
            return {}
        of_prompt = {"prompt_token_ids": prompt} if is_first else {}
        return {**of_prompt, "token_ids": list(output.token_ids)}

    def usage(self, outputs: Sequence[Output | TextDelta]) -> dict[str, Any]:
        """Token counts, given all outputs."""
        firsts = outputs[:: self.request.num_choices]
        return usage(
            sum(map(len, self.prompts)),
            sum(output.num_tokens for output in outputs),
            sum(output.num_cached_tokens for output in firsts),
        )


def routes(front: Front) -> APIRouter:
    router = APIRouter(route_class=BodyRoute)

    @router.post(
        "/v1/completions",
        response_model=None,
        responses=documented(answers.TextCompletion, streams=True),
    )
    async def create_completion(request: CompletionRequest) -> Response:
        if not request.stream:
            return await (await complete_text(front, request)).response()
        started = await _start(front, request)
        return EventStream(await once_accepted(_events(started), started.params))

    return router


async def complete_text(front: Front, request: CompletionRequest) -> Whole:
    """Raises ApiError for a request that cannot be served."""
    started = await _start(front, request)
    async with aclosing(started.steps) as steps:
        outputs = await collect(steps, started.num_outputs)
    return Whole(outputs, partial(_answer, started))


def _answer(started: _Started, outputs: list[Output]) -> dict[str, Any]:
    request = started.request
    choices: list[dict[str, Any]] = []
    for i, prompt in enumerate(started.prompts):
        own = outputs[i * request.num_choices : (i + 1) * request.num_choices]
        of_prompt = own[0].prompt_logprobs
        if request.num_choices > request.n:
            own = sorted(own, key=lambda output: output.mean_logprob, reverse=True)[: request.n]
        for output in own:
            output = replace(output, prompt_logprobs=of_prompt)
            choices.append(_choice(started, len(choices), prompt, output))
    told = metrics(request, started.options)
    return started.head | {"choices": choices, "usage": started.usage(outputs)} | told


async def _start(front: Front, request: CompletionRequest) -> _Started:
    check_model(front, request)
    check_queue(front, len(request.prompts))
    options = request_options(front, request)
    params = await sampling_params(front, request)
    resume, num_prompts = given_resume(request.resume), len(request.prompts)
    params, options = await go_on(resume, front, params, options, num_prompts)
    handed = scope().handed if num_prompts == 1 else None
    prompts: list[list[int]] = []
    texts: list[str] = []  # of them, for echo
    for prompt in request.prompts:
        tokens = handed.tokens if handed else await _encode(front, prompt, params)
        kept = front.truncate(tokens, params)
        check_prompt(front, kept, params, "prompt", options.known_tokens)
        prompts.append(kept)
        is_whole = isinstance(prompt, str) and len(kept) == len(tokens)
        if request.echo and not is_whole:
            prompt = await front.decode(kept, params.skip_special_tokens)
        texts.append(str(prompt))
    num_choices = request.num_choices
    num_tokens = sum(map(len, prompts)) + len(options.known_tokens)
    check_queue(front, len(prompts) * num_choices, num_tokens * num_choices)
    scope().end_reading()
    head = {
        "id": f"cmpl-{secrets.token_hex(12)}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": front.model_name,
        "system_fingerprint": front.fingerprint,
    }
    generation = front.generate(prompts, params, options)
    has_shape = request.echo or request.max_tokens == 0
    steps = _as_asked(generation, request, texts) if has_shape else generation
    return _Started(front, request, params, options, head, prompts, len(generation), steps)


async def _encode(front: Front, prompt: str | list[int], params: SamplingParams) -> list[int]:
    if not isinstance(prompt, str):
        return prompt
    try:
        return await front.encode(prompt, max_len=front.max_prompt_len(params))
    except ValueError as error:
        raise prompt_error(error, "prompt") from error


async def _as_asked(
    generation: Generation, request: CompletionRequest, prompts: Sequence[str]
) -> AsyncGenerator[TextDeltas]:
    """With `echo` the prompt begins the text; with max_tokens=0 nothing generated is in it."""
    begun: set[int] = set()
    async with aclosing(generation):
        async for news in generation:
            shaped: TextDeltas = []
            for index, delta in news:
                if request.max_tokens == 0:
                    generation.complete(index)
                    delta = _without_output(delta)
                if request.echo and index not in begun:
                    delta.text = prompts[index // request.num_choices] + delta.text
                begun.add(index)
                shaped.append((index, delta))
            yield shaped


def _without_output(delta: TextDelta) -> TextDelta:
    return replace(
        delta,
        text="",
        num_tokens=0,
        token_ids=(),
        finish_reason="length",
        stop_reason=None,
        logprobs=None,
    )


def _choice(started: _Started, index: int, prompt: list[int], output: Output) -> dict[str, Any]:
    logprobs = started.logprobs(prompt)
    choice = {
        "index": index,
        "text": output.text,
        "logprobs": logprobs.take(output) if logprobs else None,
        "finish_reason": output.finish_reason,
        "stop_reason": output.stop_reason,
        **started.token_ids(prompt, output, is_first=True),
    }
    if started.request.prompt_logprobs is None:
        return choice
    taken = output.prompt_logprobs or []
    return choice | {"prompt_logprobs": prompt_logprobs(started.front.tokenizer, taken)}


async def _events(started: _Started) -> AsyncGenerator[str]:
    """One text for all that has come, however many events it has: each is one write."""
    head, num_choices = started.head, started.request.num_choices
    chunks = Chunks(head)
    logprobs = [started.logprobs(p) for p in started.prompts for _ in range(num_choices)]
    last: dict[int, TextDelta] = {}
    async with aclosing(started.steps) as steps:
        async for news in steps:
            events = []
            for index, delta in news:
                prompt, own = started.prompts[index // num_choices], logprobs[index]
                is_first = index not in last and not delta.is_known
                last[index] = delta
                if delta.is_known:
                    if own is not None:
                        own.take(delta)  # offsets go on from there
                    if delta.finish_reason is None:
                        continue
                    delta = delta.end_alone()
                token_ids = started.token_ids(prompt, delta, is_first)
                if delta.text or delta.finish_reason or delta.logprobs or token_ids:
                    choice = {
                        "index": index,
                        "text": delta.text,
                        "logprobs": own.take(delta) if own else None,
                        "finish_reason": delta.finish_reason,
                        **token_ids,
                    }
                    if delta.finish_reason is not None:
                        choice["stop_reason"] = delta.stop_reason
                    counts = None
                    if started.request.continuous_usage:
                        counts = usage(len(prompt), delta.num_tokens, delta.num_cached_tokens)
                    is_only = started.num_outputs == 1
                    id_line = event_id(started.params, delta.num_tokens) if is_only else ""
                    events.append(id_line + chunks.event(choice, counts))
            if events:
                yield "".join(events)
    ending = metrics(started.request, started.options)
    if started.request.include_usage:
        outputs = [last[index] for index in range(started.num_outputs)]
        ending["usage"] = started.usage(outputs)
    if ending:
        yield event(head | {"choices": []} | ending)
