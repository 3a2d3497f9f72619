"""How the ranks of a tensor-parallel group find and talk to each other.

The leader (rank 0) opens everything on ports that the system picks, and publishes one address. The
ranks then share a torch.distributed process group for tensors, and each follower has a connection
on which the leader sends it the plan of every step.
"""

import secrets
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from engine.ranks.parallel import TensorParallel

# A collective slower than this means that a rank is gone; its peers then fail instead of waiting.
_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class GroupAddress:
    """Where followers find their leader, and the key that lets them in."""

    host: str
    store_port: int
    plan_port: int
    key: bytes


class Leader:
    """Rank 0's end. With one rank there is nobody to talk to, and nothing is opened."""

    def __init__(self, size: int, host: str = "127.0.0.1") -> None:
        self.size = size
        self._followers: list[Connection[Any, Any]] = []
        if size > 1:
            self._store = TCPStore(
                host, 0, is_master=True, wait_for_workers=False, timeout=_TIMEOUT
            )
            key = secrets.token_bytes(32)
            self._listener = Listener((host, 0), backlog=size, authkey=key)
            port = self._listener.address[1]
            self.address = GroupAddress(host, self._store.port, int(port), key)

    def gather(self, device: torch.device) -> TensorParallel:
        """Wait for all followers; returns rank 0's place among them."""
        if self.size == 1:
            return TensorParallel()
        self._followers = [self._listener.accept() for _ in range(self.size - 1)]
        self._listener.close()
        return _join(self._store, 0, self.size, device)

    def send(self, message: Any) -> None:
        """Give every follower the same message, in the same order."""
        for follower in self._followers:
            follower.send(message)

    def close(self) -> None:
        """Followers end when their connection does."""
        for follower in self._followers:
            follower.close()
        if self._followers and dist.is_initialized():
            dist.destroy_process_group()
        self._followers = []


class Follower:
    """The end of any other rank."""

    def __init__(self, address: GroupAddress) -> None:
        self._address = address
        self._connection: Connection[Any, Any] = Client(
            (address.host, address.plan_port), authkey=address.key
        )

    def join(self, rank: int, size: int, device: torch.device) -> TensorParallel:
        store = TCPStore(
            self._address.host, self._address.store_port, is_master=False, timeout=_TIMEOUT
        )
        return _join(store, rank, size, device)

    def receive(self) -> Any:
        """The leader's next message; raises EOFError when it is gone."""
        return self._connection.recv()


def _join(store: Store, rank: int, size: int, device: torch.device) -> TensorParallel:
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT)
    return TensorParallel(rank, size, dist.group.WORLD)
