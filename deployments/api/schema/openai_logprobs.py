"""Log-probabilities as chat completions, text completions and vLLM's clients expect them."""

import codecs
from collections.abc import Sequence
from typing import Any

from deployments.api.whole import Output
from deployments.front.generation import TextDelta
from engine.schedule.step import TokenLogprobs
from engine.text.tokenizer import Tokenizer

_LOWEST = -9999.0  # JSON has no -inf; OpenAI's API says this


def token_name(tokenizer: Tokenizer, token: int, as_id: bool) -> str:
    """A token's text, or what vLLM's `return_tokens_as_token_ids` says instead."""
    if as_id or not tokenizer.knows_text:
        return f"token_id:{token}"
    return tokenizer.token_bytes(token).decode(errors="replace")


def chat_logprobs(
    tokenizer: Tokenizer, positions: Sequence[TokenLogprobs], as_ids: bool = False
) -> dict[str, Any]:
    """`logprobs` of a chat choice: for each token its text, bytes, and the most probable ones.

    Args:
        as_ids: see `token_name`.
    """

    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token)
        return {
            "token": token_name(tokenizer, token, as_ids),
            "logprob": max(logprob, _LOWEST),
            "bytes": list(data),
        }

    def position_entry(position: TokenLogprobs) -> dict[str, Any]:
        own, *top = map(entry, position.token_ids, position.logprobs)
        return own | {"top_logprobs": top}

    return {"content": [position_entry(position) for position in positions], "refusal": None}


def prompt_logprobs(
    tokenizer: Tokenizer, positions: Sequence[TokenLogprobs]
) -> list[dict[str, Any] | None]:
    """`prompt_logprobs` as vLLM's server has it: by token id; null for the prompt's first token."""

    def by_token(position: TokenLogprobs) -> dict[str, Any]:
        ranks = [position.rank, *range(1, len(position.token_ids))]
        return {
            str(token): {
                "logprob": max(logprob, _LOWEST),
                "rank": rank,
                "decoded_token": tokenizer.token_bytes(token).decode(errors="replace"),
            }
            for token, logprob, rank in zip(
                position.token_ids, position.logprobs, ranks, strict=True
            )
        }

    return [None, *map(by_token, positions)]


class TextLogprobs:
    """`logprobs` of one choice of a text completion: four parallel lists, piece by piece.

    Args:
        echoed: tokens of the prompt, where the choice's text begins with it.
        skip_special_tokens: whether they are no part of the text, and so have no width in it.
        as_ids: see `token_name`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        echoed: Sequence[int] | None,
        skip_special_tokens: bool,
        as_ids: bool = False,
    ) -> None:
        self._as_ids = as_ids
        self._tokenizer = tokenizer
        self._echoed = echoed
        self._skip_special_tokens = skip_special_tokens
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def take(self, delta: TextDelta | Output) -> dict[str, Any]:
        """What one delta, or a whole output, brings."""
        lists: dict[str, Any] = {
            "text_offset": [],
            "token_logprobs": [],
            "tokens": [],
            "top_logprobs": [],
        }
        if self._echoed is not None and delta.prompt_logprobs is not None:
            self._append(lists, self._echoed[0], None, None)
            for position in delta.prompt_logprobs:
                self._append_position(lists, position)
        for position in delta.logprobs or ():
            self._append_position(lists, position)
        return lists

    def _append_position(self, lists: dict[str, Any], position: TokenLogprobs) -> None:
        listed = [
            (t, max(x, _LOWEST)) for t, x in zip(position.token_ids, position.logprobs, strict=True)
        ]
        # The most probable first: where two tokens read the same, its number stands.
        top: dict[str, float] = {}
        for token, logprob in [*listed[1:], listed[0]]:
            top.setdefault(self._text(token), logprob)
        self._append(lists, *listed[0], top)

    def _append(
        self, lists: dict[str, Any], token: int, logprob: float | None, top: dict[str, float] | None
    ) -> None:
        lists["text_offset"].append(self._offset)
        lists["token_logprobs"].append(logprob)
        lists["tokens"].append(self._text(token))
        lists["top_logprobs"].append(top)
        if not (self._skip_special_tokens and self._tokenizer.is_special(token)):
            self._offset += len(self._characters.decode(self._tokenizer.token_bytes(token)))

    def _text(self, token: int) -> str:
        return token_name(self._tokenizer, token, self._as_ids)
