"""The block pool: who holds a block, what it is called, which one is reused next."""

import pickle

import numpy as np
import pytest
import xxhash

from engine.config import EngineConfig
from engine.schedule.block_pool import BlockHasher, BlockPool
from tests.conftest import CheckpointFactory
from tests.engine.helpers import new_engine, new_requests, run, run_one_by_one

KEY = b"of this test"


def chain(*blocks: list[int], salt: str = "", owner: str = "", key: bytes = KEY) -> list[bytes]:
    """Hashes of consecutive full blocks, all equally long."""
    hashes: list[bytes] = []
    tokens = [token for block in blocks for token in block]
    BlockHasher(len(blocks[0]), key).extend(hashes, tokens, salt, owner)
    return hashes


def cached(pool: BlockPool, block_hash: bytes) -> int:
    """Allocate a block, name it and free it again."""
    (block,) = pool.allocate(1)
    pool.publish(block, block_hash)
    pool.free([block])
    return block


# --- Names ------------------------------------------------------------------------------------


def test_a_hash_is_of_all_tokens_up_to_the_end_of_the_block() -> None:
    first, second = chain([1, 2], [3, 4])
    assert chain([1, 2], [3, 4]) == [first, second]
    assert len(first) == len(second) == 16
    assert chain([1, 2], [3, 5])[1] != second
    assert chain([1, 9], [3, 4])[1] != second
    assert chain([3, 4])[0] != second
    assert chain([2, 1])[0] != first


def test_a_salt_changes_every_hash_of_the_chain() -> None:
    plain, a, b = (chain([1, 2], [3, 4], salt=salt) for salt in ("", "a", "b"))
    assert len({*plain, *a, *b}) == 6


def test_salt_and_owner_may_be_any_string() -> None:
    assert chain([1], salt="\ud800") != chain([1], salt="\x00")
    assert chain([1], owner="\ud800") != chain([1], owner="\x00")


def test_an_owners_names_are_those_of_all_with_the_owner_behind() -> None:
    """Whoever does not know the owner knows the beginning; and a salt cannot pose as an owner."""
    plain, salted = chain([1, 2], [3, 4]), chain([1, 2], [3, 4], salt="acme")
    owned = chain([1, 2], [3, 4], owner="acme")
    assert [name[:16] for name in owned] == plain
    assert len({*plain, *salted, *owned}) == 6


def test_a_salt_cannot_pose_as_a_parent() -> None:
    """A salt that spells the hash of someone's block must not lead to what follows that block."""
    parent = b"sixteen letters!"
    after: list[bytes] = [parent]
    BlockHasher(2, KEY).extend(after, [0, 0, 1, 2])
    assert chain([1, 2], salt=parent.decode()) != after[1:]
    # Nor one that spells all that a block's hash is taken of: without the mark of salts it would.
    tokens = np.array([65, 66], dtype=np.uint32).tobytes()
    (root,) = chain([65, 66], salt=(parent + tokens).decode())
    after = [parent]
    BlockHasher(2, KEY).extend(after, [0, 0, 65, 66, 65, 66])
    assert root != after[2]


def test_names_depend_on_the_key() -> None:
    assert chain([1, 2]) != chain([1, 2], key=b"another")


def test_every_configuration_draws_a_key_and_tells_nobody() -> None:
    config, other = EngineConfig(model="m"), EngineConfig(model="m")
    assert config.block_key != other.block_key and len(config.block_key) == 16
    copies = [pickle.loads(pickle.dumps(config)), config.model_copy(update={"seed": 1})]
    assert [copy.block_key for copy in copies] == [config.block_key] * 2
    assert "key" not in f"{config!r} {config} {config.model_dump()}"


def test_names_are_extended_as_blocks_fill() -> None:
    hasher = BlockHasher(2, KEY)
    names: list[bytes] = []
    for tokens in ([1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4, 5]):
        hasher.extend(names, tokens, "s", "o")
        blocks = [tokens[i : i + 2] for i in range(0, len(tokens) - 1, 2)]
        assert names == chain(*blocks, salt="s", owner="o")


def test_a_block_of_one_token_is_full_at_once() -> None:
    names: list[bytes] = []
    BlockHasher(1, KEY).extend(names, [7, 8])
    assert names == chain([7], [8])


def forged_blocks() -> tuple[list[int], list[int]]:
    """Two blocks of 64 tokens with equal XXH3, after any parent.

    Without a secret seed, XXH3 adds up (token ^ s) * t with published s and t in eight lanes, and
    the tokens in their neighbours: a lattice reduction finds changes that cancel within a second.
    """
    first, second = list(range(100, 164)), list(range(100, 164))
    first[:56:8] = [11, 250, 5, 5, 48, 16, 4]
    second[:56:8] = [4, 4, 8, 6, 197, 3, 117]
    for parent in (b"any parent's 128", xxhash.xxh3_128_digest(b"salt")):
        names = {
            xxhash.xxh3_128_digest(parent + np.array(tokens, dtype=np.int64).tobytes())
            for tokens in (first, second)
        }
        assert len(names) == 1
    return first, second


def test_a_forged_block_gives_nobody_another_answer(checkpoints: CheckpointFactory) -> None:
    """The attacker's block was once taken for the victim's, and the victim got its answer."""
    attack, victim = ([*block, 7, 8, 9] for block in forged_blocks())
    with new_engine(checkpoints("qwen3"), block_size=64, num_blocks=8) as engine:
        (alone,) = run(engine, new_requests([victim]))
    with new_engine(checkpoints("qwen3"), block_size=64, num_blocks=8) as engine:
        attackers, victims = run_one_by_one(engine, new_requests([attack, victim]))
    assert victims.num_cached_tokens == 0
    assert victims.token_ids == alone.token_ids != attackers.token_ids


# --- Holding and freeing ----------------------------------------------------------------------


def test_every_block_is_free_at_first_and_handed_out_once() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(3)
    assert len(set(blocks)) == 3 and set(blocks) <= set(range(4))
    assert pool.num_free == 1
    assert [pool.is_free(block) for block in blocks] == [False] * 3
    pool.assert_invariants([blocks])


def test_a_block_is_free_when_its_last_holder_lets_go() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.hold([block])
    pool.assert_invariants([[block], [block]])
    pool.free([block])
    assert not pool.is_free(block)
    pool.assert_invariants([[block]])
    pool.free([block])
    assert pool.is_free(block)
    pool.assert_invariants([])


def test_running_out_is_an_error_and_not_a_block_handed_out_twice() -> None:
    pool = BlockPool(2)
    pool.allocate(2)
    with pytest.raises(KeyError):
        pool.allocate(1)


# --- Prefix cache -----------------------------------------------------------------------------


def test_lookup_returns_the_longest_cached_prefix() -> None:
    pool = BlockPool(4)
    hashes = chain([1], [2], [3])
    blocks = pool.allocate(3)
    for block, block_hash in zip(blocks, hashes, strict=True):
        pool.publish(block, block_hash)
    assert pool.lookup(hashes) == blocks
    assert pool.lookup(hashes[:2]) == blocks[:2]
    assert pool.lookup(chain([1], [2], [4])) == blocks[:2]
    assert pool.lookup(chain([2])) == []
    assert pool.lookup([]) == []


def test_lookup_ends_at_the_first_gap() -> None:
    """A later block without its prefix is of no use."""
    pool = BlockPool(4)
    hashes = chain([1], [2], [3])
    for block, block_hash in zip(pool.allocate(2), hashes[1:], strict=True):
        pool.publish(block, block_hash)
    assert pool.lookup(hashes) == []


def test_lookup_holds_nothing() -> None:
    pool = BlockPool(2)
    block = cached(pool, b"a")
    assert pool.lookup([b"a"]) == [block]
    assert pool.is_free(block)
    pool.assert_invariants([])


def test_a_freed_block_keeps_its_content_until_its_space_is_needed() -> None:
    pool = BlockPool(2)
    block = cached(pool, b"a")
    pool.hold(pool.lookup([b"a"]))
    assert not pool.is_free(block)
    pool.free([block])
    pool.allocate(2)
    assert pool.lookup([b"a"]) == []
    pool.assert_invariants([[0], [1]])


def test_the_first_of_equal_blocks_stays_the_cached_one() -> None:
    pool = BlockPool(3)
    first, second = pool.allocate(2)
    pool.publish(first, b"a")
    pool.publish(second, b"a")
    assert pool.lookup([b"a"]) == [first]
    pool.free([second])
    pool.allocate(2)  # takes the second again, which has no name to lose
    assert pool.lookup([b"a"]) == [first]


def test_with_prefix_caching_off_nothing_is_found() -> None:
    pool = BlockPool(2, enable_prefix_caching=False)
    cached(pool, b"a")
    assert pool.lookup([b"a"]) == []
    pool.assert_invariants([])


# --- Eviction order ---------------------------------------------------------------------------


def test_the_least_recently_freed_block_is_reused_first() -> None:
    pool = BlockPool(3)
    a, b, c = pool.allocate(3)
    for block in (b, a, c):
        pool.free([block])
    assert pool.allocate(3) == [b, a, c]


def test_the_end_of_a_table_is_reused_before_its_beginning() -> None:
    pool = BlockPool(3)
    table = pool.allocate(3)
    pool.free(table)
    assert pool.allocate(3) == table[::-1]


def test_blocks_never_used_are_taken_before_cached_ones() -> None:
    pool = BlockPool(4)
    block = cached(pool, b"a")
    pool.allocate(3)
    assert pool.lookup([b"a"]) == [block]


def test_use_makes_a_cached_block_young_again() -> None:
    pool = BlockPool(2)
    a, b = cached(pool, b"a"), cached(pool, b"b")
    pool.hold([a])
    pool.free([a])
    assert pool.allocate(1) == [b]
    assert pool.lookup([b"a"]) == [a]


def test_check_notices_what_it_should() -> None:
    """The invariants that other tests assert through it are really looked at."""
    pool = BlockPool(3)
    table = pool.allocate(2)
    pool.publish(table[0], b"a")
    pool.assert_invariants([table])
    with pytest.raises(AssertionError, match="reference count"):
        pool.assert_invariants([])
    with pytest.raises(AssertionError, match="reference count"):
        pool.assert_invariants([table, table[:1]])
