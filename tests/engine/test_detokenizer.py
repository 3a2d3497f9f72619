"""Text comes out as it is decoded, never half a character, never part of a stop string."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.sampling_params import SamplingParams
from engine.text.detokenizer import Detokenizer
from engine.text.tokenizer import Tokenizer
from tests.engine import small_tokenizer
from tests.engine.small_tokenizer import NUM_TOKENS

BYTE_LEVEL = small_tokenizer.load(small_tokenizer.byte_level())
BYTE_FALLBACK = small_tokenizer.load(small_tokenizer.byte_fallback())
PROMPT = [3 + ord("x")]
PROPERTY = settings(max_examples=500, deadline=None, derandomize=True)


def byte_tokens(data: bytes | str) -> list[int]:
    """One token for each byte."""
    return [3 + byte for byte in (data.encode() if isinstance(data, str) else data)]


def stream(
    tokens: Sequence[int],
    tokenizer: Tokenizer = BYTE_LEVEL,
    prompt: Sequence[int] = PROMPT,
    chunk: int = 1,
    **params: Any,
) -> tuple[list[str], Detokenizer]:
    """The text as it comes, `chunk` tokens at a time, up to the end or a stop string."""
    detokenizer = Detokenizer(tokenizer, prompt, SamplingParams(max_tokens=None, **params))
    pieces = []
    for start in range(0, len(tokens), chunk):
        end = start + chunk
        pieces.append(detokenizer.push(tokens[start:end], last=end >= len(tokens)))
        if detokenizer.stop_string is not None:
            break
    return pieces, detokenizer


def text_of(tokens: Sequence[int], **options: Any) -> str:
    return "".join(stream(tokens, **options)[0])


# --- Characters -------------------------------------------------------------------------------


def test_text_comes_with_each_token() -> None:
    assert stream(byte_tokens("hi you"))[0] == ["h", "i", " ", "y", "o", "u"]


@pytest.mark.parametrize("character", ["é", "€", "日", "👋"])
def test_a_character_of_several_tokens_comes_with_its_last(character: str) -> None:
    size = len(character.encode())
    assert stream(byte_tokens(f"a{character}b"))[0] == ["a", *[""] * (size - 1), character, "b"]


def test_an_incomplete_character_at_the_end_is_replaced() -> None:
    assert text_of(byte_tokens(b"ab\xe2\x82")) == "ab�"


def test_an_incomplete_character_in_the_middle_is_replaced() -> None:
    assert text_of(byte_tokens(b"ab\xe2\x82cd")) == "ab�cd"


def test_a_replacement_character_in_the_text_itself_is_kept() -> None:
    assert text_of(byte_tokens("a�b�")) == "a�b�"


def test_special_tokens_are_left_out_unless_asked_for() -> None:
    tokens = [*byte_tokens("a"), 2, *byte_tokens("b"), 2]
    assert text_of(tokens) == "ab"
    assert text_of(tokens, skip_special_tokens=False) == "a<eos>b<eos>"


def test_special_tokens_that_somebody_reads_are_shown() -> None:
    """The same text as if only the others had been left out, also where spaces depend on it."""
    the = BYTE_FALLBACK.fast.token_to_id("▁the")
    for tokenizer, tokens in (
        (BYTE_LEVEL, [1, *byte_tokens("é"), 2]),
        (BYTE_FALLBACK, [1, 2, the]),
    ):
        detokenizer = Detokenizer(tokenizer, PROMPT, SamplingParams(), shown_tokens={2})
        text = "".join(detokenizer.push([token], last=False) for token in tokens)
        assert text == tokenizer.decode(tokens[1:], skip_special_tokens=False)


def test_ids_beyond_the_tokenizer_are_no_text() -> None:
    assert text_of([*byte_tokens("a"), NUM_TOKENS, *byte_tokens("b"), NUM_TOKENS + 9]) == "ab"


def test_the_prompt_decides_whether_a_leading_space_is_text() -> None:
    """Where a decoder drops the space before the first word, output is not at the beginning."""
    the, cat = (BYTE_FALLBACK.fast.token_to_id(word) for word in ("▁the", "▁cat"))
    assert BYTE_FALLBACK.decode([cat, the]) == "cat the"
    assert text_of([cat, the], tokenizer=BYTE_FALLBACK, prompt=[the]) == " cat the"


@pytest.mark.parametrize(
    "prompt, output, text",
    [
        (b"abcd\xe2\x82", b"\xac!", "€!"),  # completed: the character is the output's
        (b"abcd\xe2\x82", b"xy", "xy"),  # broken: what is left of it is the prompt's
        (b"abcd\xe2", b"", ""),
        ("abcd�".encode(), b"xy", "xy"),
        ("a���".encode(), b"xy", "xy"),
    ],
)
@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK])
def test_no_text_of_the_prompt_is_output(
    tokenizer: Tokenizer, prompt: bytes, output: bytes, text: str
) -> None:
    tokens, options = byte_tokens(output), dict(tokenizer=tokenizer, prompt=byte_tokens(prompt))
    assert text_of(tokens, **options) == text
    assert text_of(tokens, **options, stop=["d", "a"]) == text


any_token = st.integers(0, NUM_TOKENS + 2)
# Bytes of characters, whole and broken, as often as letters.
odd_token = st.sampled_from(byte_tokens(b"a \xe2\x82\xac\xe6\x97\xa5\xf0\x9f\x91\xff")) | any_token


@PROPERTY
@given(tokens=st.lists(odd_token, max_size=40), chunk=st.integers(1, 5), skip=st.booleans())
def test_streamed_text_is_the_decoded_text(tokens: list[int], chunk: int, skip: bool) -> None:
    """For any tokens, also such as no text has."""
    expected = BYTE_LEVEL.decode(tokens, skip_special_tokens=skip)
    assert text_of(tokens, chunk=chunk, skip_special_tokens=skip) == expected


@PROPERTY
@given(prompt=st.lists(odd_token, max_size=9), tokens=st.lists(odd_token, max_size=9))
def test_output_is_what_it_adds_to_the_prompt(prompt: list[int], tokens: list[int]) -> None:
    tokens = [*tokens, *PROMPT]  # no character is left incomplete
    before, both = BYTE_LEVEL.decode(prompt), BYTE_LEVEL.decode([*prompt, *tokens])
    while not both.startswith(before):  # its end was incomplete, and is now a character
        before = before[:-1]
    assert text_of(tokens, prompt=prompt) == both.removeprefix(before)


words = st.sampled_from([[token] for token in range(3 + 256, 3 + 256 + 9)])


@PROPERTY
@given(
    parts=st.lists(words | st.characters().map(byte_tokens), max_size=20), chunk=st.integers(1, 5)
)
def test_streamed_text_is_the_decoded_text_with_byte_fallback(
    parts: list[list[int]], chunk: int
) -> None:
    """For whole characters: this decoder drops a run of bytes altogether where one is wrong."""
    tokens = [token for part in parts for token in part]
    prompt = [BYTE_FALLBACK.fast.token_to_id("▁the")]
    expected = BYTE_FALLBACK.decode([*prompt, *tokens]).removeprefix("the")
    assert text_of(tokens, tokenizer=BYTE_FALLBACK, prompt=prompt, chunk=chunk) == expected


@PROPERTY
@given(tokens=st.lists(odd_token, max_size=12))
@example(tokens=byte_tokens(b"\xe6\xe6"))  # after "x", the library's own stream fails on it
def test_text_goes_on_after_broken_characters_with_byte_fallback(tokens: list[int]) -> None:
    after = [BYTE_FALLBACK.fast.token_to_id(word) for word in ("▁cat", "th", "e")]
    assert text_of([*tokens, *after], tokenizer=BYTE_FALLBACK).endswith("catthe")


def test_spaces_are_kept_after_broken_characters_with_byte_fallback() -> None:
    cat = BYTE_FALLBACK.fast.token_to_id("▁cat")
    assert text_of([*byte_tokens(b"\xe2"), cat, cat], tokenizer=BYTE_FALLBACK) == "� cat cat"


@PROPERTY
@given(text=st.text(max_size=12))
def test_whole_characters_are_never_held_back(text: str) -> None:
    text = text.replace("�", "")
    pieces, _ = stream(byte_tokens(text))
    assert [piece for piece in pieces if piece] == list(text)


# --- Stop strings -----------------------------------------------------------------------------


def test_text_ends_before_the_stop_string() -> None:
    pieces, detokenizer = stream(byte_tokens("one. Two. Three"), stop=["Tw"])
    assert "".join(pieces) == "one. "
    assert detokenizer.stop_string == "Tw"
    assert detokenizer.num_tokens == 7


def test_no_part_of_a_stop_string_leaks() -> None:
    """What may become one is held back until it is certain that it does not."""
    pieces, _ = stream(byte_tokens("a<en a<end>"), stop=["<end>"])
    assert pieces == ["a", "", "", "", "<en ", "a", "", "", "", "", ""]


def test_what_was_held_back_comes_at_the_end() -> None:
    assert stream(byte_tokens("a<en"), stop=["<end>"])[0] == ["a", "", "", "<en"]


def test_a_stop_string_within_one_token() -> None:
    (the,) = BYTE_LEVEL.encode(" the")
    pieces, detokenizer = stream([*byte_tokens("a"), the], stop=["h"])
    assert (pieces, detokenizer.stop_string) == (["a", " t"], "h")


def test_the_earliest_of_several_stop_strings_counts() -> None:
    (the,) = BYTE_LEVEL.encode(" the")
    pieces, detokenizer = stream([the], stop=["e", "he", "x"])
    assert (pieces, detokenizer.stop_string) == ([" t"], "he")


def test_a_stop_string_of_characters_of_several_tokens() -> None:
    pieces, _ = stream(byte_tokens("a€日"), stop=["€日"])
    assert "".join(pieces) == "a"


def test_a_stop_string_completed_by_the_flush_at_the_end() -> None:
    pieces, detokenizer = stream(byte_tokens(b"a\xe2"), stop=["a�"])
    assert ("".join(pieces), detokenizer.stop_string) == ("", "a�")


def test_tokens_after_the_stop_string_in_one_push_are_not_counted() -> None:
    pieces, detokenizer = stream(byte_tokens("abcdef"), stop=["c"], chunk=6)
    assert (pieces, detokenizer.num_tokens) == (["ab"], 3)


def test_stop_strings_do_not_count_before_min_tokens() -> None:
    pieces, detokenizer = stream(byte_tokens("a.b.c."), stop=["."], min_tokens=3)
    assert ("".join(pieces), detokenizer.num_tokens) == ("a.b", 4)


def test_a_stop_string_that_begins_before_min_tokens_counts_when_it_ends_after() -> None:
    assert text_of(byte_tokens("abcd"), stop=["bcd"], min_tokens=2) == "a"


def test_a_stop_string_before_min_tokens_stays_passed_over() -> None:
    """Here "b" comes too early to count, though it may be the beginning of "bc"."""
    assert text_of(byte_tokens("abxyz"), stop=["bb", "b"], min_tokens=2) == "abxyz"


def certain_text(tokens: Sequence[int]) -> str:
    """What a prefix of the tokens surely says: an incomplete character may yet become one."""
    for end in range(len(tokens), 0, -1):
        text = BYTE_LEVEL.decode(tokens[:end])
        if not text.endswith("�"):
            return text
    return ""


def naive_stop(
    tokens: Sequence[int], stops: Sequence[str], min_tokens: int
) -> tuple[str, str | None, int]:
    """(text, stop string, tokens) by definition: decode everything, cut at the first stop."""
    passed = len(certain_text(tokens[:min_tokens]))
    for count in range(min_tokens + 1, len(tokens) + 1):
        last = count == len(tokens)
        text = BYTE_LEVEL.decode(tokens) if last else certain_text(tokens[:count])
        found = [
            (start, stop)
            for stop in stops
            for start in range(len(text))
            if text.startswith(stop, start) and start + len(stop) > passed
        ]
        if found:
            start, stop = min(found)
            return text[:start], stop, count
    return BYTE_LEVEL.decode(tokens), None, len(tokens)


few_letters = st.lists(st.sampled_from([*byte_tokens("ab€"), *BYTE_LEVEL.encode("the")]))
stop_strings = st.lists(st.text("ab€he", min_size=1, max_size=4), max_size=3)


@PROPERTY
@given(tokens=few_letters, stops=stop_strings, chunk=st.integers(1, 4))
def test_stop_strings_against_the_definition(
    tokens: list[int], stops: list[str], chunk: int
) -> None:
    pieces, detokenizer = stream(tokens, stop=stops, chunk=chunk)
    assert ("".join(pieces), detokenizer.stop_string, detokenizer.num_tokens) == naive_stop(
        tokens, stops, 0
    )


@PROPERTY
@given(tokens=few_letters, stop=st.text("ab€he", min_size=1, max_size=4), n=st.integers(0, 12))
def test_min_tokens_against_the_definition(tokens: list[int], stop: str, n: int) -> None:
    pieces, detokenizer = stream(tokens, stop=[stop], min_tokens=n)
    assert ("".join(pieces), detokenizer.stop_string, detokenizer.num_tokens) == naive_stop(
        tokens, [stop], n
    )
