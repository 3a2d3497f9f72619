"""The routing policy alone, with a clock of the test's own."""

import asyncio
import pickle
from collections.abc import Mapping
from dataclasses import replace

import pytest

from deployments.args import AppArgs
from deployments.cached_blocks import HASH_BYTES, CachedBlocks, short
from deployments.front.engine_client import EngineClient
from deployments.replica_reports import ReplicaReports
from deployments.routing.balancer import (
    RUNNING_COST_TOKENS,
    PrefixBalancer,
    ReplicaReport,
    RoutedPrompt,
)
from engine.schedule.block_pool import BlockHasher
from engine.schedule.request import RequestLimits
from tests.deployments.routing_fleet import BLOCK, Clock, Fleet, report, tenants


def blocks(prompt: str, count: int) -> list[bytes]:
    """Stand-ins for the hashes of a prompt's first blocks."""
    return [short(f"{prompt}-{i}".encode().ljust(16)[:8] + bytes([i])) for i in range(count)]


class Balancer(PrefixBalancer):
    def update(self, reports: Mapping[str, ReplicaReport | None]) -> None:
        """The replicas that there are, with what they say."""
        self.keep(reports)
        for name, said in reports.items():
            assert said is None or self.take_report(name, said)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def balancer(clock: Clock) -> Balancer:
    return Balancer(clock)


def test_without_replicas_there_is_an_error(balancer: Balancer) -> None:
    with pytest.raises(LookupError):
        balancer.choose()


def test_a_prompt_goes_where_its_blocks_are(balancer: Balancer) -> None:
    prompt = blocks("p", 10)
    balancer.update({"a": report(), "b": report(cached=prompt[:6]), "c": report(cached=prompt[:3])})
    assert balancer.choose(RoutedPrompt(prompt, 160, BLOCK)) == "b"


def test_prompts_whose_end_is_not_known_stay_with_their_beginning(balancer: Balancer) -> None:
    """Each is 16 times what is known of it, and not taken for so much work where that is cached."""
    known = blocks("p", 10)
    balancer.update({"a": report(), "b": report(cached=known), "c": report()})
    cut = RoutedPrompt(known, 16 * 160, 16 * BLOCK)
    assert [balancer.choose(cut) for _ in range(4)] == ["b"] * 4


def test_blocks_count_only_as_a_prefix(balancer: Balancer) -> None:
    prompt = blocks("p", 10)
    balancer.update({"a": report(cached=prompt[1:]), "b": report(cached=prompt[:2])})
    assert balancer.choose(RoutedPrompt(prompt, 160, BLOCK)) == "b"


def test_blocks_are_found_by_who_does_not_know_their_owner(balancer: Balancer) -> None:
    hasher, tokens = BlockHasher(BLOCK, b"key"), list(range(160))
    prompt: list[bytes] = []
    hasher.extend(prompt, tokens)
    cached: dict[str, list[bytes]] = {}
    for owner, num_tokens in (("acme", 96), ("globex", 48)):
        hasher.extend(cached.setdefault(owner, []), tokens[:num_tokens], owner=owner)
    of_both = CachedBlocks()
    for block in cached["acme"] + cached["globex"]:
        of_both.note(block, True)
    both = replace(report(), come=of_both.names())
    assert len(both.come) == 6 * HASH_BYTES  # the blocks of both are one there
    balancer.update({"a": report(), "b": both, "c": report(cached=cached["globex"])})
    assert balancer.choose(RoutedPrompt([short(h) for h in prompt], 160, BLOCK)) == "b"


def test_tenants_apart_find_as_much_as_if_they_were_not() -> None:
    together = Fleet(replicas=3, num_blocks=400)
    together.serve(tenants(60, 6))
    assert together.num_hits == together.num_oracle_hits == 6 * (60 - 6)
    apart = Fleet(replicas=3, num_blocks=400, isolate=True)
    apart.serve(tenants(60, 6))
    assert apart.num_hits == together.num_hits


def test_routers_that_tell_each_other_find_as_much_as_one() -> None:
    """Requests of a new tenant come in bursts, faster than reports, to either of two routers."""
    fleet = Fleet(replicas=4, num_blocks=400, routers=2, seconds_between=0.25)
    fleet.serve(tenant for tenant in range(20) for _ in range(8))
    assert fleet.num_hits == fleet.num_oracle_hits == 6 * 20 * 7


@pytest.mark.parametrize("skew", [0.0, 0.5, 1.0, 1.5])
def test_tenants_find_their_blocks_however_unequal_they_are(skew: float) -> None:
    """Their beginnings fill two thirds of the caches; a fixed home for each would overflow some."""
    fleet = Fleet(replicas=4, num_blocks=44, loads=1)
    fleet.serve(tenants(1000, 20, skew))
    assert fleet.num_hits >= 0.95 * fleet.num_oracle_hits


def test_reports_tell_what_has_changed() -> None:
    client = EngineClient()
    client.limits = RequestLimits(1000, 1000, 50_000, BLOCK)
    client.stats = {"running": 1, "waiting": 0, "uncomputed_tokens": 0, "tokens_per_s": 1000.0}
    reports, balancer = ReplicaReports(client), PrefixBalancer()

    def note(first: int, last: int, is_cached: bool) -> None:
        for i in range(first, last):
            client.cached_blocks.note(i.to_bytes(16, "little"), is_cached)

    def told() -> int:
        """Bytes of names in the next report, which is understood."""
        report = reports.changes()
        assert report is not None and balancer.take_report("a", report)
        return len(report.come) + len(report.gone)

    note(0, 30_000, True)  # about a million tokens
    assert told() == 30_000 * HASH_BYTES
    assert told() == 0
    note(30_000, 30_010, True)
    note(0, 5, False)
    note(5, 10, False)
    note(5, 10, True)
    reports.load()  # which Serve asks for, in between
    assert told() == 15 * HASH_BYTES
    balancer.keep("ab")
    hashes = [short(i.to_bytes(16, "little")) for i in range(5, 30_010)]
    assert balancer.choose(RoutedPrompt(hashes, 30_005 * BLOCK, BLOCK)) == "a"
    # A router that has missed one says so, and what comes next is all there is.
    missed = reports.changes()
    assert missed is not None
    late = reports.changes()
    assert late is not None and not balancer.take_report("a", late)


def test_all_is_told_anew_to_who_did_not_understand() -> None:
    client = EngineClient()
    client.limits = RequestLimits(1000, 1000, 100, BLOCK)
    client.stats = {"running": 1, "waiting": 0, "uncomputed_tokens": 0, "tokens_per_s": 1000.0}
    client.cached_blocks.note(b"0123456789abcdef", True)
    reports, balancers = ReplicaReports(client), [PrefixBalancer(), PrefixBalancer()]
    there = balancers[:1]  # the other one starts later
    sent: list[ReplicaReport] = []

    async def send(report: ReplicaReport) -> list[bool]:
        sent.append(report)
        return [balancer.take_report("a", report) for balancer in there]

    async def run() -> None:
        await reports.send(send)
        await reports.send(send)
        there.append(balancers[1])
        await reports.send(send)
        await reports.send(send)
        client.cached_blocks = CachedBlocks()  # of a new engine
        await reports.send(send)

    asyncio.run(run())
    assert [len(report.come) for report in sent] == [HASH_BYTES, 0, 0, HASH_BYTES, 0]
    assert [report.follows is None for report in sent] == [True, False, False, True, True]


def test_engines_and_routers_have_one_key() -> None:
    args = AppArgs()
    received = pickle.loads(pickle.dumps(args.model_copy(update={"device": "cpu"})))
    assert received.block_key == received.engine_config.block_key == args.block_key


def test_load_outweighs_a_prefix_that_saves_less(balancer: Balancer) -> None:
    prompt = blocks("p", 10)
    busy = report(cached=prompt, uncomputed=1000)
    balancer.update({"busy": busy, "idle": report()})
    assert balancer.choose(RoutedPrompt(prompt, 160, BLOCK)) == "idle"


def test_a_prefix_outweighs_less_load_than_it_saves(balancer: Balancer) -> None:
    prompt = blocks("p", 100)
    busy = report(cached=prompt, running=10)
    assert 10 * RUNNING_COST_TOKENS < 1600
    balancer.update({"busy": busy, "idle": report()})
    assert balancer.choose(RoutedPrompt(prompt, 1600, BLOCK)) == "busy"


def test_what_was_just_sent_counts_before_it_is_reported(balancer: Balancer, clock: Clock) -> None:
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


def test_a_burst_of_different_prompts_spreads_evenly(balancer: Balancer) -> None:
    balancer.update({name: report() for name in "abcd"})
    chosen = [balancer.choose(RoutedPrompt(blocks(f"p{i}", 10), 160, BLOCK)) for i in range(40)]
    assert sorted(chosen.count(name) for name in "abcd") == [10, 10, 10, 10]


def test_without_prompts_requests_spread_evenly(balancer: Balancer) -> None:
    balancer.update({name: report() for name in "abc"})
    chosen = [balancer.choose() for _ in range(30)]
    assert sorted(chosen.count(name) for name in "abc") == [10, 10, 10]


def test_a_session_stays_until_its_replica_is_overloaded(balancer: Balancer) -> None:
    balancer.update({name: report() for name in "abc"})
    home = balancer.choose(session="s")
    assert all(balancer.choose(session="s") == home for _ in range(20))
    loads = {name: report(2, uncomputed=100_000 if name == home else 0) for name in "abc"}
    balancer.update(loads)
    assert balancer.choose(session="s") != home


def test_routers_that_never_met_agree_on_a_sessions_replica(clock: Clock) -> None:
    routers = [Balancer(clock) for _ in range(2)]
    for router in routers:
        router.update({name: report() for name in "abcde"})
    for i in range(20):
        first, second = (router.choose(session=f"s{i}") for router in routers)
        assert first == second


def test_sessions_spread_over_replicas(balancer: Balancer, clock: Clock) -> None:
    balancer.update({name: report() for name in "abc"})
    homes = set()
    for i in range(20):
        homes.add(balancer.choose(session=f"s{i}"))
        clock.now += 1.0
    assert homes == set("abc")


def test_a_replica_that_is_gone_gets_nothing(balancer: Balancer) -> None:
    prompt = blocks("p", 10)
    balancer.update({"a": report(cached=prompt), "b": report()})
    assert balancer.choose(RoutedPrompt(prompt, 160, BLOCK)) == "a"
    balancer.update({"b": report()})
    assert balancer.choose(RoutedPrompt(prompt, 160, BLOCK)) == "b"


def test_a_new_replica_without_a_report_takes_part(balancer: Balancer) -> None:
    balancer.update({"old": report(uncomputed=5000), "new": None})
    assert balancer.choose(RoutedPrompt(blocks("p", 4), 64, BLOCK)) == "new"
