"""What is asked of an engine, and what may be."""

import itertools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from engine.errors import PromptTooLongError
from engine.sampling_params import SamplingParams


@dataclass(eq=False, slots=True)
class Request:
    """One prompt and its output.

    `output_token_ids` may start non-empty: a request resumed elsewhere goes on where it was, and as
    its random numbers depend on (seed, position) alone, it goes on with the same text.
    """

    id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    cache_salt: str = ""
    output_token_ids: list[int] = field(default_factory=list)
    priority: int = 0  # smaller is sooner, with the scheduling policy "priority"
    cache_owner: str = ""  # shares cached blocks with none of another; unlike the salt, not chosen
    flow: str = ""  # requests of one flow take turns with those of others
    prediction_token_ids: list[int] = field(default_factory=list)  # how the output may go
    weight: float = 1.0  # of the flow, with the scheduling policy "fair"


@dataclass(frozen=True)
class RequestLimits:
    """What a request may ask of an engine; the front checks it before it queues anything."""

    vocab_size: int
    max_model_len: int
    num_blocks: int
    block_size: int
    eos_token_ids: Collection[int] = ()
    num_labels: int | None = None  # of a classifier

    @property
    def max_len(self) -> int:
        """Most tokens, prompt and output together, that fit the window and the empty pool."""
        return min(self.max_model_len, self.num_blocks * self.block_size)

    def check_tokens(self, name: str, token_ids: Iterable[int]) -> None:
        """Raises ValueError for one that the model does not know."""
        for token in token_ids:
            if not 0 <= token < self.vocab_size:
                known = f"0 to {self.vocab_size - 1}"
                raise ValueError(f"{name}: token id {token} is outside the vocabulary ({known})")

    def check(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        output_token_ids: Sequence[int] = (),
    ) -> None:
        """Raises ValueError when the engine could never serve this request.

        That is a PromptTooLongError where a shorter prompt would help.

        Args:
            output_token_ids: that are there already, and may be all.
        """
        length = len(prompt_token_ids)
        if length == 0:
            raise ValueError("the prompt is empty; at least one token is needed")
        if length >= self.max_len:
            limit = (
                f"the context window is {self.max_model_len} tokens"
                if self.max_model_len == self.max_len
                else f"the KV cache holds {self.max_len} tokens ({self.num_blocks} blocks of "
                f"{self.block_size}); raise num_blocks"
            )
            raise PromptTooLongError(
                self.max_len,
                f"the prompt has {length} tokens, and with one token of output must fit: {limit}",
            )
        if length + len(output_token_ids) > self.max_len:
            raise ValueError(
                f"the prompt's {length} tokens and the {len(output_token_ids)} of its output that "
                f"are there are more than fit ({self.max_len})"
            )
        self._check_head(params)
        thinking = params.thinking_limit
        for name, tokens in (
            ("prompt", prompt_token_ids),
            ("output", output_token_ids),
            ("stop_token_ids", params.stop_token_ids),
            ("logit_bias", params.logit_bias),
            ("allowed_token_ids", params.allowed_token_ids or ()),
            ("bad_words_token_ids", itertools.chain(*params.bad_words_token_ids)),
            ("pooling", params.pooling.logits if params.pooling is not None else ()),
            ("thinking_limit", thinking.start + thinking.end if thinking is not None else ()),
        ):
            self.check_tokens(name, tokens)
        if (
            params.min_tokens > 0
            and params.allowed_token_ids is not None
            and params.end_tokens(self.eos_token_ids).issuperset(params.allowed_token_ids)
        ):
            raise ValueError(
                "allowed_token_ids: all of them end the output, which min_tokens does not allow; "
                "add others or leave min_tokens out"
            )

    def ending(
        self, num_prompt: int, output: Sequence[int], params: SamplingParams
    ) -> tuple[str | None, int | None]:
        """As in `TokenDelta`, the finish_reason and stop_token of an output that ends so, if any.

        Args:
            output: tokens that are there, one at least, of which only the last may be its end.
        """
        last = output[-1]
        if last in params.end_tokens(self.eos_token_ids):
            return "stop", last if last in params.stop_token_ids else None
        is_longest = num_prompt + len(output) >= params.longest(num_prompt, self.max_len)
        return "length" if is_longest else None, None

    def _check_head(self, params: SamplingParams) -> None:
        """Raises ValueError for what the model's head is not made for."""
        pooling = params.pooling
        if self.num_labels is None:
            if pooling is not None and pooling.kind == "labels":
                raise ValueError("pooling: 'labels' are a classifier's, and this is none")
        elif pooling is None or pooling.logits:
            raise ValueError("this model is a classifier, which writes no text; see /classify")
