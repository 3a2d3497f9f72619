"""Structured output as OpenAI spells it, and as older vLLM servers did."""

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from engine.strict import StrictModel, explain
from engine.structured_outputs import StructuredOutputs
from engine.text.request_model import RequestModel


class TextFormat(RequestModel):
    type: Literal["text"]

    def form(self) -> StructuredOutputs | None:
        return None


class JsonObjectFormat(RequestModel):
    type: Literal["json_object"]

    def form(self) -> StructuredOutputs | None:
        return StructuredOutputs(json_object=True)


class NamedSchema(RequestModel):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    json_schema: dict[str, Any] = Field(
        default_factory=lambda: {"type": "object"}, alias="schema", description="Default: any."
    )
    strict: bool | None = Field(None, description="Taken, but every schema is followed strictly.")


class JsonSchemaFormat(RequestModel):
    type: Literal["json_schema"]
    json_schema: NamedSchema

    def form(self) -> StructuredOutputs | None:
        return StructuredOutputs(json=self.json_schema.json_schema)


class StructuralTagFormat(RequestModel):
    type: Literal["structural_tag"]
    format: dict[str, Any]

    def form(self) -> StructuredOutputs | None:
        return StructuredOutputs(structural_tag=self.model_dump())


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat | StructuralTagFormat,
    Field(discriminator="type"),
]


class FormFields(StrictModel):
    """Fields of a request, all of which are other names of `structured_outputs`."""

    response_format: ResponseFormat | None = Field(
        None, description="The text is JSON, of a schema or any; as in the OpenAI API."
    )
    guided_json: dict[str, Any] | str | None = Field(None, description="structured_outputs.json")
    guided_regex: str | None = Field(None, description="structured_outputs.regex")
    guided_choice: list[str] | None = Field(None, description="structured_outputs.choice")
    guided_grammar: str | None = Field(None, description="structured_outputs.grammar")

    @model_validator(mode="after")
    def _one_form(self) -> "FormFields":
        form = self.form()
        if form is not None and getattr(self, "structured_outputs", None) is not None:
            raise ValueError(f"structured_outputs: not beside {self._given()[0]}, say it once")
        return self

    def form(self) -> StructuredOutputs | None:
        """What these fields ask for. Raises ValueError naming the field at fault."""
        given = self._given()
        if len(given) > 1:
            raise ValueError(f"{given[1]}: not beside {given[0]}, say it once")
        if not given:
            return None
        try:
            if self.response_format is not None:
                return self.response_format.form()
            kind = given[0].removeprefix("guided_")
            return StructuredOutputs(**{kind: getattr(self, given[0])})
        except ValidationError as error:
            field, fault = explain(error.errors())[0]
            path = field.partition(".")[2]  # within the form
            raise ValueError(f"{given[0]}: {path}{': ' if path else ''}{fault}") from error

    def _given(self) -> list[str]:
        names = [name for name in FormFields.model_fields if getattr(self, name) is not None]
        is_text = isinstance(self.response_format, TextFormat)
        return [name for name in names if not (is_text and name == "response_format")]
