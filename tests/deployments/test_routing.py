"""The routing policy alone, with a clock of the test's own."""

import pickle
import random
from collections.abc import Sequence

import pytest

from deployments.args import AppArgs
from deployments.routing.balancer import (
    HASH_BYTES,
    RUNNING_COST_TOKENS,
    PrefixBalancer,
    ReplicaReport,
    RoutedPrompt,
    pack_hashes,
    short,
)
from engine.schedule.block_pool import BlockHasher, BlockPool

BLOCK = 16


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def blocks(prompt: str, count: int) -> list[bytes]:
    """Stand-ins for the hashes of a prompt's first blocks."""
    return [short(f"{prompt}-{i}".encode().ljust(16)[:8] + bytes([i])) for i in range(count)]


def report(
    sequence: int = 1, cached: Sequence[bytes] = (), uncomputed: int = 0, running: int = 0
) -> ReplicaReport:
    return ReplicaReport(
        sequence=sequence,
        block_size=BLOCK,
        running=running,
        waiting=0,
        uncomputed_tokens=uncomputed,
        tokens_per_s=1000.0,
        hashes=pack_hashes(cached),
    )


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def balancer(clock: Clock) -> PrefixBalancer:
    return PrefixBalancer(clock)


def test_without_replicas_there_is_an_error(balancer: PrefixBalancer) -> None:
    with pytest.raises(LookupError):
        balancer.choose()


def test_a_prompt_goes_where_its_blocks_are(balancer: PrefixBalancer) -> None:
    prompt = blocks("p", 10)
    balancer.update({"a": report(), "b": report(cached=prompt[:6]), "c": report(cached=prompt[:3])})
    assert balancer.choose(RoutedPrompt(prompt, 160, BLOCK)) == "b"


def test_blocks_count_only_as_a_prefix(balancer: PrefixBalancer) -> None:
    prompt = blocks("p", 10)
    balancer.update({"a": report(cached=prompt[1:]), "b": report(cached=prompt[:2])})
    assert balancer.choose(RoutedPrompt(prompt, 160, BLOCK)) == "b"


def test_blocks_are_found_by_who_does_not_know_their_owner(balancer: PrefixBalancer) -> None:
    hasher, tokens = BlockHasher(BLOCK, b"key"), list(range(160))
    prompt: list[bytes] = []
    hasher.extend(prompt, tokens)
    cached: dict[str, list[bytes]] = {}
    for owner, num_tokens in (("acme", 96), ("globex", 48)):
        hasher.extend(cached.setdefault(owner, []), tokens[:num_tokens], owner=owner)
    both = report(cached=cached["acme"] + cached["globex"])
    assert len(both.hashes) == 6 * HASH_BYTES  # the blocks of both are one there
    balancer.update({"a": report(), "b": both, "c": report(cached=cached["globex"])})
    assert balancer.choose(RoutedPrompt([short(h) for h in prompt], 160, BLOCK)) == "b"


def hits(isolate: bool) -> list[int]:
    """Blocks that each prompt of six tenants, with long beginnings of their own, finds cached."""
    clock, draw, hasher = Clock(), random.Random(0), BlockHasher(BLOCK, b"key")
    balancer, found = PrefixBalancer(clock), []
    pools = {name: BlockPool(400) for name in "abc"}
    changes: dict[str, list[tuple[bytes, bool]]] = {name: [] for name in pools}
    for name, pool in pools.items():
        pool.changes = changes[name]
    for sequence in range(60):
        tenant = draw.randrange(6)
        tokens = [tenant] * 96 + [draw.randrange(1000) for _ in range(64)]
        plain: list[bytes] = []
        hasher.extend(plain, tokens)
        names: list[bytes] = []
        hasher.extend(names, tokens, owner=f"tenant {tenant}" if isolate else "")
        reports = {}
        for name, changed in changes.items():
            cached = [block for block, is_cached in dict(changed).items() if is_cached]
            # Less of a difference than the blocks to find make.
            reports[name] = report(sequence, cached, uncomputed=draw.randrange(96))
        balancer.update(reports)
        pool = pools[balancer.choose(RoutedPrompt([short(h) for h in plain], len(tokens), BLOCK))]
        table = pool.lookup(names)
        found.append(len(table))
        pool.hold(table)
        table += pool.allocate(len(names) - len(table))
        for block, name in zip(table, names, strict=True):
            pool.publish(block, name)
        pool.free(table)
        clock.now += 1.0
    return found


def test_tenants_apart_find_as_much_as_if_they_were_not() -> None:
    together = hits(isolate=False)
    assert sum(together) == 6 * (60 - 6)  # all but the first of each tenant
    assert hits(isolate=True) == together


def test_engines_and_routers_have_one_key() -> None:
    args = AppArgs()
    received = pickle.loads(pickle.dumps(args.model_copy(update={"device": "cpu"})))
    assert received.block_key == received.engine_config.block_key == args.block_key


def test_load_outweighs_a_prefix_that_saves_less(balancer: PrefixBalancer) -> None:
    prompt = blocks("p", 10)
    busy = report(cached=prompt, uncomputed=1000)
    balancer.update({"busy": busy, "idle": report()})
    assert balancer.choose(RoutedPrompt(prompt, 160, BLOCK)) == "idle"


def test_a_prefix_outweighs_less_load_than_it_saves(balancer: PrefixBalancer) -> None:
    prompt = blocks("p", 100)
    busy = report(cached=prompt, running=10)
    assert 10 * RUNNING_COST_TOKENS < 1600
    balancer.update({"busy": busy, "idle": report()})
    assert balancer.choose(RoutedPrompt(prompt, 1600, BLOCK)) == "busy"


def test_what_was_just_sent_counts_before_it_is_reported(
    balancer: PrefixBalancer, clock: Clock
) -> None:
    prompt = blocks("p", 100)
    balancer.update({"a": report(), "b": report()})
    first = balancer.choose(RoutedPrompt(prompt, 1600, BLOCK))
    clock.now += 2.0  # by then the replica has worked it off
    assert balancer.choose(RoutedPrompt(prompt, 1600, BLOCK)) == first
    # The next report may have been made before the blocks were computed, the one after not.
    balancer.update({"a": report(2), "b": report(2)})
    clock.now += 2.0
    assert balancer.choose(RoutedPrompt(prompt, 1600, BLOCK)) == first
    balancer.update({"a": report(3), "b": report(3)})
    balancer.update({"a": report(4), "b": report(4)})
    balancer.update({first: report(5, uncomputed=1), ("b" if first == "a" else "a"): report(5)})
    clock.now += 0.0
    assert balancer.choose(RoutedPrompt(prompt, 1600, BLOCK)) != first


def test_a_burst_of_different_prompts_spreads_evenly(balancer: PrefixBalancer) -> None:
    balancer.update({name: report() for name in "abcd"})
    chosen = [balancer.choose(RoutedPrompt(blocks(f"p{i}", 10), 160, BLOCK)) for i in range(40)]
    assert sorted(chosen.count(name) for name in "abcd") == [10, 10, 10, 10]


def test_without_prompts_requests_spread_evenly(balancer: PrefixBalancer) -> None:
    balancer.update({name: report() for name in "abc"})
    chosen = [balancer.choose() for _ in range(30)]
    assert sorted(chosen.count(name) for name in "abc") == [10, 10, 10]


def test_a_session_stays_until_its_replica_is_overloaded(balancer: PrefixBalancer) -> None:
    balancer.update({name: report() for name in "abc"})
    home = balancer.choose(session="s")
    assert all(balancer.choose(session="s") == home for _ in range(20))
    loads = {name: report(2, uncomputed=100_000 if name == home else 0) for name in "abc"}
    balancer.update(loads)
    assert balancer.choose(session="s") != home


def test_routers_that_never_met_agree_on_a_sessions_replica(clock: Clock) -> None:
    routers = [PrefixBalancer(clock) for _ in range(2)]
    for router in routers:
        router.update({name: report() for name in "abcde"})
    for i in range(20):
        first, second = (router.choose(session=f"s{i}") for router in routers)
        assert first == second


def test_sessions_spread_over_replicas(balancer: PrefixBalancer, clock: Clock) -> None:
    balancer.update({name: report() for name in "abc"})
    homes = set()
    for i in range(20):
        homes.add(balancer.choose(session=f"s{i}"))
        clock.now += 1.0
    assert homes == set("abc")


def test_a_replica_that_is_gone_gets_nothing(balancer: PrefixBalancer) -> None:
    prompt = blocks("p", 10)
    balancer.update({"a": report(cached=prompt), "b": report()})
    assert balancer.choose(RoutedPrompt(prompt, 160, BLOCK)) == "a"
    balancer.update({"b": report()})
    assert balancer.choose(RoutedPrompt(prompt, 160, BLOCK)) == "b"


def test_a_new_replica_without_a_report_takes_part(balancer: PrefixBalancer) -> None:
    balancer.update({"old": report(uncomputed=5000), "new": None})
    assert balancer.choose(RoutedPrompt(blocks("p", 4), 64, BLOCK)) == "new"
