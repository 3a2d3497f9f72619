"""How the ranks find each other: who has no key neither joins them nor holds them up."""

import pickle
import socket
import subprocess
import sys
from threading import Thread
from typing import Any

import pytest
import torch

from engine import LLM, SamplingParams
from engine.config import EngineConfig
from engine.ranks.group import GroupAddress, Leader
from engine.ranks.rank_group import Ranks
from engine.runner import local_followers
from engine.runner.local_followers import LocalFollowers
from tests.conftest import CheckpointFactory

_FOLLOW = """
import pickle, sys, torch
from engine.ranks.group import Follower
follower = Follower(pickle.loads(bytes.fromhex(sys.argv[1])))
follower.join(1, 2, torch.device("cpu"))
print(follower.receive())
"""


def strangers(address: GroupAddress) -> list[socket.socket]:
    """On both ports: one says nothing, one speaks HTTP, one stops within a message, one goes."""
    calls = []
    for port in (address.plan_port, address.store_port):
        for said in (b"", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\0\0\0\x20half"):
            call = socket.create_connection((address.host, port), timeout=10)
            call.sendall(said)
            calls.append(call)
        socket.create_connection((address.host, port), timeout=10).close()
    return calls


def test_strangers_neither_block_nor_fail_a_start() -> None:
    leader = Leader(2)
    calls = strangers(leader.address)
    groups: list[Ranks] = []
    gather = Thread(target=lambda: groups.append(leader.gather(torch.device("cpu"))), daemon=True)
    gather.start()
    argument = pickle.dumps(leader.address).hex()
    follower = subprocess.Popen(
        [sys.executable, "-c", _FOLLOW, argument], stdout=subprocess.PIPE, text=True
    )
    try:
        gather.join(60)
        assert [ranks.world.size for ranks in groups] == [2]
        leader.send("a plan")
        assert follower.communicate(timeout=60) == ("a plan\n", None)
    finally:
        follower.kill()
        leader.close()
        for call in calls:
            call.close()


def test_a_rank_that_ends_while_it_starts_ends_the_start() -> None:
    leader = Leader(2)
    followers = LocalFollowers(EngineConfig(model="manta-demo", tensor_parallel_size=2), leader)
    followers.processes[0].kill()
    try:
        with pytest.raises(RuntimeError, match="rank 1 ended while it started"):
            leader.gather(torch.device("cpu"))
    finally:
        leader.close()
        followers.close()


def test_ranks_stay_on_the_gpus_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_followers, "select_device", lambda _: torch.device("cuda"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    leader = Leader(2)
    with pytest.raises(ValueError, match="2 ranks need a GPU each, and CUDA_VISIBLE_DEVICES=5"):
        LocalFollowers(EngineConfig(model="manta-demo", tensor_parallel_size=2), leader)
    leader.close()


def test_after_a_start_that_fails_another_may_succeed(checkpoints: CheckpointFactory) -> None:
    """In the same process, when the ranks have met already."""
    options: Any = dict(tensor_parallel_size=2, device="cpu", num_threads=1, num_blocks=64)
    model = str(checkpoints("qwen3"))
    with pytest.raises(ValueError, match="cuda_graph_sizes"):
        LLM(model, cuda_graph_sizes=[1], **options)
    llm = LLM(model, **options)
    params = SamplingParams(temperature=0, max_tokens=2)
    assert len(llm.generate([[5, 6]], params, use_tqdm=False)[0].outputs[0].token_ids) == 2
    llm.close()
