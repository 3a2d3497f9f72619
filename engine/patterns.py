"""Regular expressions as the grammar compiler takes them, for outputs and for strings in JSON.

The automata that xgrammar 0.2.8 makes of them let through more than some say: of `(ab+)?` also `b`,
of `a|a{0,2}` any number, of `.{0,200}` quotes in JSON. They do not where a group has one end, out
of which nothing leads, and where the characters are those meant. So both are spelled out.
"""

import re
from collections.abc import Iterator
from functools import lru_cache

_Ranges = list[tuple[int, int]]  # of code points, both ends among them

_LAST = 0x10FFFF
# What stands for itself in a JSON string: as a class, not of ASCII alone, so that xgrammar takes a
# grammar, and as ranges.
CHARACTER = "[ !#-\\[\\]-\ud7ff\ue000-\U0010ffff]"
_PLAIN: _Ranges = [(0x20, 0x21), (0x23, 0x5B), (0x5D, 0xD7FF), (0xE000, _LAST)]
_ANY: _Ranges = [(0, 0xD7FF), (0xE000, _LAST)]
_NEWLINES: _Ranges = [(0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029)]
_DIGITS: _Ranges = [(0x30, 0x39)]
_CLASSES: dict[str, _Ranges] = {
    "d": _DIGITS,
    "w": [*_DIGITS, (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)],
    "s": [(0x09, 0x0D), (0x20, 0x20), (0xA0, 0xA0)],
}
_CONTROLS = {"0": 0, "t": 9, "n": 10, "v": 11, "f": 12, "r": 13}

_DATE = (
    r"([0-9]{4}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)"
    r"|02-(0[1-9]|1[0-9]|2[0-8]))"
    r"|([0-9]{2}(0[48]|[2468][048]|[13579][26])|([02468][048]|[13579][26])00)-02-29)"
)
_TIME = r"([01][0-9]|2[0-3])(:[0-5][0-9]){2}(\.[0-9]+)?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_BYTE = r"(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
# Where xgrammar's own formats allow more: quotes in addresses, the 31st of February, 01.02.03.04.
OF_FORMATS = {
    "email": r"^[A-Za-z0-9_%+-]+(\.[A-Za-z0-9_%+-]+)*@[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)+$",
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}T{_TIME}$",
    "ipv4": rf"^{_BYTE}(\.{_BYTE}){{3}}$",
}
# URLs whose length is limited: up to the path, and what that is made of, at most 3 characters each.
_ORIGIN = r"[a-z][a-z0-9+.-]{1,15}://[A-Za-z0-9.-]{1,63}(:[0-9]{1,5})?"
LONGEST_ORIGIN = 16 + 3 + 63 + 6 + 1  # with the slash
_OF_PATH = r"([A-Za-z0-9._~!$&'()*+,;=:@/?-]|%[0-9A-F]{2})"
_MAX_COUNT = 128
_LOOKAROUND = re.compile(r"(?<!\\)(\\\\)*\(\?<?[=!]")
_ESCAPE = r"\\(?:u\{[0-9a-fA-F]{1,6}\}|u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|c[A-Za-z]|.)"
_QUANTIFIER = r"(?:[*+?]|\{[0-9]+(?:,[0-9]*)?\})\??"
_TOKENS = re.compile(
    rf"{_ESCAPE}|\[(?:\\.|[^\]\\])*\]|\((?:\?(?::|P?<\w+>))?|{_QUANTIFIER}|.", re.DOTALL
)
_IN_CLASS = re.compile(rf"{_ESCAPE}|.", re.DOTALL)


def check_regex(regex: str, path: str) -> None:
    if _LOOKAROUND.search(regex):
        raise ValueError(f"{path}: lookahead and lookbehind are not supported")


def of_length(least: int, most: int | None) -> str:
    return f"^{CHARACTER}{{{least},{'' if most is None else most}}}$"


def url_of_at_most(length: int) -> str:
    return f"^{_ORIGIN}(/{_OF_PATH}{{0,{(length - LONGEST_ORIGIN) // 3}}})?$"


def of_string(regex: str, path: str) -> str:
    """The same of a whole string in JSON, as far as it is said without escapes.

    Raises ValueError for what cannot be said so.
    """
    check_regex(regex, path)
    try:
        return _respelled(regex, in_json=True)
    except ValueError as error:
        raise ValueError(f"{path}: {error} (got {regex!r:.100})") from error


def of_output(regex: str) -> str | None:
    """The same for xgrammar's automata; None where its grammars are faster, or are to say why not.

    Automata count to large numbers slowly: a step took 100 ms, of others 0.01.
    """
    counts = (int(most) for most in re.findall(r"\{(?:[0-9]+,)?([0-9]+),?\}", regex))
    try:
        return _respelled(regex, in_json=False) if max(counts, default=0) <= _MAX_COUNT else None
    except ValueError:
        return None


def _respelled(regex: str, in_json: bool) -> str:
    ignores_case = regex.startswith("(?i)")
    tokens = _TOKENS.findall(regex.removeprefix("(?i)"))
    return f"^(({''.join(_spelled(tokens, ignores_case, in_json))})())$"


def _spelled(tokens: list[str], ignores_case: bool, in_json: bool) -> Iterator[str]:
    """Groups end in `()`, which leads nowhere else. `(…){0,1}` is entered by a way of its own, by
    that of `(…)?` loops within may come back."""
    depth = 0
    for before, token, after in zip(["|", *tokens], tokens, [*tokens[1:], "|"], strict=False):
        if token[0] == "(":
            depth += 1
            yield "(("
        elif token == ")":
            depth -= 1
            yield ")())"
        elif re.fullmatch(_QUANTIFIER, token):
            yield "{0,1}" if before == ")" and token[0] == "?" else token
        elif token == "|":
            yield token
        elif token in "^$":  # of a whole string, which says it already
            if depth or (before if token == "^" else after) != "|":
                raise ValueError(f"{token} is supported at the ends alone")
        else:
            yield _atom(token, ignores_case, in_json)


@lru_cache(1024)
def _atom(atom: str, ignores_case: bool, in_json: bool) -> str:
    allowed = _PLAIN if in_json else _ANY
    return _class(_common(_characters(atom, ignores_case), allowed))


def _characters(atom: str, ignores_case: bool) -> _Ranges:
    """Those that an atom of the expression matches."""
    if atom == "[":
        raise ValueError("a class is not closed")
    if atom == ".":
        return _others(_NEWLINES)
    is_class = atom[0] == "["
    is_negated = is_class and atom[1] == "^"
    ranges = _of_class(atom[1 + is_negated : -1]) if is_class else _of_one(atom)
    if ignores_case:
        ranges = [*ranges, *_other_case(ranges)]
    return _others(ranges) if is_negated else ranges


def _of_class(inside: str) -> _Ranges:
    atoms = _IN_CLASS.findall(inside)
    ranges: _Ranges = []
    while atoms:
        own = _of_one(atoms.pop(0))
        if len(atoms) > 1 and atoms[0] == "-":
            last = _of_one(atoms[1])
            if all(len(ends) == 1 and ends[0][0] == ends[0][1] for ends in (own, last)):
                own = [(own[0][0], last[0][0])]
                del atoms[:2]
        ranges += own
    return ranges


def _of_one(text: str) -> _Ranges:
    """What a character stands for, or an escape."""
    if text[0] != "\\" or len(text) == 1:
        return [(ord(text), ord(text))]
    name = text[1]
    if name.lower() in _CLASSES:
        ranges = _CLASSES[name.lower()]
        return ranges if name.islower() else _others(ranges)
    if name in "uxc" and len(text) > 2:
        code = ord(text[2]) % 32 if name == "c" else int(text[2:].strip("{}"), 16)
    elif name in _CONTROLS:
        code = _CONTROLS[name]
    elif name.isalnum():
        raise ValueError(f"{text} is not supported")
    else:
        code = ord(name)
    return [(code, code)]


def _other_case(ranges: _Ranges) -> Iterator[tuple[int, int]]:
    for alphabet, distance in (((0x41, 0x5A), 0x20), ((0x61, 0x7A), -0x20)):
        for first, last in ranges:
            first, last = max(first, alphabet[0]), min(last, alphabet[1])
            if first <= last:
                yield first + distance, last + distance


def _others(ranges: _Ranges) -> _Ranges:
    others, begin = [], 0
    for first, last in sorted(ranges):
        if first > begin:
            others.append((begin, first - 1))
        begin = max(begin, last + 1)
    return [*others, (begin, _LAST)] if begin <= _LAST else others


def _common(ranges: _Ranges, allowed: _Ranges) -> _Ranges:
    if len(ranges) > 1:  # in order, and apart
        ranges = _others(_others(ranges))
    both = ((max(a, c), min(b, d)) for a, b in ranges for c, d in allowed)
    found = [(first, last) for first, last in both if first <= last]
    if not found:
        raise ValueError("needs a character that JSON escapes, such as a quote or a backslash")
    return found


def _class(ranges: _Ranges) -> str:
    """By the number of bytes, for a class of them all lets through what is not UTF-8."""
    parts = []
    for low, high in ((0, 0x7FF), (0x800, 0xFFFF), (0x10000, _LAST)):
        own = [(max(first, low), min(last, high)) for first, last in ranges]
        if own := [(first, last) for first, last in own if first <= last]:
            spelled = ("-".join(map(_code_point, sorted({*ends}))) for ends in own)
            parts.append(f"[{''.join(spelled)}]")
    return parts[0] if len(parts) == 1 else f"(({'|'.join(parts)})())"


def _code_point(code: int) -> str:
    character = chr(code)
    return character if code < 128 and character.isalnum() else f"\\u{{{code:x}}}"
