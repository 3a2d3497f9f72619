"""Text to tokens and back, without importing torch.

transformers' AutoTokenizer would pull torch into the serving front, so this uses the library
beneath it, `tokenizers`, and transformers' own renderer for chat templates.
"""

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from tokenizers import Encoding
from tokenizers import Tokenizer as FastTokenizer

from engine.checkpoint import CheckpointError, read_json

# Characters that no text has for every token of it, unless it is of long runs of one character.
_USUAL_TOKEN = 16


class _Pieces:
    """The bytes of single tokens, by the kind of decoder that the tokenizer has."""

    def __init__(self, tokenizer: FastTokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = tokenizer.get_added_tokens_decoder()
        decoder = tokenizer.decoder.__getstate__().decode() if tokenizer.decoder else ""
        self._is_byte_level = '"ByteLevel"' in decoder
        self._has_spaces = "▁" in decoder

    def is_special(self, token: int) -> bool:
        return token in self._added and self._added[token].special

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


class Tokenizer:
    """The tokenizer and chat template of a checkpoint directory."""

    def __init__(self, directory: Path) -> None:
        path = directory / "tokenizer.json"
        if not path.exists():
            raise CheckpointError(
                f"{directory} has no tokenizer.json. Make one with transformers: "
                "AutoTokenizer.from_pretrained(…).save_pretrained(…)"
            )
        self.fast = FastTokenizer.from_file(str(path))
        self.fast.no_truncation()
        self.fast.no_padding()
        config = read_json(directory, "tokenizer_config.json")
        self._special = {
            str(name): token["content"] if isinstance(token, dict) else token
            for name, token in config.items()
            if name.endswith("_token") and isinstance(token, (str, dict))
        }
        self._pieces = _Pieces(self.fast)
        template_file = directory / "chat_template.jinja"
        template = (
            template_file.read_text(encoding="utf-8")
            if template_file.exists()
            else config.get("chat_template")
        )
        if isinstance(template, list):  # several, by name
            named = {entry["name"]: entry["template"] for entry in template}
            template = named.get("default")
        self.chat_template: str | None = template

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token."""
        return max(map(len, self.fast.get_vocab()))

    def encode(
        self, text: str, add_special_tokens: bool = True, max_len: int | None = None
    ) -> list[int]:
        """Token ids of a text; by default with the model's own prefix, such as a BOS token.

        Raises ValueError for a text so long that it must be more than `max_len` tokens, before time
        is spent on all of it.
        """
        if max_len is not None:
            usual = max_len * _USUAL_TOKEN
            is_longer = len(text) > max_len * self.longest_token or (
                len(text) > usual and len(self._encode(text[:usual])) > max_len + self.longest_token
            )
            if is_longer:
                raise ValueError(
                    f"the prompt has {len(text)} characters, more than fit a window of {max_len} "
                    "tokens"
                )
        return self._encode(text, add_special_tokens).ids

    def _encode(self, text: str, add_special_tokens: bool = False) -> Encoding:
        """Of a batch, because the library lets go of the GIL only for batches."""
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
            if len(spaced) == len(bare) and spaced[0] != bare[0]:
                sequences.append(spaced)
        return [tokens for tokens in sequences if tokens]

    def render_chat(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **template_kwargs: Any,
    ) -> str:
        """Messages as the prompt text that the checkpoint's template makes of them.

        Raises ValueError when there is no template or it refuses the messages.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        options: dict[str, Any] = self._special | template_kwargs
        if self.chat_template is None:
            raise ValueError(
                "this model has no chat template; send a text prompt to completions instead"
            )
        try:
            rendered, _ = render_jinja_template(
                [list(messages)],
                tools=list(tools) if tools else None,
                chat_template=self.chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **options,
            )
        except (jinja2.TemplateError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"the chat template refused the messages: {error}") from error
        return str(rendered[0])

    def encode_chat(
        self, messages: Sequence[dict[str, Any]], max_len: int | None = None, **options: Any
    ) -> list[int]:
        """Token ids of a chat; options as for `render_chat`. The template writes its own BOS."""
        text = self.render_chat(messages, **options)
        return self.encode(text, add_special_tokens=False, max_len=max_len)
