"""The outputs of a request on their way: what engine steps bring them, as text.

Between the engine's message and the event that is made of it there is one place to wait, for all
outputs of a request together; what lies behind is called, not awaited.
"""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from deployments.front.arrivals import Arrivals
from deployments.front.engine_client import EngineClient, Live
from deployments.front.request_options import RequestOptions
from deployments.observe.request_record import RequestRecord
from deployments.off_loop import off_loop
from engine.sampling_params import SamplingParams
from engine.schedule.step import TokenDelta, TokenLogprobs
from engine.text.detokenizer import Detokenizer
from engine.text.tokenizer import Tokenizer

# Outputs begin a few at a time: each has something to do, and others want to run too.
STARTED_AT_ONCE = 16


@dataclass(slots=True)  # not frozen, which would double what making one costs
class TextDelta:
    """What one engine step brought an output, as text."""

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

    def end_alone(self) -> "TextDelta":
        """What is left of it for a client that has the rest."""
        return replace(self, text="", logprobs=None, prompt_logprobs=None, token_ids=())


# By the index of the output.
TextDeltas = list[tuple[int, TextDelta]]


class Generation:
    """Iterates over what the steps bring, to the last output's end. To close it aborts the others.

    Every output has at least one delta, and its last one has a finish_reason. Without
    `options.stream` text comes when an output has ended, unless something in it can end it. Raises
    what `EngineClient.start` and the requests it starts raise. The caller has had the parameters
    passed by `Front.in_tokens` and `Front.check`.
    """

    def __init__(
        self,
        client: EngineClient,
        tokenizer: Tokenizer,
        asked: Sequence[tuple[list[int], SamplingParams, int]],
        options: RequestOptions,
    ) -> None:
        """
        Args:
            asked: of each output the prompt, the parameters and the seed.
        """
        self._client = client
        self._tokenizer = tokenizer
        self._asked = asked
        self._options = options
        self._outputs: list[_Output] = []
        self._lives: list[Live | None] = []  # None once it has ended
        self._num_ended = 0
        self._arrivals = Arrivals()

    def __len__(self) -> int:
        return len(self._asked)

    def __aiter__(self) -> "Generation":
        return self

    async def __anext__(self) -> TextDeltas:
        news = [] if self._outputs else await self._start()
        if self._num_ended == len(self._asked):
            raise StopAsyncIteration
        if not news:
            for index, delta in (await self._arrivals.take()).items():
                if self._lives[index] is not None:
                    news += ((index, text) for text in self._outputs[index].read(delta))
        for index, text in news:
            if text.finish_reason is not None:
                self._leave(index)
        return news

    async def _start(self) -> TextDeltas:
        """Returns what there is already, of an output that is gone on with."""
        known: TextDeltas = []
        for index, (prompt, params, seed) in enumerate(self._asked):
            options = self._options
            num_prompt = len(prompt) + len(options.known_tokens)
            is_again = index > 0 and prompt is self._asked[index - 1][0]
            record = RequestRecord(num_prompt, params.max_tokens, shares_prompt=is_again)
            options.records.append(record)
            output = _Output(self._tokenizer, prompt, params, options, record)
            self._outputs.append(output)
            if options.known_tokens:
                delta = self._known_delta(len(prompt), params)
                record.finish_reason = delta.finish_reason
                texts = await off_loop(len(delta.token_ids), list, output.read(delta))
                known = [(index, text) for text in texts]
            if params.stop and not options.stream:  # which is found only in the text
                options = replace(options, stream=True)
            arrivals = self._arrivals
            self._lives.append(
                self._client.start(prompt, params, seed, options, record, arrivals, index)
            )
            if (index + 1) % STARTED_AT_ONCE == 0:
                await asyncio.sleep(0)
        return known

    def _known_delta(self, num_prompt: int, params: SamplingParams) -> TokenDelta:
        """What there is, which may be all: then only its end was not heard."""
        delta = TokenDelta("", list(self._options.known_tokens))
        if self._client.limits is not None:
            ending = self._client.limits.ending(num_prompt, delta.token_ids, params)
            delta.finish_reason, delta.stop_token = ending
        return delta

    def complete(self, index: int) -> None:
        """The output is told to be complete; there will be no more of it."""
        if self._lives[index] is not None:
            self._outputs[index].record.finish_reason = "stop"
            self._leave(index)

    def _leave(self, index: int) -> None:
        live, self._lives[index] = self._lives[index], None
        if live is not None:
            self._num_ended += 1
            self._client.leave(live)

    async def aclose(self) -> None:
        for index in range(len(self._lives)):
            self._leave(index)


class _Output:
    """One output's tokens as text."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: list[int],
        params: SamplingParams,
        options: RequestOptions,
        record: RequestRecord,
    ) -> None:
        self.record = record
        self._detokenizer = Detokenizer(tokenizer, prompt, params, options.shown_tokens)
        self._num_known = options.position or 0  # tokens whose text the client has
        self._by_token = options.by_token
        self._held: list[TokenLogprobs] = []  # of tokens whose text is held back

    def read(self, delta: TokenDelta) -> Iterator[TextDelta]:
        """The text that a step brings, in two parts where the client has only the first.

        Up to the end of the output: nothing follows a finish_reason.
        """
        ids, logprobs, start = delta.token_ids, delta.logprobs, 0
        cut = self._num_known - self._detokenizer.num_tokens
        last_cut = len(ids) - 1 if self._by_token else min(cut, len(ids) - 1)
        for end in range(max(cut, 1), last_cut + 1):
            own = logprobs and logprobs[start:end]
            part = replace(delta, token_ids=ids[start:end], finish_reason=None, stop_token=None)
            text = self._text_of(replace(part, logprobs=own))
            yield text
            if text.finish_reason is not None:
                return
            delta, start = replace(delta, prompt_logprobs=None), end
        if start:
            delta = replace(delta, token_ids=ids[start:], logprobs=logprobs and logprobs[start:])
        yield self._text_of(delta)

    def _text_of(self, delta: TokenDelta) -> TextDelta:
        detokenizer, reason = self._detokenizer, delta.finish_reason
        stop_reason: int | str | None = delta.stop_token
        before = detokenizer.num_tokens
        text = detokenizer.push(delta.token_ids, last=reason is not None, stopped=reason == "stop")
        if detokenizer.stop_string is not None:
            self.record.finish_reason = reason = "stop"
            stop_reason = detokenizer.stop_string
            num_tokens = detokenizer.num_tokens - before  # what came after it is not there
            delta.token_ids = delta.token_ids[:num_tokens]
            delta.logprobs = delta.logprobs and delta.logprobs[:num_tokens]
        logprobs: list[TokenLogprobs] | None = None
        if delta.logprobs is not None:
            self._held += delta.logprobs
            num_out = len(self._held) - (0 if reason else detokenizer.num_held)
            if num_out:
                logprobs, self._held = self._held[:num_out], self._held[num_out:]
        return TextDelta(
            text,
            detokenizer.num_tokens,
            self.record.num_cached,
            reason,
            stop_reason,
            logprobs,
            delta.prompt_logprobs,
            delta.token_ids,
            is_known=detokenizer.num_tokens <= self._num_known,
        )
