"""Followers as plain processes of this machine, for `LLM(tensor_parallel_size=N)` without Ray.

`python -m engine.runner.follower` reads what it needs from its standard input. Unlike
multiprocessing it does not import the caller's main module, so notebooks and unguarded scripts
work.
"""

import os
import pickle
import subprocess
import sys

from engine.config import EngineConfig
from engine.ranks.group import GroupAddress, Leader


def spawn_followers(config: EngineConfig, leader: Leader) -> list[subprocess.Popen[bytes]]:
    """Start ranks 1 .. N - 1, each with its own GPU where there are GPUs."""
    return [_spawn(config, rank, leader.address) for rank in range(1, config.num_ranks)]


def _spawn(config: EngineConfig, rank: int, address: GroupAddress) -> subprocess.Popen[bytes]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    gpu = visible[rank] if rank < len(visible) else str(rank)
    process = subprocess.Popen(
        [sys.executable, "-m", "engine.runner.follower"],
        stdin=subprocess.PIPE,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": gpu, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdin is not None
    process.stdin.write(pickle.dumps((config, rank, address)))
    process.stdin.close()
    return process


if __name__ == "__main__":
    from engine.runner.executor import follow

    follow(*pickle.load(sys.stdin.buffer))
