"""What `device: auto` means on a cluster: GPUs if it has any."""

from pathlib import Path
from typing import TypeVar

import ray

from deployments.args import DeploymentArgs

Args = TypeVar("Args", bound=DeploymentArgs)


def with_device(args: Args) -> Args:
    """The arguments with a device that is settled, as the placement of shards depends on it."""
    if args.device != "auto":
        return args
    return args.model_copy(update={"device": "cuda" if _has_gpus() else "cpu"})


def _has_gpus() -> bool:
    """Whether the cluster has GPUs, or, before `serve run` starts a local one, this machine."""
    if ray.is_initialized():
        return ray.cluster_resources().get("GPU", 0) > 0
    try:
        ray.init(address="auto", log_to_driver=False)
    except ConnectionError:
        return any(Path("/dev").glob("nvidia[0-9]*"))
    try:
        return ray.cluster_resources().get("GPU", 0) > 0
    finally:
        ray.shutdown()  # `serve run` connects with its own runtime environment
