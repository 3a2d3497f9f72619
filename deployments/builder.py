"""`deployments:app`, the builder that `serve run` and `serve deploy` call."""

import os
from typing import Any

import click
import ray
from ray.serve import Application
from ray.serve.config import BackpressureConfig, HTTPOptions, RequestRouterConfig

from deployments import ray_private
from deployments.api.errors import RETRY_AFTER_S
from deployments.api.keys import KEYS_VARIABLE
from deployments.args import AppArgs
from deployments.autoscaling import autoscaling_config
from deployments.devices import with_device
from deployments.local_ray import preflight
from deployments.replica import Replica
from deployments.routing.ingress_router import IngressRouter
from deployments.routing.request_router import router_config
from deployments.shards.shard import group_bundles

# The replica waits for the network most of the time; the shards do the work.
_REPLICA_CPUS = 0.1
# Serve replaces a replica that has not answered three times in a row, each for so long.
_HEALTH_CHECK_TIMEOUT_S = 10


def app(args: AppArgs) -> Application:
    """One model behind an OpenAI-compatible API.

    `serve run deployments:app model=Qwen/Qwen3-0.6B max_model_len=4096`, or the same names under
    `args:` in a Serve config file. Without `model`, the bundled demo model.
    """
    if not ray.is_initialized() and _starts_ray():
        http = HTTPOptions()
        preflight.finish(preflight.start(args, http.host or "", http.port))
    return build(args, router_config())


def _starts_ray() -> bool:
    """Whether `serve run` asks, and will start a Ray of this machine alone."""
    context = click.get_current_context(silent=True)
    address = context.params.get("address") if context is not None else ""
    return address == "local" or (address is None and not ray_private.is_cluster_here())


def build(args: AppArgs, routing: RequestRouterConfig) -> Application:
    """As `app`, with a routing policy to choose."""
    args = with_device(args)
    if os.environ.get(KEYS_VARIABLE):  # replicas that cannot see them must not serve everyone
        args = args.model_copy(update={"require_api_key": True})
    by_body = args.may_have_several_replicas and ray_private.can_route_by_body()
    options: dict[str, Any] = {"num_replicas": args.num_replicas}
    if args.max_replicas is not None:
        options = {"autoscaling_config": autoscaling_config(args)}
    # HAProxy without an ingress router balances by itself, and Serve then refuses a policy.
    if by_body or not ray_private.haproxy_enabled():
        options["request_router_config"] = routing
    replicas: Application = Replica.options(  # type: ignore[attr-defined]
        ray_actor_options={"num_cpus": _REPLICA_CPUS},
        placement_group_bundles=group_bundles(args, _REPLICA_CPUS),
        placement_group_strategy="PACK",
        max_ongoing_requests=args.max_ongoing_requests,
        # Who waits for a replica waits at a proxy.
        max_queued_requests=args.max_queued_requests or -1,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=RETRY_AFTER_S),
        graceful_shutdown_timeout_s=args.graceful_shutdown_timeout_s,
        health_check_period_s=2,
        health_check_timeout_s=_HEALTH_CHECK_TIMEOUT_S,
        **options,
    ).bind(args, IngressRouter.name if by_body else None)  # type: ignore[attr-defined]
    if not by_body:
        return replicas
    router = IngressRouter.options(  # type: ignore[attr-defined]
        ray_actor_options={"num_cpus": 0}, max_ongoing_requests=10_000
    ).bind(replicas, args)
    return ray_private.with_ingress_router(replicas, router)
