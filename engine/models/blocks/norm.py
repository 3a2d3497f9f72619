"""The weight of an RMS norm, whole on every rank."""

from engine.models.blocks.linear import ShardedModule, Source


class Norm(ShardedModule):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.add_parameter("weight", [size], [Source(".weight", (size,), 0, 0, size)])
