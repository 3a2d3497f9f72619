"""Grammars of answers that may call tools, as xgrammar's structural tags.

Marks that are special tokens of the model's tokenizer have no text in a grammar: there they are
tokens.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from deployments.parsing import FINAL, ToolFormat
from engine.structured_outputs import StructuredOutputs

Form = dict[str, Any]


class CallGrammar:
    """Makes grammars of calls of some functions, in one format."""

    def __init__(
        self,
        tool_format: ToolFormat,
        functions: Sequence[Mapping[str, Any]],
        special_tokens: Mapping[str, int],
    ) -> None:
        """Raises ValueError for a schema that no grammar can be made of.

        Args:
            functions: as in the OpenAI API: {name, parameters}.
            special_tokens: by their texts, those of the format's marks that are some.
        """
        self._format = tool_format
        self._tokens = special_tokens
        self._calls = {f["name"]: tool_format.written(dict(f)) for f in functions}

    def forced(self) -> Form:
        """One call, behind what the format's prefix has begun."""
        return _tag(self._one_of(self._calls, self._format.prefix))

    def among_text(self, is_single: bool, thoughts: Sequence[int] = ()) -> Form:
        """Any text, in which what begins a call goes on as one.

        Args:
            is_single: nothing follows a call.
            thoughts: the special tokens around thoughts, the last of which ends them.
        """
        names: dict[str, list[str]] = {}
        for name in self._calls:
            names.setdefault(self._format.trigger(name), []).append(name)
        are_tokens = names.keys() <= self._tokens.keys()
        rules = [
            [self._tokens[trigger] if are_tokens else trigger, self._one_of(own, trigger)]
            for trigger, own in names.items()
        ]
        kind = "token_dispatch" if are_tokens else "dispatch"
        text = {"type": kind, "rules": rules, "loop": not is_single}
        if not thoughts:
            return _tag(text)
        *opens, close = [{"type": "token", "token": token} for token in thoughts]
        begun = [{"type": "optional", "content": mark} for mark in opens]
        block = {"type": "sequence", "elements": [*begun, {"type": "any_text"}, close]}
        elements = [{"type": "optional", "content": block}, text]
        return _tag({"type": "sequence", "elements": elements})

    def or_form(self, wanted: StructuredOutputs, is_single: bool) -> Form:
        """Calls and nothing else, or an answer of the wanted form, in a channel if it has one."""
        call = self._one_of(self._calls, "")
        more = {"type": "sequence", "elements": [_text("\n"), call]}
        calls = [call] if is_single else [call, {"type": "star", "content": more}]
        begin = self._literal(FINAL) if self._format.has_channels else []
        answer = {"type": "sequence", "elements": [*begin, _form_of(wanted)]}
        return _tag(_either([{"type": "sequence", "elements": calls}, answer]))

    def _one_of(self, names: Iterable[str], begun: str) -> Form:
        """A call of one of these functions, without its beginning."""
        calls = []
        for first, *others in map(self._calls.__getitem__, names):
            assert isinstance(first, str) and first.startswith(begun)
            parts = [first.removeprefix(begun), *others]
            elements = [
                element
                for part in parts
                for element in (self._literal(part) if isinstance(part, str) else [part])
            ]
            calls.append({"type": "sequence", "elements": elements})
        return _either(calls)

    def _literal(self, text: str) -> list[Form]:
        if not self._tokens:
            return [_text(text)] if text else []
        marks = "|".join(map(re.escape, self._tokens))
        return [
            {"type": "token", "token": self._tokens[part]} if part in self._tokens else _text(part)
            for part in re.split(f"({marks})", text)
            if part
        ]


def _tag(form: Form) -> Form:
    return {"structural_tag": {"type": "structural_tag", "format": form}}


def _either(forms: Sequence[Form]) -> Form:
    return forms[0] if len(forms) == 1 else {"type": "or", "elements": list(forms)}


def _text(text: str) -> Form:
    return {"type": "const_string", "value": text}


def _form_of(wanted: StructuredOutputs) -> Form:
    """What is wanted, as a part of a structural tag."""
    if wanted.choice is not None:
        return _either([_text(choice) for choice in wanted.choice])
    if wanted.regex is not None:
        return {"type": "regex", "pattern": wanted.regex}
    if wanted.grammar is not None:
        return {"type": "grammar", "grammar": wanted.grammar}
    if isinstance(wanted.structural_tag, dict):
        return dict(wanted.structural_tag["format"])
    if wanted.json_object:
        return {"type": "json_schema", "json_schema": {"type": "object"}}
    return {"type": "json_schema", "json_schema": wanted.closed_schema()}
