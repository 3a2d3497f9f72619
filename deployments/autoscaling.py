"""How many replicas the engines' load calls for. Requests differ too much to be counted."""

import math
from typing import Any

from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from deployments.args import AppArgs

# A replica is meant to be this full, so that there is room while the next one starts.
TARGET_LOAD = 0.7

# Prompt work that makes a replica full, in steps of its token budget.
_FULL_BACKLOG_STEPS = 4

_METRIC = "load"


def engine_load(stats: dict[str, Any]) -> dict[str, float]:
    """The fullest of an engine's resources: 1 is full, more is a queue.

    Rows (running and waiting requests), blocks held, and prompt tokens yet to be computed.
    """
    if not stats:
        return {_METRIC: 0.0}
    rows = (stats["running"] + stats["waiting"]) / stats["step_rows"]
    blocks = 1 - stats["free_blocks"] / stats["num_blocks"]
    backlog = stats["uncomputed_tokens"] / (_FULL_BACKLOG_STEPS * stats["step_tokens"])
    return {_METRIC: max(rows, blocks, backlog)}


def wanted_replicas(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """Serve's policy hook: enough replicas to bring the sum of loads down to the target each.

    Who waits at a proxy, where there is no replica, is no replica's load yet, but needs one.
    """
    loads = (context.aggregated_metrics or {}).get(_METRIC, {})
    wanted = math.ceil(sum(loads.values()) / TARGET_LOAD)
    if context.total_num_requests:
        wanted = max(wanted, 1)
    bounded = min(
        max(wanted, context.capacity_adjusted_min_replicas),
        context.capacity_adjusted_max_replicas,
    )
    return bounded, {}


def autoscaling_config(args: AppArgs) -> AutoscalingConfig:
    return AutoscalingConfig(
        min_replicas=args.num_replicas,
        max_replicas=args.max_replicas,
        upscale_delay_s=args.upscale_delay_s,
        downscale_delay_s=args.downscale_delay_s,
        policy=AutoscalingPolicy(policy_function=wanted_replicas),
    )
