"""The base of everything users configure: unknown fields are errors that suggest the right name."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError


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


def explain(errors: Iterable[Any]) -> list[tuple[str, str]]:
    """(field, sentence) per fault, for people: "top_p", "Input should be … (got 7)".

    Args:
        errors: what pydantic's `ValidationError.errors()` returns.
    """
    faults = []
    for detail in errors:
        field = ".".join(str(part) for part in detail["loc"])
        message = detail["msg"].removeprefix("Value error, ")
        if detail["type"] not in ("missing", "json_invalid"):
            message += f" (got {_shown(detail['input'])})"
        faults.append((field, message))
    return faults


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except RecursionError:
        return "what is nested too deeply"
    return text if len(text) <= 100 else text[:97] + "..."
