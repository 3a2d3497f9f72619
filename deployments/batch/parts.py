"""Parts: slices of the input, each of which becomes one file of the output."""

from collections.abc import Iterator
from dataclasses import dataclass

from deployments.batch.job_args import BatchArgs
from deployments.batch.jsonl import JsonlFormat
from deployments.batch.parquet import ParquetFormat
from deployments.batch.storage import Location

Format = JsonlFormat | ParquetFormat


@dataclass(frozen=True)
class Part:
    """Consecutive rows of one input file."""

    name: str  # of the output file
    path: str
    start: int  # where the slice begins, in the format's own measure
    first_row: int  # counted over the whole input
    num_rows: int


def find_format(paths: list[str]) -> Format:
    """By the files' names; raises ValueError unless all are of one kind."""
    if not paths:
        raise ValueError("input: there is no such file, or no file in the directory")
    for kind in (JsonlFormat, ParquetFormat):
        if all(path.endswith(kind.suffix) for path in paths):
            return kind()
    strange = next((p for p in paths if not p.endswith((".jsonl", ".parquet"))), None)
    raise ValueError(
        f"input: {strange} is neither .jsonl nor .parquet; decompress or rename it"
        if strange
        else "input: there are both .jsonl and .parquet files; run one job for each kind"
    )


def split(args: BatchArgs, source: Location, paths: list[str]) -> Iterator[Part]:
    """All parts of the input, the same in every run with the same input.

    Raises ValueError for an input, or wishes, that its format is not made for.
    """
    format = find_format(paths)
    format.check(args.sampling)
    index, first_row = 0, 0
    for path in paths:
        for start, num_rows in format.split(Location(source.filesystem, path), args.rows_per_part):
            name = f"part-{index:06d}{format.suffix}"
            yield Part(name, path, start, first_row, num_rows)
            index, first_row = index + 1, first_row + num_rows
