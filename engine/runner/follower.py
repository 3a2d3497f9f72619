"""What every rank but the first does: run the leader's commands."""

from engine.config import EngineConfig
from engine.device.select import select_device
from engine.models.shared import WeightFiles
from engine.ranks.group import Follower, GroupAddress
from engine.runner.commands import Command
from engine.runner.executor import load_runner


def follow(
    config: EngineConfig, rank: int, address: GroupAddress, files: WeightFiles | None = None
) -> None:
    """Be rank `rank`: run the leader's commands until it hangs up."""
    follower = Follower(address)
    ranks = follower.join(rank, config.num_ranks, select_device(config.device))
    runner = load_runner(config, ranks, files=files)
    while True:
        try:
            command: Command[object] = follower.receive()
        except EOFError:
            return
        command.run(runner)
