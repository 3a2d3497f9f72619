"""Text to tokens and back, without importing torch.

transformers' AutoTokenizer would pull torch into the serving front, so this uses the library
beneath it, `tokenizers`.
"""

import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Encoding
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import BPE

from engine.checkpoint.derived import derived
from engine.checkpoint.files import CheckpointError, special_tokens, tokenizer_config
from engine.errors import PromptTooLongError
from engine.text.chat_template import ChatTemplates, read_templates

# What transformers makes a tokenizer.json of: SentencePiece, Mistral's, tiktoken's, byte-level BPE.
_OTHERS = ("tokenizer.model", "tekken.json", "tiktoken.model", "vocab.json")
# Characters that no text has for every token of it, unless it is of long runs of one character.
_USUAL_TOKEN = 16


class _Pieces:
    """The bytes of single tokens, by the kind of decoder that the tokenizer has."""

    def __init__(self, tokenizer: FastTokenizer, special: Collection[str]) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._added = tokenizer.get_added_tokens_decoder()
        decoder = tokenizer.decoder.__getstate__().decode() if tokenizer.decoder else ""
        self._is_byte_level = '"ByteLevel"' in decoder
        self._has_spaces = "▁" in decoder

    def is_special(self, token: int) -> bool:
        return token in self._added and self._added[token].content in self._special

    def bytes_of(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].content.encode()
        piece = self._tokenizer.id_to_token(token)
        if piece is None:
            return b""
        if self._is_byte_level and all(letter in _BYTES for letter in piece):
            return bytes(_BYTES[letter] for letter in piece)
        if re.fullmatch("<0x[0-9A-F]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        return (piece.replace("▁", " ") if self._has_spaces else piece).encode()


def _byte_letters() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: themselves, or 256 and up."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }


_BYTES = _byte_letters()


def _declared_tokens(
    config: dict[str, Any], named: dict[str, str], known: set[str]
) -> list[AddedToken]:
    """Tokens of the tokenizer's configuration; those that it alone has get ids in this order.

    Args:
        known: texts of those that the tokenizer has.
    """
    listed = config.get("added_tokens_decoder", {})
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    tokens = [listed[i] for i in sorted(listed, key=int)]
    known = known | {token["content"] for token in tokens}
    for special in (*named.values(), *(extra if isinstance(extra, list) else ())):
        token = special if isinstance(special, dict) else {"content": special}
        if token["content"] not in known:
            tokens.append(token | {"special": True})
    fields = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return [AddedToken(**{name: t[name] for name in fields if name in t}) for t in tokens]


def has_tokenizer(directory: Path) -> bool:
    return any((directory / name).exists() for name in ("tokenizer.json", *_OTHERS))


def _tokenizer_json(directory: Path) -> Path:
    """The file, made of others by transformers where the checkpoint has none."""
    path = directory / "tokenizer.json"
    others = [directory / name for name in _OTHERS if (directory / name).exists()]
    if path.exists():
        return path
    if not others:
        raise CheckpointError(
            f"{directory} has no tokenizer: neither tokenizer.json nor {', '.join(_OTHERS)}"
        )
    return derived(others, "engine.text.convert") / "tokenizer.json"


def load_tokenizer(directory: Path) -> "Tokenizer":
    return Tokenizer(directory) if has_tokenizer(directory) else NoTokenizer()


class Tokenizer:
    """The tokenizer and chat templates of a checkpoint directory."""

    knows_text = True

    def __init__(self, directory: Path) -> None:
        self.fast = FastTokenizer.from_file(str(_tokenizer_json(directory)))
        self.fast.no_truncation()
        self.fast.no_padding()
        config = tokenizer_config(directory)
        named = special_tokens(directory)
        added = {t.content for t in self.fast.get_added_tokens_decoder().values()}
        declared = _declared_tokens(config, named, added)
        self.fast.add_tokens(declared)
        tokens = [*self.fast.get_added_tokens_decoder().values(), *declared]
        special = {token.content for token in tokens if token.special}
        others = {token.content for token in tokens} - special
        self._pieces = _Pieces(self.fast, special)
        self.chat_templates = ChatTemplates(
            read_templates(directory, config), config, named, special, others
        )
        self.info: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",  # where the checkpoint names none
            **config,
            "chat_template": self.chat_templates.source(),
        }

    @property
    def chat_template(self) -> str | None:
        return self.chat_templates.source()

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token."""
        return max(map(len, self.fast.get_vocab()))

    def encode(
        self, text: str, add_special_tokens: bool = True, max_len: int | None = None
    ) -> list[int]:
        """Token ids of a text; by default with the model's own prefix, such as a BOS token.

        Raises PromptTooLongError for a text so long that it must be more than `max_len` tokens,
        before time is spent on all of it.
        """
        self._check_size(text, max_len)
        return self._encode(text, add_special_tokens).ids

    def _check_size(self, text: str, max_len: int | None) -> None:
        if max_len is None:
            return
        usual = max_len * _USUAL_TOKEN
        if len(text) > max_len * self.longest_token or (
            len(text) > usual and len(self._encode(text[:usual])) > max_len + self.longest_token
        ):
            raise PromptTooLongError(
                max_len,
                f"the prompt has {len(text)} characters, more than fit a window of {max_len} "
                "tokens",
            )

    def _encode(self, text: str, add_special_tokens: bool = False) -> Encoding:
        """A batch of one, because the library lets go of the GIL only for batches."""
        return self.fast.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.fast.decode_batch([token_ids], skip_special_tokens=skip_special_tokens)[0]

    def token_bytes(self, token: int) -> bytes:
        """What one token stands for, which may be a part of a character; b"" beyond the vocabulary.

        Special tokens stand for their names.
        """
        return self._pieces.bytes_of(token)

    def is_special(self, token: int) -> bool:
        """Whether the token is one that texts are usually decoded without."""
        return self._pieces.is_special(token)

    def encode_bad_words(self, words: Sequence[str]) -> list[list[int]]:
        """The token sequences that write these words, at the beginning of a text and after a space.

        As in vLLM: the second only where it is the same number of tokens and begins differently.
        """
        sequences: list[list[int]] = []
        for word in words:
            bare, spaced = (
                self.encode(prefix + word.lstrip(), add_special_tokens=False)
                for prefix in ("", " ")
            )
            sequences.append(bare)
            if len(spaced) == len(bare) and spaced[:1] != bare[:1]:
                sequences.append(spaced)
        return [tokens for tokens in sequences if tokens]

    def encode_chat(
        self, messages: Sequence[dict[str, Any]], max_len: int | None = None, **options: Any
    ) -> list[int]:
        """Token ids of a chat; options as for `ChatTemplates.render`. Templates write their BOS.

        What the messages say is text, also where it reads like a special token.
        """
        text, mark = self.chat_templates.render(messages, **options)
        self._check_size(text, max_len)
        if not mark:
            return self.encode(text, add_special_tokens=False)
        if max_len is not None and text.count(mark) > max_len:  # each piece is a token at least
            what = f"the prompt has more tokens than fit a window of {max_len}"
            raise PromptTooLongError(max_len, what)
        first, *others = text.split(mark)
        ids = self.encode(first, add_special_tokens=False)
        for piece in others:
            ids += self._encode_further(piece)
        return ids

    def warm_up(self) -> None:
        """Import what renders chats, which takes seconds, before the first one waits for it."""
        with suppress(ValueError):  # the template may refuse this one, or there is none
            self.encode_chat([{"role": "user", "content": ""}])

    def _encode_further(self, text: str) -> list[int]:
        """Token ids of a text that others precede: no space comes before its first word.

        As transformers has it: behind a newline, which is then taken away.
        """
        ids = self.encode("\n" + text, add_special_tokens=False)
        size = len(self._newline)
        if ids[:size] == self._newline:
            return ids[size:]
        return self.encode(text, add_special_tokens=False)

    @cached_property
    def _newline(self) -> list[int]:
        return self.encode("\n", add_special_tokens=False)


class NoTokenizer(Tokenizer):
    """Of a checkpoint without one: its tokens have no text, and texts are refused."""

    knows_text = False

    def __init__(self) -> None:
        self.fast = FastTokenizer(BPE())
        self._pieces = _Pieces(self.fast, ())
        self.chat_templates = ChatTemplates({}, {}, {}, set(), set())

    def encode(
        self, text: str, add_special_tokens: bool = True, max_len: int | None = None
    ) -> list[int]:
        raise ValueError("this checkpoint has no tokenizer; give prompts as token ids")

    def encode_chat(
        self, messages: Sequence[dict[str, Any]], max_len: int | None = None, **options: Any
    ) -> list[int]:
        return self.encode("")
