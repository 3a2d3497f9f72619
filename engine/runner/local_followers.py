"""The other ranks as processes of this machine, for `LLM(tensor_parallel_size=N)` without Ray.

`python -m engine.runner.local_followers` reads what it needs from its standard input. Unlike
multiprocessing it does not import the caller's main module, so notebooks and unguarded scripts
work.
"""

import os
import pickle
import subprocess
import sys
from contextlib import suppress

from engine.config import EngineConfig
from engine.device.select import select_device
from engine.ranks.group import GroupAddress, Leader

# How long a rank may take to end after its leader, in seconds.
_END_S = 10.0


class LocalFollowers:
    """Ranks 1 .. N - 1 of a leader, each with its own GPU where there are GPUs.

    Raises ValueError when fewer GPUs may be used than there are ranks.
    """

    def __init__(self, config: EngineConfig, leader: Leader) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        gpus = _visible_gpus(config)
        for rank in range(1, leader.size):
            self.processes.append(_spawn(config, rank, leader.address, gpus[rank]))
        leader.check = self._check

    def _check(self) -> None:
        for rank, process in enumerate(self.processes, start=1):
            if process.poll() is not None:
                raise RuntimeError(f"rank {rank} ended while it started; see what it has said")

    def close(self, patience_s: float = _END_S) -> None:
        """They end when their leader does; who does not within so many seconds is killed."""
        for process in self.processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(patience_s)
            process.kill()
            process.wait()


def _visible_gpus(config: EngineConfig) -> list[str]:
    """By rank, as CUDA_VISIBLE_DEVICES names them."""
    mask = os.environ.get("CUDA_VISIBLE_DEVICES")
    if mask is None or select_device(config.device).type == "cpu":
        return [str(rank) for rank in range(config.num_ranks)]
    gpus = mask.split(",")
    if len(gpus) < config.num_ranks:
        raise ValueError(
            f"tensor_parallel_size: {config.num_ranks} ranks need a GPU each, and "
            f"CUDA_VISIBLE_DEVICES={mask} has {len(gpus)}"
        )
    return gpus


def _spawn(
    config: EngineConfig, rank: int, address: GroupAddress, gpu: str
) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-m", "engine.runner.local_followers"],
        stdin=subprocess.PIPE,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": gpu, "PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,  # a terminal's Ctrl-C is for the leader
    )
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it has ended already: the leader will see
        process.stdin.write(pickle.dumps((config, rank, address)))
        process.stdin.close()
    return process


if __name__ == "__main__":
    from engine.runner.follower import follow

    follow(*pickle.load(sys.stdin.buffer))
    sys.stdout.flush()
    os._exit(0)  # nothing is left to do, and the group's threads may abort an interpreter that ends
