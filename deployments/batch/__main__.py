"""The job's driver: cuts the input into parts, gives Ray Data what is left, shows progress."""

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import RayError

from deployments.batch.engine_actor import AnswerParts, PartReport
from deployments.batch.job_args import BatchArgs, parse_args
from deployments.batch.job_file import claim_output
from deployments.batch.job_progress import Progress
from deployments.batch.parts import Part, split
from deployments.batch.storage import Location
from deployments.devices import with_device

# Seconds between progress lines.
_PROGRESS_S = 5.0


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        parts, remaining = plan(args)
    except ValueError as error:
        sys.exit(f"error: {error}")
    total, left = (sum(part.num_rows for part in some) for some in (parts, remaining))
    _say(
        f"{total:,} rows in {len(parts):,} parts, of which {len(parts) - len(remaining):,} are done"
    )
    if not remaining:
        return
    progress = Progress(total, total - left)
    try:
        _answer_all(args, remaining, progress)
    except RayError as error:  # its last line is the cause in its own words
        sys.exit(f"error: {str(error).splitlines()[-1]}; what is done stays, run again to go on")
    _say(progress.summary())


def _answer_all(args: BatchArgs, parts: list[Part], progress: Progress) -> None:
    shown = time.monotonic()
    for report in answer(args, parts):
        progress.add(report)
        if time.monotonic() - shown > _PROGRESS_S:
            _say(progress.line())
            shown = time.monotonic()


def plan(args: BatchArgs) -> tuple[list[Part], list[Part]]:
    """(all parts, those that are not done). Raises ValueError if input or output will not do.

    Why not Ray Data's checkpointing: it needs a column of unique ids, which neither broken JSON
    lines nor tables of prompts have. A part's file exists if and only if its rows are answered.
    """
    source, output = Location.of(args.input), Location.of(args.output)
    files = list(source.files())
    parts = list(split(args, source, [path for path, _ in files]))
    claim_output(args, files, output)
    output.remove_unfinished()
    done = output.names()
    return parts, [part for part in parts if part.name not in done]


def answer(args: BatchArgs, parts: list[Part]) -> Iterator[PartReport]:
    """Have all parts answered by a pool of replicas; reports come as parts are finished.

    One Ray Data block carries the description of one part, not its rows: a task then begins and
    ends with its part, whatever Ray Data does to the sizes of blocks.
    """
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.issue_detectors_config.detectors = []  # they advise on memory that is code
    ray.init(ignore_reinit_error=True)
    args = with_device(args)
    parts_at_once = _parts_at_once(args)
    reports = ray.data.from_items(
        [asdict(part) for part in parts], override_num_blocks=len(parts)
    ).map(
        AnswerParts,  # type: ignore[arg-type]  # a class that Ray Data makes an instance of
        fn_constructor_kwargs={"args": args},
        compute=ActorPoolStrategy(
            size=min(args.num_replicas, len(parts)),
            max_tasks_in_flight_per_actor=parts_at_once,
            max_concurrent_calls_per_actor=parts_at_once,
        ),
        num_cpus=0.1,
    )
    for report in reports.iter_rows():
        yield PartReport(**report)


def _parts_at_once(args: BatchArgs) -> int:
    """Enough that the engine's rows stay full while the last rows of the oldest parts finish."""
    rows = args.on_device(args.device, sys.maxsize).step_size.rows  # at most, on a GPU
    return 2 + -(-4 * rows // args.rows_per_part)


def _say(line: str) -> None:
    print(f"batch: {line}", flush=True)


if __name__ == "__main__":
    main()
