"""What asks for nothing: null for a default, and what is said of things that we lack."""

from typing import Annotated, Any

from pydantic import model_validator
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from engine.strict import StrictModel


class RequestModel(StrictModel):
    """A part of a request. A field that is null has its default."""

    @model_validator(mode="before")
    @classmethod
    def _null_means_default(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = {field.alias or name for name, field in cls.model_fields.items()}
        return {
            name: value for name, value in data.items() if value is not None or name not in known
        }


class NotServed:
    """Marks a field of OpenAI's API for what we lack: it may only ask for nothing.

    That do null, false, 0 and what is empty, and the values that are OpenAI's defaults.

    Args:
        defaults: these; in objects that are sent, nulls do not count.
    """

    def __init__(self, *defaults: Any) -> None:
        self._defaults = defaults
        self._values = (None, False, "", [], *defaults)

    def __get_pydantic_core_schema__(self, *_: Any) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, *_: Any) -> dict[str, Any]:
        return {"enum": list(self._values)}

    def _check(self, value: Any) -> None:
        if isinstance(value, dict):
            value = {name: inner for name, inner in value.items() if inner is not None}
        if value not in self._values:
            ways = " or ".join(["leave it out", *(f"set it to {d!r}" for d in self._defaults)])
            raise PydanticCustomError("not_served", "not supported here; {ways}", {"ways": ways})


Unserved = Annotated[None, NotServed()]
