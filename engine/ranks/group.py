"""How the ranks of a tensor-parallel group find and talk to each other.

The leader (rank 0) opens everything on ports that the system picks, and publishes one address. The
ranks then share a torch.distributed process group for tensors, and each follower has a connection
on which the leader sends it the plan of every step.
"""

import pickle
import secrets
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, answer_challenge, deliver_challenge
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from engine.ranks.rank_group import RankGroup, Ranks

# A collective slower than this means that a rank is gone; its peers then fail instead of waiting.
# The ranks have as long to find each other.
_TIMEOUT = timedelta(minutes=10)
# How often the leader looks for another connection, in seconds.
_ACCEPT_S = 0.02
# How long one may say nothing before it has shown that it has the key: 10 s, as a timeval.
_SILENCE = struct.pack("ll", 10, 0)


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
        self.check: Callable[[], None] = lambda: None  # raises when a rank will not come
        self._followers: list[Connection[Any, Any]] = []
        if size > 1:
            self._store = TCPStore(
                host, 0, is_master=True, wait_for_workers=False, timeout=_TIMEOUT
            )
            self._door = socket.create_server((host, 0))
            port = self._door.getsockname()[1]
            key = secrets.token_bytes(32)
            self.address = GroupAddress(host, self._store.port, port, key)

    def gather(self, device: torch.device) -> Ranks:
        """Wait for all followers; returns rank 0's place among them.

        Raises TimeoutError, and whatever `check` raises.
        """
        if self.size == 1:
            return Ranks()
        with self._door:
            self._followers = self._accept_followers()
        return _join(self._store, 0, self.size, device)

    def _accept_followers(self) -> "list[Connection[Any, Any]]":
        """Connections to all that have the key. Others, whatever they say or do not, are let be."""
        deadline = time.monotonic() + _TIMEOUT.total_seconds()
        followers: list[Connection[Any, Any]] = []
        welcome: SimpleQueue[Connection[Any, Any]] = SimpleQueue()
        self._door.settimeout(_ACCEPT_S)
        while len(followers) < self.size - 1:
            self.check()
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{len(followers)} of {self.size - 1} other ranks came within {_TIMEOUT}"
                )
            with suppress(OSError):  # nobody there, or too many
                caller, _ = self._door.accept()
                greeting = caller, self.address.key, welcome
                Thread(target=_greet, args=greeting, daemon=True).start()
            with suppress(Empty):
                followers.append(welcome.get(timeout=_ACCEPT_S))
        return followers

    def send(self, message: Any) -> None:
        """Give every follower the same message, in the same order."""
        if self._followers:
            encoded = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
            for follower in self._followers:
                follower.send_bytes(encoded)

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

    def join(self, rank: int, size: int, device: torch.device) -> Ranks:
        store = TCPStore(
            self._address.host, self._address.store_port, is_master=False, timeout=_TIMEOUT
        )
        return _join(store, rank, size, device)

    def receive(self) -> Any:
        """The leader's next message; raises EOFError when it is gone."""
        return self._connection.recv()


def _greet(caller: socket.socket, key: bytes, welcome: "SimpleQueue[Connection[Any, Any]]") -> None:
    """Welcome who has the key, and hang up on anybody else."""
    caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _SILENCE)
    connection: Connection[Any, Any] = Connection(caller.detach())
    try:
        deliver_challenge(connection, key)
        answer_challenge(connection, key)
    except (OSError, EOFError, AuthenticationError):
        connection.close()
    else:
        welcome.put(connection)


def _join(store: Store, rank: int, size: int, device: torch.device) -> Ranks:
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT)
    world = RankGroup(rank, size, dist.group.WORLD)
    return Ranks(world, tensor=world)
