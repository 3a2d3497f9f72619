"""Tokens to text as they come, and the search for stop strings in it."""

from collections.abc import Container, Sequence
from itertools import takewhile

from tokenizers.decoders import DecodeStream

from engine.sampling_params import SamplingParams
from engine.text.tokenizer import Tokenizer

# Prompt tokens that give the first output token its context, such as whether a space precedes it.
_CONTEXT = 4


class Detokenizer:
    """The text of one output.

    Feeds tokens to a `DecodeStream`, which holds back incomplete characters, and holds back itself
    whatever may yet become a stop string, so that no part of one is ever emitted.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        shown_tokens: Container[int] = (),
    ) -> None:
        """
        Args:
            shown_tokens: in the text though they are special.
        """
        self._tokenizer = tokenizer.fast
        self._params = params
        self._has_text = params.detokenize and tokenizer.knows_text
        self._is_special = tokenizer.is_special
        self._shown_tokens = shown_tokens
        self._stream = self._new_stream()
        self._undecoded: list[int] = []  # tokens since the stream last gave text
        self._unsaid = ""  # what the stream will repeat of a prompt that ends inside a character
        for token in prompt_token_ids[-_CONTEXT:] if self._has_text else ():
            self._decode(token)
        self._unsaid = self._flush() if self._has_text else ""
        self._held = ""  # text that may be the beginning of a stop string
        self._num_exempt = 0  # leading characters of it that came before min_tokens
        self.num_tokens = 0
        self._num_out = 0  # of them, up to the last one at which nothing was held back
        self.stop_string: str | None = None

    def push(self, token_ids: Sequence[int], last: bool, stopped: bool = False) -> str:
        """The text that these tokens make certain; all that is left if they are the `last`.

        If the last of them has `stopped` the output, it is only part of the text, as stop strings
        are, with include_stop_str_in_output; so it is in vLLM.

        Once a stop string is found, `stop_string` is set and `num_tokens` counts the tokens up to
        it; nothing more may be pushed.
        """
        emitted = ""
        if not self._has_text:
            self.num_tokens = self._num_out = self.num_tokens + len(token_ids)
            return emitted
        unsaid = int(stopped and not self._params.include_stop_str_in_output)
        for token in token_ids[: len(token_ids) - unsaid]:
            self.num_tokens += 1
            emitted += self._search(self._decode(token))
            if self.stop_string is not None:
                return emitted
            if not (self._held or self._undecoded):
                self._num_out = self.num_tokens
        self.num_tokens += unsaid
        if last:
            emitted += self._search(self._flush())
            if self.stop_string is None:
                emitted, self._held = emitted + self._held, ""
        return emitted

    @property
    def num_held(self) -> int:
        """The last tokens from the first on whose text has not come out yet, or not all of it."""
        return self.num_tokens - self._num_out

    def _new_stream(self, *context: int) -> DecodeStream:
        return DecodeStream(ids=list(context), skip_special_tokens=False)

    def _is_shown(self, token: int) -> bool:
        is_left_out = self._params.skip_special_tokens and self._is_special(token)
        return not is_left_out or token in self._shown_tokens

    def _decode(self, token: int) -> str:
        if not self._is_shown(token):
            return ""
        self._undecoded.append(token)
        try:
            text = self._stream.step(self._tokenizer, token)
        except Exception:  # the library's, when invalid UTF-8 confuses its prefix
            text = self._flush()
            self._stream = self._new_stream(token)
            self._unsaid = ""
            return text
        if text is None:
            return ""
        self._undecoded.clear()
        if self._unsaid:
            text, self._unsaid = text[_num_equal(text, self._unsaid) :], ""
        return text

    def _flush(self) -> str:
        """What is left undecoded, with replacement characters for what is incomplete."""
        text = self._tokenizer.decode(self._undecoded, skip_special_tokens=False)
        self._undecoded.clear()
        return text

    def _search(self, text: str) -> str:
        """Splits held + new text into what may be emitted and what must be held back."""
        if not self._params.stop or not text:
            return text
        text = self._held + text
        self._held = ""
        if self.num_tokens > self._params.min_tokens:
            found = [
                (start, stop)
                for stop in self._params.stop
                if (start := text.find(stop, max(self._num_exempt - len(stop) + 1, 0))) >= 0
            ]
            if found:
                index, self.stop_string = min(found)
                if self._params.include_stop_str_in_output:
                    index += len(self.stop_string)
                return text[:index]
        else:
            self._num_exempt = len(text)
        held = max(_overlap(text, stop) for stop in self._params.stop)
        self._num_exempt = max(self._num_exempt - (len(text) - held), 0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _num_equal(left: str, right: str) -> int:
    """How many first characters two texts have in common."""
    return sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False))
    )


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins, but does not complete, `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
