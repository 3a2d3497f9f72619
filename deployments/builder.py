"""`deployments:app`, the builder that `serve run` and `serve deploy` call."""

from pathlib import Path
from typing import Any

import ray
from ray.serve import Application

from deployments import ray_private
from deployments.args import AppArgs
from deployments.autoscaling import autoscaling_config
from deployments.ingress_router import IngressRouter
from deployments.replica import Replica
from deployments.request_router import router_config
from deployments.shard import shard_bundle

# The replica waits for the network most of the time; the shards do the work.
_REPLICA_CPUS = 0.1


def app(args: AppArgs) -> Application:
    """One model behind an OpenAI-compatible API.

    `serve run deployments:app model=Qwen/Qwen3-0.6B max_model_len=4096`, or the same names under
    `args:` in a Serve config file. Without `model`, the bundled demo model.
    """
    if args.device == "auto":
        args = args.model_copy(update={"device": "cuda" if _has_gpus() else "cpu"})
    scaling: dict[str, Any] = {"num_replicas": args.num_replicas}
    if args.max_replicas is not None:
        scaling = {"autoscaling_config": autoscaling_config(args)}
    # HAProxy without an ingress router balances by itself, and Serve then refuses a request router.
    by_body = ray_private.can_route_by_body()
    uses_request_router = by_body or not ray_private.haproxy_enabled()
    routing = {"request_router_config": router_config()} if uses_request_router else {}
    application: Application = Replica.options(  # type: ignore[attr-defined]
        ray_actor_options={"num_cpus": _REPLICA_CPUS},
        placement_group_bundles=[
            {"CPU": _REPLICA_CPUS},
            *[shard_bundle(args)] * args.tensor_parallel_size,
        ],
        placement_group_strategy="PACK",
        max_ongoing_requests=args.max_ongoing_requests,
        graceful_shutdown_timeout_s=args.graceful_shutdown_timeout_s,
        health_check_period_s=2,
        **scaling,
        **routing,
    ).bind(args)
    if not by_body:
        return application
    router = IngressRouter.options(  # type: ignore[attr-defined]
        ray_actor_options={"num_cpus": 0}, max_ongoing_requests=10_000
    ).bind(application, args)
    return ray_private.with_ingress_router(application, router)


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
