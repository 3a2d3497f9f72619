"""Evicted blocks that live on in host memory: the same text, and prefixes found again."""

import random
from collections import OrderedDict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from engine.config import EngineConfig
from engine.device.host_cache import HostCache
from engine.engine import Engine
from engine.ranks.group import Leader
from engine.runner.local_followers import LocalFollowers
from engine.schedule.block_pool import BlockHasher, BlockPool
from engine.schedule.host_pool import HostPool
from engine.schedule.step import BlockCopy
from kernels.types import KVCache, PagedKV
from tests.conftest import CheckpointFactory
from tests.engine.helpers import new_engine, new_requests, run, tokens_of
from tests.engine.oracle import random_prompts

# --- The pool of slots ------------------------------------------------------------------------


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    num_slots=st.integers(0, 4),
    operations=st.lists(
        st.tuples(st.sampled_from(["store", "pin and store"]), st.integers(0, 7)), max_size=40
    ),
)
def test_slots_are_handed_on_least_recently_used_first(
    num_slots: int, operations: list[tuple[str, int]]
) -> None:
    """Against a model: an ordered list of names, the oldest of which goes unless it is pinned."""
    pool = HostPool(num_slots)
    names: OrderedDict[bytes, int] = OrderedDict()
    for operation, number in operations:
        name, pinned = bytes([number]), []
        if operation == "pin and store":
            pinned = pool.lookup([bytes([(number + 1) % 8]), bytes([(number + 2) % 8])])
            for one in pinned:
                names.move_to_end(one)
        with pool.pinned(pinned) as slots:
            assert slots == [names[one] for one in pinned]
            stored = pool.store(name)
        if name in names:
            assert stored is None
            names.move_to_end(name)
        elif len(names) < num_slots:
            assert stored is not None and stored.replaced is None
            names[name] = stored.slot
        elif set(names) <= set(pinned):
            assert stored is None
        else:
            oldest = next(one for one in names if one not in pinned)
            assert stored is not None and stored.replaced == oldest
            assert stored.slot == names.pop(oldest)
            names[name] = stored.slot
        assert {one for one in map(bytes, zip(range(8))) if one in pool} == set(names)
        assert len(pool) == len(names)
        pool.assert_invariants()


def test_what_is_restored_makes_room_in_the_right_order() -> None:
    """The block's old content leaves before the new one comes, into a slot that is not read."""
    pool = BlockPool(2, num_host_blocks=2)
    tables = [pool.allocate(1), pool.allocate(1)]
    for table, name in zip(tables, (b"a", b"b"), strict=True):
        pool.publish(table[0], name)
        pool.free(table)
    (block,) = pool.allocate(1)  # a moves to the host
    assert pool.take_copies() == [BlockCopy(True, 0, 0)]
    pool.publish(block, b"c")
    pool.free([block])
    assert pool.restore([b"a"]) == [1]  # where b was, the least recently used
    assert pool.take_copies() == [BlockCopy(True, 1, 1), BlockCopy(False, 1, 0)]
    assert pool.lookup([b"a"]) == [1] and b"b" in pool.host
    pool.assert_invariants([[1]])


# --- The copies -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_blocks_come_back_bit_by_bit(dtype: torch.dtype) -> None:
    """More of them than are staged at once, in both directions, all layers."""
    rng = random.Random(0)
    shape = (50, 2, 4, 8)
    bits = torch.randint(0, 256, (3, 2, *shape[:-1], 8 * dtype.itemsize), dtype=torch.uint8)
    spec = PagedKV(4, 2, 8, dtype)
    caches = [KVCache(spec, *(part.clone().view(dtype) for part in layer)) for layer in bits]
    cache = HostCache(40, 3 * spec.block_bytes, torch.device("cpu"))
    blocks = rng.sample(range(50), 40)
    slots = rng.sample(range(40), 40)
    cache.run([BlockCopy(True, *pair) for pair in zip(blocks, slots, strict=True)], caches)
    for layer in caches:
        for part in layer.tensors:
            part.view(torch.uint8).zero_()
    targets = rng.sample(range(50), 40)
    cache.run([BlockCopy(False, *pair) for pair in zip(targets, slots, strict=True)], caches)
    for befores, layer in zip(bits, caches, strict=True):
        for before, after in zip(befores, layer.tensors, strict=True):
            assert torch.equal(after.view(torch.uint8)[targets], before[blocks])
            untouched = [block for block in range(50) if block not in targets]
            assert not after.view(torch.uint8)[untouched].any()


def test_copies_run_in_the_order_of_the_plan() -> None:
    """Through one slot, and back into a block whose own content has just left."""
    keys = torch.arange(3.0).view(3, 1, 1, 1)
    spec = PagedKV(1, 1, 1, torch.float32)
    cache = HostCache(2, spec.block_bytes, torch.device("cpu"))
    copies = [(True, 0, 0), (True, 1, 1), (False, 1, 0), (True, 2, 0), (False, 2, 1)]
    cache.run([BlockCopy(*copy) for copy in copies], [KVCache(spec, keys, keys.clone())])
    assert keys.flatten().tolist() == [0, 0, 1]


# --- The engine -------------------------------------------------------------------------------

BLOCK_BYTES = 3 * 2 * 2 * 32 * 4 * 4  # of 4 tokens of the tiny models
CONFIGS: dict[str, dict[str, Any]] = {
    "roomy": dict(host_cache_memory_bytes=400 * BLOCK_BYTES),
    "tiny": dict(host_cache_memory_bytes=9 * BLOCK_BYTES),
    "overlapping": dict(host_cache_memory_bytes=60 * BLOCK_BYTES, async_scheduling=True),
    "chunks": dict(host_cache_memory_bytes=60 * BLOCK_BYTES, max_num_batched_tokens=20),
}
TINY_POOL = dict(block_size=4, num_blocks=26, max_num_seqs=16)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_same_text_from_a_tiny_pool(
    checkpoints: CheckpointFactory, family: str, config: str
) -> None:
    """Requests are preempted and resumed, and come again when others have taken their blocks."""
    prompts = random_prompts(20, 60)
    texts, restored = [], []
    for own in (dict[str, Any](), CONFIGS[config]):
        with new_engine(checkpoints(family), **TINY_POOL | own) as engine:
            for _ in range(2):
                requests = new_requests(prompts, temperature=1.0, ignore_eos=True)
                texts.append(tokens_of(run(engine, requests)))
            stats = engine.stats()
            assert stats["preemptions"] > 0
            assert stats["cached_tokens"] <= stats["prompt_tokens"]
            block_bytes = engine.runner.cache_layout.groups[0].block_bytes
            host_bytes = own.get("host_cache_memory_bytes", 0)
            assert stats["host_blocks"] * block_bytes == host_bytes
            assert stats["used_host_blocks"] <= stats["host_blocks"]
            restored.append(stats["restored_tokens"])
    assert texts == [texts[0]] * 4
    assert restored[0] == 0 < restored[1]


def test_a_prompt_that_was_evicted_is_found_again(checkpoints: CheckpointFactory) -> None:
    first, *others = (random_prompts(11, 60, seed)[10] for seed in range(6))
    config = TINY_POOL | dict(host_cache_memory_bytes=400 * BLOCK_BYTES)
    with new_engine(checkpoints("qwen3"), **config) as engine:
        (before,) = run(engine, new_requests([first]))
        run(engine, new_requests(others))
        names: list[bytes] = []
        BlockHasher(4, engine.config.block_key).extend(names, first)
        assert not engine.scheduler.pool.lookup(names)
        (after,) = run(engine, new_requests([first]))
        assert engine.stats()["restored_tokens"] >= after.num_cached_tokens == 56
        assert after.token_ids == before.token_ids


def test_a_host_cache_that_cannot_serve_is_refused(checkpoints: CheckpointFactory) -> None:
    with pytest.raises(ValidationError, match="without enable_prefix_caching"):
        EngineConfig(model="m", host_cache_memory_bytes=1, enable_prefix_caching=False)
    with (
        pytest.raises(ValueError, match="less than one block, which takes"),
        new_engine(checkpoints("qwen3"), host_cache_memory_bytes=100),
    ):
        pass


def test_followers_overlap_and_restore_too(checkpoints: CheckpointFactory) -> None:
    """Two ranks in two processes, with everything that depends on the order of their plans."""
    prompts = random_prompts(20, 60)
    config = EngineConfig(
        model=str(checkpoints("qwen3")),
        dtype="float32",
        device="cpu",
        num_threads=1,
        tensor_parallel_size=2,
        async_scheduling=True,
        host_cache_memory_bytes=60 * BLOCK_BYTES,
        **TINY_POOL,
    )
    with new_engine(checkpoints("qwen3")) as engine:
        alone = tokens_of(run(engine, new_requests(prompts, temperature=1.0, ignore_eos=True)))
    leader = Leader(2)
    followers = LocalFollowers(config, leader)
    engine = Engine(config, leader)
    for _ in range(2):
        requests = new_requests(prompts, temperature=1.0, ignore_eos=True)
        assert tokens_of(run(engine, requests)) == alone
    stats = engine.stats()
    engine.close()
    assert [process.wait(30) for process in followers.processes] == [0]
    assert stats["restored_tokens"] > 0 and stats["preemptions"] > 0
