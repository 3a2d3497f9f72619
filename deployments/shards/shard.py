"""The process that owns a device: one tensor-parallel rank of an engine, as a Ray actor."""

import faulthandler
import os
import signal
import time
from typing import TYPE_CHECKING

import ray

from deployments.args import DeploymentArgs
from deployments.shards import injected_faults
from deployments.shards.engine_loop import EngineLoop
from deployments.shards.weight_keeper import KeptWeights
from engine.config import EngineConfig

if TYPE_CHECKING:
    from engine.ranks.group import GroupAddress


# Makes a shard write the stacks of its threads into its log.
STACKS_SIGNAL = signal.SIGUSR2


def shard_resources(args: DeploymentArgs) -> dict[str, float]:
    """What Ray reserves for one shard."""
    return {"GPU": 1} if args.device == "cuda" else {"CPU": args.num_cpus_per_shard}


def group_bundles(args: DeploymentArgs, replica_cpus: float) -> list[dict[str, float]]:
    """The placement group of a replica: bundle r is for the shard of rank r.

    Bundle 0 also holds the replica, so that the leader is on its node, where its socket is; the
    other ranks may be elsewhere.
    """
    shard = shard_resources(args)
    first = shard | {"CPU": shard.get("CPU", 0) + replica_cpus}
    return [first] + [shard] * (args.num_ranks - 1)


@ray.remote(max_restarts=0)
class EngineShard:
    """Its methods are for lifecycle alone; requests, plans and tokens go over sockets.

    `lead` and `follow` last as long as the shard does: their failure is the news of its death.
    torch is imported in here only, for the front shares this module.
    """

    def __init__(self) -> None:
        faulthandler.register(STACKS_SIGNAL, all_threads=True)
        injected_faults.prepare_process()

    def process(self) -> tuple[str, int]:
        """(node id, process id), for whoever must kill it when it does not listen."""
        return ray.get_runtime_context().get_node_id(), os.getpid()

    def open_group(self, size: int) -> "GroupAddress | None":
        """Rank 0: open the group's ports; the address is None for a group of one."""
        begin = time.monotonic()
        from engine.ranks.group import Leader  # and with it torch

        self._imports_s = time.monotonic() - begin
        self._leader = Leader(size, ray.util.get_node_ip_address())
        return self._leader.address if size > 1 else None

    def lead(self, config: EngineConfig, front_address: str, keep_s: float = 0) -> None:
        """Rank 0: load, gather the followers, and serve the front until it hangs up.

        Args:
            keep_s: see `KeptWeights`.
        """
        begin = time.monotonic()
        from engine.engine import Engine

        startup_s = {"imports": self._imports_s + time.monotonic() - begin}
        engine = Engine(config, self._leader, show_progress=True, files=KeptWeights(keep_s))
        injected_faults.prepare_engine(engine)
        EngineLoop(engine, front_address, startup_s).run()

    def follow(
        self, config: EngineConfig, rank: int, address: "GroupAddress", keep_s: float = 0
    ) -> None:
        """Any other rank: load, and execute the leader's plans until it hangs up."""
        from engine.runner.follower import follow

        follow(config, rank, address, KeptWeights(keep_s))
