"""The base of everything users configure: unknown fields are errors that suggest the right name."""

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

# How a check of several fields begins its sentence: with the one that is at fault.
_FIELD = re.compile(r"([A-Za-z_$][\w$.-]*): (.+)", re.DOTALL)


class StrictModel(BaseModel):
    """A frozen pydantic model without unknown fields or infinities; errors say what is right."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_fields(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        errors: list[InitErrorDetails] = []
        known = {field.alias or name for name, field in cls.model_fields.items()}
        for name in data:
            if name in known:
                continue
            close = get_close_matches(str(name), known, n=1)
            hint = f"did you mean '{close[0]}'?" if close else "it is not supported"
            error = PydanticCustomError("unknown_field", "unknown field, {hint}", {"hint": hint})
            errors.append(InitErrorDetails(type=error, loc=(str(name),), input=data[name]))
        if errors:
            raise ValidationError.from_exception_data(cls.__name__, errors)
        return data


def explain(errors: Iterable[Any], data: Any = None) -> list[tuple[str, str]]:
    """(field, sentence) per fault, for people: "top_p", "Input should be … (got 7)".

    Args:
        errors: what pydantic's `ValidationError.errors()` returns.
        data: what was validated. Then fields are paths in it, without the names that pydantic
            gives to the branches of unions, and of several branches those count that went farthest.
    """
    faults = []
    for detail in errors:
        path = [str(part) for part in detail["loc"]]
        if data is not None:
            path = _path_in(data, detail["loc"], is_missing=detail["type"] == "missing")
        message = detail["msg"].removeprefix("Value error, ")
        if detail["type"] == "value_error" and (named := _FIELD.fullmatch(message)):
            path, message = [*path, named[1]], named[2]
        elif detail["type"] == "json_invalid":
            message = f"{message}: {detail['ctx']['error']}"
        elif detail["type"] != "missing" and not _says_all(detail):
            message += f" (got {_shown(detail['input'])})"
        faults.append((path, message))
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


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except RecursionError:
        return "what is nested too deeply"
    return text if len(text) <= 100 else text[:97] + "..."
