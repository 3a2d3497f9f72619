"""The fields of a configuration model as a table: name, type, default, meaning."""

import types
from importlib import import_module
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

_SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def table(dotted: str) -> str:
    """
    Args:
        dotted: module and class. With `!`, as in `module.Model!Base`, without the fields of Base,
            a class of the same module or of the model's bases.
    """
    path, _, without = dotted.partition("!")
    module, name = path.rsplit(".", 1)
    model = getattr(import_module(module), name)
    left_out: set[str] = set()
    for base in filter(None, without.split(",")):
        found = next(cls for cls in model.__mro__ if cls.__name__ == base)
        left_out |= {
            field
            for field in found.model_fields
            if model.model_fields[field].description == found.model_fields[field].description
        }
    rows = [
        f"| `{field}` | {_type(info)} | {_default(info)} | {_escaped(info.description or '')} |"
        for field, info in model.model_fields.items()
        if field not in left_out
    ]
    return "\n".join(["| field | type | default | meaning |", "|---|---|---|---|", *rows])


def _type(info: FieldInfo) -> str:
    bounds = [
        f"{sign} {getattr(rule, name):,}"
        for rule in info.metadata
        for name, sign in _SIGNS.items()
        if hasattr(rule, name)
    ]
    return ", ".join([_named(info.annotation), *bounds])


def _named(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_named(part) for part in arguments if part is not types.NoneType)
    if hasattr(annotation, "__metadata__"):
        return _named(arguments[0])
    if origin is list:
        return f"list of {_named(arguments[0])}"
    if origin is dict:
        return f"map of {_named(arguments[0])} to {_named(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation.__name__
    return {"str": "text", "int": "integer", "float": "number", "bool": "true or false"}.get(
        getattr(annotation, "__name__", str(annotation)), str(annotation)
    )


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "must be given"
    value = info.get_default(call_default_factory=True)
    if value is None or value == "" or value == [] or value == {}:
        return "–"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
