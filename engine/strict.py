"""The base of everything users configure: unknown fields are errors that suggest the right name.

What an error costs and how long it is does not depend on how much is wrong: only the first few
faults are explained, and of what was sent no more than its beginning is shown.
"""

import re
from collections.abc import Sequence
from difflib import get_close_matches
from itertools import islice
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError

_MAX_FAULTS = 5
_MAX_NAME = 64  # characters of a field's name
_MAX_MESSAGE = 1000
_MAX_SHOWN = 100


def _stop_at_first_bad_item(schema: Any) -> None:
    """For all lists and dicts in it, as pydantic's FailFast does for one."""
    if isinstance(schema, dict):
        if schema.get("type") in ("list", "dict"):
            schema["fail_fast"] = True
        for part in schema.values():
            _stop_at_first_bad_item(part)
    elif isinstance(schema, (list, tuple)):
        for part in schema:
            _stop_at_first_bad_item(part)


# How a check of several fields begins its sentence: with the one that is at fault.
_FIELD = re.compile(r"([A-Za-z_$][\w$.-]*): (.+)", re.DOTALL)


class StrictModel(BaseModel):
    """A frozen pydantic model without unknown fields or infinities; errors say what is right."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: type[BaseModel], handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        schema = handler(source)
        _stop_at_first_bad_item(schema)
        return schema

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_fields(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = {field.alias or name for name, field in cls.model_fields.items()}
        unknown = [name for name in data if name not in known]
        errors: list[InitErrorDetails] = []
        for name in unknown[:_MAX_FAULTS]:
            close = get_close_matches(str(name)[:_MAX_NAME], known, n=1)
            hint = f"did you mean '{close[0]}'?" if close else "it is not supported"
            error = PydanticCustomError("unknown_field", "unknown field, {hint}", {"hint": hint})
            errors.append(InitErrorDetails(type=error, loc=(str(name),), input=data[name]))
        if errors:
            raise ValidationError.from_exception_data(cls.__name__, errors)
        return data


def explain(errors: Sequence[Any], data: Any = None) -> list[tuple[str, str]]:
    """(field, sentence) of the first few faults, for people: "top_p", "Input should be … (got 7)".

    Args:
        errors: what pydantic's `ValidationError.errors()` returns.
        data: what was validated. Then fields are paths in it, without the names that pydantic
            gives to the branches of unions, and of several branches those count that went farthest.
    """
    faults = []
    for detail in errors[:_MAX_FAULTS]:
        path = [str(part) for part in detail["loc"]]
        if data is not None:
            path = _path_in(data, detail["loc"], is_missing=detail["type"] == "missing")
        message = cut(detail["msg"].removeprefix("Value error, "), _MAX_MESSAGE)
        if detail["type"] == "value_error" and (named := _FIELD.fullmatch(message)):
            path, message = [*path, named[1]], named[2]
        elif detail["type"] == "json_invalid":
            message = f"{message}: {detail['ctx']['error']}"
        elif detail["type"] != "missing" and not _says_all(detail):
            message += f" (got {shown(detail['input'])})"
        faults.append(([cut(part, _MAX_NAME) for part in path], message))
    if data is not None:
        passed = {tuple(path[:i]) for path, _ in faults for i in range(len(path))}
        faults = [fault for fault in faults if tuple(fault[0]) not in passed]
    return list(dict.fromkeys((".".join(path), message) for path, message in faults))


def _path_in(data: Any, loc: Sequence[Any], is_missing: bool) -> list[str]:
    path = []
    for i, part in enumerate(loc):
        is_there = (isinstance(data, dict) and part in data) or (
            isinstance(data, list) and isinstance(part, int) and part < len(data)
        )
        if is_there:
            data = data[part]
        if is_there or (is_missing and i == len(loc) - 1):
            path.append(str(part))
    return path


def _says_all(detail: Any) -> bool:
    """Whether a check of ours, which says what is wrong, saw more than one value."""
    return detail["type"] == "value_error" and not isinstance(detail["input"], str | int | list)


def cut(text: str, length: int) -> str:
    """The text, or as much of its beginning as fits."""
    return text if len(text) <= length else text[: length - 3] + "..."


def shown(value: Any) -> str:
    """A value as an error shows it: its beginning."""
    return cut(_beginning(value), _MAX_SHOWN)


def _beginning(value: Any, depth: int = 2) -> str:
    if isinstance(value, str):
        return repr(value[:_MAX_SHOWN])
    if isinstance(value, (dict, list)) and depth == 0:
        return "..."
    if isinstance(value, dict):
        entries = islice(value.items(), _MAX_SHOWN // 6 + 1)
        pairs = (f"{_beginning(k, 0)}: {_beginning(v, depth - 1)}" for k, v in entries)
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, list):
        items = islice(value, _MAX_SHOWN // 3 + 1)
        return f"[{', '.join(_beginning(item, depth - 1) for item in items)}]"
    return repr(value) if isinstance(value, (int, float, type(None))) else type(value).__name__
