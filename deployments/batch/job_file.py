"""What the output belongs to: written once, checked whenever the job is run again."""

import json
from typing import Any

from deployments.batch.args import BatchArgs
from deployments.batch.storage import Location

# Readers of data sets skip names that begin with an underscore.
JOB_FILE = "_job.json"

# Arguments that decide which rows a part has and what their answers are. All others, such as the
# number of replicas or the size of the block pool, may differ from run to run.
_DECISIVE = (
    "input",
    "rows_per_part",
    "sampling",
    "model",
    "revision",
    "served_model_name",
    "dtype",
    "load_format",
    "max_model_len",
    "seed",
)


def claim_output(args: BatchArgs, files: list[tuple[str, int]], output: Location) -> None:
    """Note in the output what it belongs to; ValueError if it belongs to something else.

    Args:
        files: (path, size) of the input's files.
    """
    job = args.model_dump(mode="json", include=set(_DECISIVE), exclude_unset=True)
    job["files"] = [list(file) for file in files]
    names = output.names()
    if all(name.startswith("_") for name in names):  # nothing is finished yet
        output.write(JOB_FILE, json.dumps(job, indent=2).encode())
    elif JOB_FILE in names:
        _check_same(json.loads(output.read(JOB_FILE)), job)
    else:
        raise ValueError(f"output: {args.output} holds other files; give an empty directory")


def _check_same(before: dict[str, Any], now: dict[str, Any]) -> None:
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise ValueError(
                f"{name}: the output was begun with {before.get(name)!r}, not {now.get(name)!r}; "
                "finish it with the same arguments and input, or give another output"
            )
