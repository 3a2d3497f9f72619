"""The job's command line, made from the fields of the configuration models."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from deployments.args import DeploymentArgs
from engine.sampling_params import SamplingParams
from engine.strict import explain


class BatchArgs(DeploymentArgs):
    """What a batch job is told."""

    input: str = Field(
        description="A .jsonl or .parquet file, or a directory of them: absolute path or URI."
    )
    output: str = Field(description="A directory for the answers: absolute path or URI.")
    num_replicas: int = Field(1, ge=1, description="Engines that share the work.")
    rows_per_part: int = Field(
        128, ge=1, description="Rows of an output file; what is unfinished is lost by a crash."
    )
    sampling: SamplingParams = Field(
        default_factory=SamplingParams,
        description="For rows that do not say otherwise; what is not set here is the model's.",
    )

    @field_validator("input", "output")
    @classmethod
    def _same_place_in_every_process(cls, value: str) -> str:
        """A submitted job runs in a directory of Ray's, which is deleted after it."""
        if "://" not in value and not Path(value).is_absolute():
            raise ValueError(
                f"should be an absolute path or a URI, such as {Path(value).resolve()}"
            )
        return value

    @model_validator(mode="after")
    def _output_is_not_input(self) -> "BatchArgs":
        if f"{self.output.rstrip('/')}/".startswith(f"{self.input.rstrip('/')}/"):
            raise ValueError(f"output: should not lie in the input's directory {self.input}")
        return self


# Not the rows' seed: it follows from --seed and the row, else all rows would draw alike.
# The job has a seed of its own, and rows that want vectors say so themselves.
_SAMPLING = {
    name: f for name, f in SamplingParams.model_fields.items() if name not in ("seed", "pooling")
}
_ENGINE = DeploymentArgs.model_fields
_JOB = {
    name: field
    for name, field in BatchArgs.model_fields.items()
    if name not in _ENGINE and name != "sampling"
}


def parse_args(argv: Sequence[str] | None = None) -> BatchArgs:
    """Exits with a usage message when the command line is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m deployments.batch",
        description="Answers the requests in files: OpenAI Batch JSONL, or Parquet with a column "
        "'prompt'. Run again with the same arguments, it goes on where it was stopped.",
        usage="%(prog)s --model MODEL --input INPUT --output OUTPUT [option …]",
        allow_abbrev=False,
    )
    for title, fields in (
        ("job", _JOB),
        ("engine", _ENGINE),
        ("sampling, for rows that do not say otherwise", _SAMPLING),
    ):
        _add_options(parser.add_argument_group(title), fields)
    given = {name: _parse_value(text) for name, text in vars(parser.parse_args(argv)).items()}
    sampling = {name: given.pop(name) for name in _SAMPLING if name in given}
    try:
        return BatchArgs(**given, sampling=SamplingParams(**sampling))
    except ValidationError as error:
        faults = (
            f"--{field.replace('_', '-')}: {fault}" for field, fault in explain(error.errors())
        )
        parser.error("\n  ".join(faults))


def _add_options(group: "argparse._ArgumentGroup", fields: dict[str, FieldInfo]) -> None:
    for name, field in fields.items():
        description = field.description or ""
        if not field.is_required() and field.default is not None:
            description += f" Default: {field.get_default(call_default_factory=True)}."
        group.add_argument(
            f"--{name.replace('_', '-')}",
            default=argparse.SUPPRESS,
            metavar="VALUE",
            help=description.replace("%", "%%"),
        )


def _parse_value(text: str) -> Any:
    """Lists and objects are written as JSON; pydantic turns all else into the field's type."""
    if not text.startswith(("[", "{")):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text
