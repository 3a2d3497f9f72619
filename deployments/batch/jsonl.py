"""OpenAI Batch files: a request per line in, an answer per line out."""

import io
import json
import secrets
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Literal

from pyarrow import NativeFile
from pydantic import Field, ValidationError

from deployments.api.bodies import check_cost
from deployments.api.errors import ApiError, validation_error
from deployments.api.requests.body_reader import TOO_LARGE
from deployments.batch.rows import Answer, Row
from deployments.batch.storage import Location
from engine.sampling_params import SamplingParams
from engine.strict import StrictModel, explain


class BatchLine(StrictModel):
    """https://platform.openai.com/docs/api-reference/batch/request-input"""

    custom_id: str
    method: Literal["POST"]
    url: Literal["/v1/chat/completions", "/v1/completions"]
    body: dict[str, Any] = Field(description="The request, as one would send it to the server.")


class JsonlFormat:
    """Slices of a file begin at a byte; empty lines are no rows."""

    suffix = ".jsonl"

    def __init__(self, max_line_bytes: int | None = None) -> None:
        """
        Args:
            max_line_bytes: a line costs no more than a body of so many bytes, or is not read.
        """
        self._max_line_bytes = max_line_bytes

    def check(self, sampling: SamplingParams) -> None:
        """All that can be asked for has its place in an answer."""

    def split(self, source: Location, rows_per_part: int) -> Iterator[tuple[int, int]]:
        """(start, number of rows) of consecutive slices. Reads the file once, to count its rows."""
        with source.filesystem.open_input_stream(source.path, compression=None) as file:
            start, position, num_rows = 0, 0, 0
            for line in io.BufferedReader(file, 1 << 20):
                position += len(line)
                num_rows += not line.isspace()
                if num_rows == rows_per_part:
                    yield start, num_rows
                    start, num_rows = position, 0
            if num_rows:
                yield start, num_rows

    def duplicates(self, source: Location) -> Iterator[tuple[int, str]]:
        """(number, custom_id) of each line whose custom_id another has had before it."""
        seen: set[str] = set()
        with source.filesystem.open_input_stream(source.path, compression=None) as file:
            for number, line in enumerate(io.BufferedReader(file, 1 << 20), start=1):
                if (custom_id := self._parse(line).custom_id) in seen:
                    yield number, str(custom_id)
                elif custom_id is not None:
                    seen.add(custom_id)

    def read(self, source: Location, start: int, num_rows: int) -> list[bytes]:
        with source.filesystem.open_input_file(source.path) as file:
            file.seek(start)
            return list(islice(_lines(file), num_rows))

    def parse(self, lines: Sequence[bytes]) -> list[Row]:
        return [self._parse(line) for line in lines]

    def _parse(self, line: bytes) -> Row:
        most = self._max_line_bytes
        if most is not None and len(line) > most:
            message = f"the line is larger than {most} bytes (max_request_bytes)"
            return Row(error=ApiError(413, message, code=TOO_LARGE))
        try:
            if most is not None:
                check_cost(line, most)
            return _parse(line)
        except ApiError as error:
            return Row(error=error)

    def encode(
        self, lines: Sequence[bytes], rows: Sequence[Row], answers: Sequence[Answer]
    ) -> bytes:
        """The content of an output file."""
        encoded = (_encode(row, answer) for row, answer in zip(rows, answers, strict=True))
        # A lone surrogate, which UTF-8 does not have, becomes the JSON escape that it came from.
        return "".join(f"{line}\n" for line in encoded).encode(errors="backslashreplace")


def _lines(file: NativeFile) -> Iterator[bytes]:
    return (line for line in io.BufferedReader(file) if not line.isspace())


def _parse(text: bytes) -> Row:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Row(error=ApiError(400, f"the line is not valid JSON: {error}"))
    if not isinstance(content, dict):
        return Row(error=ApiError(400, "the line is not a JSON object"))
    try:
        line = BatchLine.model_validate(content)
    except ValidationError as error:
        custom_id = content.get("custom_id")
        return Row(
            custom_id=custom_id if isinstance(custom_id, str) else None,
            error=validation_error(explain(error.errors(), content)),
        )
    return Row(line.url, line.body, line.custom_id)


def _encode(row: Row, answer: Answer) -> str:
    """https://platform.openai.com/docs/api-reference/batch/request-output"""
    line = {
        "id": f"batch_req_{secrets.token_hex(12)}",
        "custom_id": row.custom_id,
        "response": {
            "status_code": answer.status,
            "request_id": f"req_{secrets.token_hex(12)}",
            "body": answer.body,
        },
        "error": None,
    }
    if row.error is not None:  # a line that is no request has no response
        line |= {"response": None, "error": answer.error}
    return json.dumps(line, ensure_ascii=False)
