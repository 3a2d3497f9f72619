"""The process that owns a device: one tensor-parallel rank of an engine, as a Ray actor."""

import os

import ray

from deployments.args import AppArgs
from deployments.engine_loop import EngineLoop
from engine.config import EngineConfig


def shard_bundle(args: AppArgs) -> dict[str, float]:
    """What Ray reserves for one shard."""
    return {"GPU": 1} if args.device == "cuda" else {"CPU": args.num_cpus_per_shard}


@ray.remote(max_restarts=0)
class EngineShard:
    """Its methods are for lifecycle alone; requests and tokens go over the socket."""

    def run(self, config: EngineConfig, address: str) -> None:
        """Load the model and serve the front at `address` until it hangs up.

        The call lasts as long as the shard does, so its failure is the news of the shard's death.
        """
        from engine.engine import Engine  # imports torch, which the front never does

        # Ray sets this to the actor's CPU reservation; the engine decides by the cores there are.
        os.environ.pop("OMP_NUM_THREADS", None)
        EngineLoop(Engine(config, show_progress=True), address).run()
