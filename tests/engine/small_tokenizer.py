"""Small tokenizers for the tiny checkpoints; tokens 0 to 2 are special.

In the two of the kinds that are in use, token 3 + b is byte b, and the vocabulary is smaller than
the model's, as is usual: the ids that are left decode to nothing.
"""

import tempfile
from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers

from engine.text.tokenizer import Tokenizer
from tests.checkpoints import VOCAB_SIZE

SPECIAL_TOKENS = ["<pad>", "<bos>", "<eos>"]
# Letters, whole characters, parts of characters, and parts of characters next to letters.
MERGES = [
    (b"t", b"h"),
    (b"th", b"e"),
    (b" ", b"the"),
    (b"c", b"a"),
    (b"ca", b"t"),
    (b"\xe6", b"\x97"),
    (b"\xe6\x97", b"\xa5"),
    (b"\xe2", b"\x82"),
    (b"\x82", b"\xac"),
    (b"a", b"\xe2"),
    (b"\xac", b"b"),
]
NUM_TOKENS = 3 + 256 + len(MERGES)


def byte_letter(byte: int) -> str:
    """GPT-2's printable stand-in for a byte: itself, or for what is not printable 256 and up."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if byte in printable:
        return chr(byte)
    return chr(256 + [b for b in range(256) if b not in printable].index(byte))


def letters(data: bytes) -> str:
    return "".join(byte_letter(byte) for byte in data)


def byte_level() -> FastTokenizer:
    """Byte-level BPE, as in Qwen and Llama 3."""
    merges = [(letters(left), letters(right)) for left, right in MERGES]
    names = [*SPECIAL_TOKENS, *map(byte_letter, range(256)), *(a + b for a, b in merges)]
    tokenizer = FastTokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges))
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_fallback() -> FastTokenizer:
    """Words after "▁", and bytes for what no word has, as in Mistral's and Llama 2's."""
    words = ["▁", "▁the", "▁cat", "s", "a", "b", "é", "日", "▁▁", "th", "e"]
    names = [*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocab = {name: i for i, name in enumerate(names)}
    tokenizer = FastTokenizer(models.BPE(vocab, [], byte_fallback=True))
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def one_character_each() -> FastTokenizer:
    """Every token of the tiny checkpoints is one printable character: whatever they say is text."""
    characters = [*map(chr, range(32, 127)), *map(chr, range(0x4E00, 0x4E00 + 1000))]
    names = [*SPECIAL_TOKENS, *characters][:VOCAB_SIZE]
    tokenizer = FastTokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def load(tokenizer: FastTokenizer) -> Tokenizer:
    """The engine's wrapper of it."""
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save(f"{directory}/tokenizer.json")
        return Tokenizer(Path(directory))
