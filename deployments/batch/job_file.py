"""What the output belongs to: written once, checked whenever the job is run again."""

import json
from typing import Any

from deployments.batch.job_args import BatchArgs
from deployments.batch.storage import Location

# Readers of data sets skip names that begin with an underscore.
JOB_FILE = "_job.json"

# Arguments that change neither which rows a part has nor, rounding aside, their answers. They may
# differ from run to run; all others must not.
_FREE = {
    "output",  # the same place may have several names
    "num_replicas",
    "device",
    "profile_directory",
    "enable_sleep_mode",
    "keep_weights_s",
    "num_threads",
    "max_num_seqs",
    "max_num_batched_tokens",
    "tensor_parallel_size",
    "block_size",
    "num_blocks",
    "kv_cache_memory_bytes",
    "host_cache_memory_bytes",
    "gpu_memory_utilization",
    "enable_prefix_caching",
    "async_scheduling",
    "speculation",
    "draft_model",
    "num_speculative_tokens",
    "enforce_eager",
    "cuda_graph_sizes",
    "cuda_graph_max_tokens",
    "num_cpus_per_shard",
    "heartbeat_timeout_s",
    "max_restarts",
    "startup_timeout_s",
    "scheduling_policy",
}


def claim_output(args: BatchArgs, files: list[tuple[str, int]], output: Location) -> None:
    """Note in the output what it belongs to; ValueError if it belongs to something else.

    Args:
        files: (path, size) of the input's files.
    """
    job = args.model_dump(mode="json", exclude=_FREE, exclude_unset=True)
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
