"""Parquet files: a prompt per row in; the same rows and what became of them out."""

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from deployments.api.errors import ApiError
from deployments.batch.rows import Answer, Row
from deployments.batch.storage import Location
from engine.sampling_params import SamplingParams

_ERROR = pa.struct({name: pa.string() for name in ("message", "type", "param", "code")})
# Columns that the output has beside the input's.
_ADDED = {
    "text": pa.string(),
    "finish_reason": pa.string(),
    "prompt_tokens": pa.int64(),
    "completion_tokens": pa.int64(),
    "error": _ERROR,
}


class ParquetFormat:
    """Slices of a file begin at a row. Prompts are texts or lists of token ids."""

    suffix = ".parquet"

    def __init__(self) -> None:
        # Row groups are often larger than slices, so the last one read serves several.
        self._last_group: tuple[tuple[str, int], pa.Table] | None = None

    def check(self, sampling: SamplingParams) -> None:
        """Raises ValueError for what the output has no column for."""
        for name in ("n", "logprobs", "prompt_logprobs"):
            value = getattr(sampling, name)
            if value != SamplingParams.model_fields[name].default:
                raise ValueError(
                    f"{name}: {value} asks for what Parquet output has no column for; leave it "
                    "out, or give the prompts as .jsonl"
                )

    def split(self, source: Location, rows_per_part: int) -> Iterator[tuple[int, int]]:
        """(start, number of rows) of consecutive slices."""
        with parquet.ParquetFile(source.path, filesystem=source.filesystem) as file:
            columns = set(file.schema_arrow.names)
            num_rows = file.metadata.num_rows
        if "prompt" not in columns:
            raise ValueError(f"input: {source.path} has no column 'prompt'; rename one to that")
        taken = sorted(columns & set(_ADDED))
        if taken:
            raise ValueError(
                f"input: {source.path} has columns {taken}, which the output adds; rename them"
            )
        for start in range(0, num_rows, rows_per_part):
            yield start, min(rows_per_part, num_rows - start)

    def read(self, source: Location, start: int, num_rows: int) -> pa.Table:
        slices = []
        with parquet.ParquetFile(source.path, filesystem=source.filesystem) as file:
            group_start = 0
            for i in range(file.num_row_groups):
                group_end = group_start + file.metadata.row_group(i).num_rows
                first, last = max(start, group_start), min(start + num_rows, group_end)
                if first < last:
                    group = self._read_group(file, source.path, i)
                    slices.append(group.slice(first - group_start, last - first))
                group_start = group_end
        return pa.concat_tables(slices)

    def _read_group(self, file: parquet.ParquetFile, path: str, index: int) -> pa.Table:
        last = self._last_group
        if last is None or last[0] != (path, index):
            last = self._last_group = ((path, index), file.read_row_group(index))
        return last[1]

    def parse(self, table: pa.Table) -> list[Row]:
        return [_parse(prompt) for prompt in table["prompt"].to_pylist()]

    def encode(self, table: pa.Table, rows: Sequence[Row], answers: Sequence[Answer]) -> bytes:
        """The content of an output file."""
        results = [_result(answer) for answer in answers]
        for name, kind in _ADDED.items():
            table = table.append_column(name, pa.array([r.get(name) for r in results], kind))
        sink = pa.BufferOutputStream()
        parquet.write_table(table, sink)
        return sink.getvalue().to_pybytes()


def _parse(prompt: Any) -> Row:
    if isinstance(prompt, list) and isinstance(next(iter(prompt), None), (str, list)):
        reason = f"a row has one prompt, a text or a list of token ids (got {prompt!r:.50})"
        return Row(error=ApiError(400, f"prompt: {reason}", "prompt"))
    return Row(body={"prompt": prompt})


def _result(answer: Answer) -> dict[str, Any]:
    if answer.error is not None:
        return {"error": answer.error}
    choice = answer.body["choices"][0]
    return {name: choice[name] for name in ("text", "finish_reason")} | answer.usage
