"""The front's client and engines that die: what one request does costs the others nothing."""

import asyncio
import random
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.api import build_api
from deployments.args import AppArgs
from deployments.front.arrivals import Arrivals
from deployments.front.engine_client import (
    EngineClient,
    EngineUnavailableError,
    RequestFailedError,
)
from deployments.front.front import Front
from deployments.front.quarantine import MAX_DEATHS, Quarantine
from deployments.front.request_options import RequestOptions
from deployments.observe.request_record import RequestRecord
from deployments.shards.engine_loop import EngineLoop
from deployments.wire import decode_request, encode_delta, pack, read_message
from engine.engine import Engine
from engine.sampling_params import SamplingParams
from engine.schedule.request import Request
from engine.schedule.step import StepPlan, TokenDelta

LIMITS = {"vocab_size": 1000, "max_model_len": 1000, "num_blocks": 100, "block_size": 16}
POISON = 666


@dataclass
class FakeEngine:
    """A request's tokens are 0, 1, 2, …; what it has been given is at hand."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    requests: dict[str, Request] = field(default_factory=dict)

    @classmethod
    async def connect(cls, client: EngineClient) -> "FakeEngine":
        address = await client.listen()
        engine = cls(*await asyncio.open_unix_connection(address))
        engine.writer.write(pack({"hello": {"limits": LIMITS}}))
        await client.wait_connected()
        return engine

    async def receive(self) -> list[Request]:
        """The requests that the next message with any adds."""
        added: list[Request] = []
        while not added:
            message = await asyncio.wait_for(read_message(self.reader), 10)
            added = [decode_request(packed) for _, packed in message["add"]]
            self.requests |= {request.id: request for request in added}
            for request_id in message["abort"]:
                self.requests.pop(request_id, None)
        return added

    def step(self, **errors: str) -> None:
        """A token for everybody."""
        deltas = []
        for request in list(self.requests.values()):
            request.output_token_ids.append(len(request.output_token_ids))
            is_over = len(request.output_token_ids) == request.params.max_tokens
            deltas.append(
                (request.id, request.output_token_ids[-1:], "length" if is_over else None, None, 0)
            )
            if is_over:
                del self.requests[request.id]
        message = {"deltas": deltas, "errors": list(errors.items()), "stats": {}, "cache": []}
        self.writer.write(pack(message))

    async def die(self, client: EngineClient) -> None:
        self.writer.close()
        while client.is_connected:
            await asyncio.sleep(0)


async def complete(client: EngineClient, prompt: list[int], **params: Any) -> list[int]:
    sampling, record = SamplingParams(**params), RequestRecord(len(prompt), None)
    return [
        t async for delta in generate(client, prompt, sampling, record) for t in delta.token_ids
    ]


async def generate(
    client: EngineClient, prompt: list[int], params: SamplingParams, record: RequestRecord
) -> AsyncGenerator[TokenDelta]:
    arrivals = Arrivals()
    live = client.start(prompt, params, 0, RequestOptions(), record, arrivals)
    try:
        while True:
            for delta in (await arrivals.take()).values():
                yield delta
                if delta.finish_reason is not None:
                    return
    finally:
        client.leave(live)


def run(test: Callable[[EngineClient], Coroutine[Any, Any, None]]) -> None:
    async def whole() -> None:
        client = EngineClient()
        try:
            await test(client)
        finally:
            await client.close()

    asyncio.run(asyncio.wait_for(whole(), 60))


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_what_engines_before_have_counted_of_a_request_is_kept() -> None:
    """A prompt is found cached once, by the first engine; predictions come true in each of them."""
    record = RequestRecord(3, None)

    async def test(client: EngineClient) -> None:
        async def whole() -> None:
            async for _ in generate(client, [1, 2, 3], SamplingParams(max_tokens=9), record):
                pass

        async def bring(cached: int, predicted: tuple[int, int], reason: str | None = None) -> None:
            (request_id,) = engine.requests
            delta = TokenDelta(request_id, [5], cached, reason, num_predicted=predicted)
            message = {"deltas": [encode_delta(delta)], "errors": [], "stats": {}, "cache": []}
            engine.writer.write(pack(message))
            num_before = record.num_output
            while record.num_output == num_before:
                await asyncio.sleep(0)

        engine = await FakeEngine.connect(client)
        task = asyncio.create_task(whole())
        await engine.receive()
        await bring(2, (0, 0))
        await bring(2, (4, 1))
        assert (record.num_cached, record.num_predicted) == (2, (4, 1))
        await engine.die(client)
        engine = await FakeEngine.connect(client)
        (request,) = await engine.receive()
        assert request.output_token_ids == [5, 5]
        await bring(0, (3, 0))
        await bring(0, (5, 2), "length")
        await task
        assert (record.num_cached, record.num_predicted) == (2, (9, 3))

    run(test)


def test_what_cannot_be_packed_fails_its_own_request() -> None:
    """10**30 is a number that msgpack cannot pack."""

    async def test(client: EngineClient) -> None:
        before = [asyncio.create_task(complete(client, [i], max_tokens=2)) for i in range(3)]
        await settle()
        with pytest.raises(OverflowError):
            await complete(client, [10**30])
        engine = await FakeEngine.connect(client)
        assert [r.prompt_token_ids for r in await engine.receive()] == [[0], [1], [2]]
        # The same with an engine there: all come in one turn of the event loop.
        tasks = [asyncio.create_task(complete(client, [i], max_tokens=2)) for i in (7, 10**30, 8)]
        await settle()
        with pytest.raises(OverflowError):
            await tasks[1]
        assert [r.prompt_token_ids for r in await engine.receive()] == [[7], [8]]
        for _ in range(2):
            engine.step()
        assert await asyncio.gather(*before, tasks[0], tasks[2]) == [[0, 1]] * 5

    run(test)


def test_parameters_arrive_as_they_are_and_are_not_checked_again() -> None:
    schema = {"type": "number", "minimum": 10**30}

    async def test(client: EngineClient) -> None:
        engine = await FakeEngine.connect(client)
        params = SamplingParams(structured_outputs={"json": schema}, logit_bias={5: 1.5}, stop="a")
        refused = params.model_copy(update={"temperature": -1.0})
        for sent in (params, refused):
            task = asyncio.create_task(anext(generate(client, [1], sent, RequestRecord(1, None))))
            (request,) = await engine.receive()
            assert request.params == sent
            task.cancel()
            await settle()

    run(test)


def test_nothing_is_left_of_the_socket_once_the_engine_has_come() -> None:
    async def test(client: EngineClient) -> None:
        address = Path(await client.listen())
        assert address.exists() and address.parent.stat().st_mode & 0o777 == 0o700
        again = Path(await client.listen())
        assert again.exists() and not address.parent.exists()
        engine = await FakeEngine.connect(client)
        assert not again.parent.exists()
        await engine.die(client)

    run(test)


class Ward:
    """Starts an engine after the other; one dies on being given the poison, or at its nth token."""

    def __init__(self, client: EngineClient, dies_at: int) -> None:
        self.client = client
        self.num_engines = 0
        self._dies_at = dies_at

    async def supervise(self) -> None:
        while True:
            self.num_engines += 1
            await self._serve(await FakeEngine.connect(self.client))

    async def _serve(self, engine: FakeEngine) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(0.002):
                    await engine.receive()
            poison = [r for r in engine.requests.values() if POISON in r.prompt_token_ids]
            if any(len(r.output_token_ids) == self._dies_at for r in poison):
                return await engine.die(self.client)
            engine.step()


@pytest.mark.parametrize(("dies_at", "num_engines"), [(0, 1 + MAX_DEATHS), (3, 2 + MAX_DEATHS)])
def test_a_request_that_kills_engines_ends_alone(dies_at: int, num_engines: int) -> None:
    """At once, or when it has had 3 tokens: then its first engine has not put it in doubt."""

    async def test(client: EngineClient) -> None:
        ward = Ward(client, dies_at)
        supervisor = asyncio.create_task(ward.supervise())
        await client.wait_connected()
        prompts = [[i] for i in range(20)]
        tasks = [asyncio.create_task(complete(client, p, max_tokens=30)) for p in prompts]
        poison = asyncio.create_task(complete(client, [POISON], max_tokens=30))
        with pytest.raises(RequestFailedError, match=f"failed {MAX_DEATHS} times in a row"):
            await poison
        late = asyncio.create_task(complete(client, [1], max_tokens=30))
        assert await asyncio.gather(*tasks, late) == [list(range(30))] * 21
        assert ward.num_engines == num_engines
        assert client.num_blamed == MAX_DEATHS - 1
        assert client.num_live == client.queue.taken == 0
        supervisor.cancel()

    run(test)


@pytest.mark.parametrize("seed", range(5))
def test_engines_that_are_killed_at_random_end_nobody(seed: int) -> None:
    """Requests come all the time, and an engine lives for less than they take."""
    draw = random.Random(seed)

    async def test(client: EngineClient) -> None:
        async def kill() -> None:
            while True:
                engine = await FakeEngine.connect(client)
                for _ in range(draw.randint(8, 20)):
                    with suppress(TimeoutError):
                        async with asyncio.timeout(0.002):
                            await engine.receive()
                    engine.step()
                    await settle()
                await engine.die(client)

        killer = asyncio.create_task(kill())
        tasks = []
        for i in range(60):
            tasks.append(asyncio.create_task(complete(client, [i], max_tokens=20)))
            await asyncio.sleep(draw.uniform(0, 0.005))
        assert await asyncio.gather(*tasks) == [list(range(20))] * 60
        killer.cancel()

    run(test)


def test_suspects_go_one_at_a_time_and_newcomers_wait_for_them() -> None:
    async def test(client: EngineClient) -> None:
        first = await FakeEngine.connect(client)
        old = asyncio.create_task(complete(client, [1], max_tokens=9))
        await first.receive()
        first.step()
        await settle()
        suspects = [asyncio.create_task(complete(client, [i], max_tokens=9)) for i in (2, 3, 4)]
        await first.receive()
        await first.die(client)
        second = await FakeEngine.connect(client)
        assert [r.prompt_token_ids for r in await second.receive()] == [[1]]
        new = asyncio.create_task(complete(client, [5], max_tokens=9))
        await settle()
        second.step()  # for [1] alone: now nobody is in doubt but the suspects
        order = []
        for _ in range(2):
            order += [r.prompt_token_ids for r in await second.receive()]
            second.step()
        order += [r.prompt_token_ids for r in await second.receive()]
        assert order == [[2], [3], [4]]
        suspects.pop().cancel()  # its turn has come, but no token: who is gone is no suspect
        assert [r.prompt_token_ids for r in await second.receive()] == [[5]]
        assert sorted(r.prompt_token_ids for r in second.requests.values()) == [[1], [2], [3], [5]]
        for _ in range(9):
            second.step()
        assert await asyncio.gather(old, *suspects, new) == [list(range(9))] * 4

    run(test)


def test_a_newcomer_is_no_suspect_before_an_engine_has_died_under_it_twice() -> None:
    """Once, alone with the engine, is counted as any death; then it is laid to the request."""
    quarantine = Quarantine()
    quarantine.add("a")
    assert quarantine.take() == ["a"]
    assert quarantine.blame() is None
    for is_guilty in (False, True):
        quarantine.restart(["a"])
        assert quarantine.take() == ["a"]
        assert quarantine.blame() == "a"
        assert quarantine.is_guilty("a") == is_guilty
    quarantine.remove("a")
    quarantine.add("a")
    quarantine.take()
    assert quarantine.blame() is None


ARGS = AppArgs(model="manta-demo", dtype="float32", device="cpu", num_threads=1, num_blocks=200)


def faulty_engine() -> Engine:
    """Fails as a device would: in the step in which the poison enters."""
    engine = Engine(ARGS.engine_config)
    launch = engine.runner.launch

    def fail(plan: StepPlan) -> Any:
        if any(new.token_ids.count(5) > 10 for new in plan.new_rows):
            raise RuntimeError("injected fault")
        return launch(plan)

    engine.runner.launch = fail  # type: ignore[method-assign]
    return engine


def body(i: int) -> dict[str, Any]:
    return {"prompt": f"{i} one two", "max_tokens": 40, "seed": i, "ignore_eos": True}


async def serve_and_ask(
    bodies: list[dict[str, Any]], new_engine: Callable[[], Engine]
) -> tuple[list[httpx.Response], int]:
    """The answers, and how many engines they took."""
    front = Front(ARGS)
    num_engines = 0

    async def supervise() -> None:
        nonlocal num_engines
        while True:
            address = await front.client.listen()
            engine = await asyncio.to_thread(new_engine)
            num_engines += 1
            with suppress(RuntimeError):
                await asyncio.to_thread(EngineLoop(engine, address).run)

    supervisor = asyncio.create_task(supervise())
    await front.client.wait_connected()
    transport = httpx.ASGITransport(build_api(front, ARGS))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        asked = [http.post("/v1/completions", json=body, timeout=60) for body in bodies]
        answers = await asyncio.gather(*asked)
    supervisor.cancel()
    await front.client.close()
    return answers, num_engines


def test_a_real_engine_that_a_request_kills() -> None:
    honest = [body(i) for i in range(8)]
    undisturbed, one = asyncio.run(serve_and_ask(honest, lambda: Engine(ARGS.engine_config)))
    assert one == 1
    poison = {"prompt": [5] * 11, "max_tokens": 4}
    (*answers, killer), num_engines = asyncio.run(serve_and_ask([*honest, poison], faulty_engine))
    assert killer.status_code == 500
    assert killer.json()["error"]["code"] == "engine_failed"
    assert killer.headers["x-should-retry"] == "false"
    assert [a.json()["choices"] for a in answers] == [a.json()["choices"] for a in undisturbed]
    assert num_engines == 1 + MAX_DEATHS


def test_what_is_raised_while_a_request_is_taken_in_fails_it_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    add = Engine.add

    def fail(engine: Engine, request: Request) -> None:
        if len(request.prompt_token_ids) == 3:
            raise KeyError("a fault of ours")
        add(engine, request)

    monkeypatch.setattr(Engine, "add", fail)
    bodies = [{"prompt": [5] * length, "max_tokens": 2} for length in (2, 3, 4)]
    answers, num_engines = asyncio.run(serve_and_ask(bodies, lambda: Engine(ARGS.engine_config)))
    assert [answer.status_code for answer in answers] == [200, 500, 200]
    assert num_engines == 1


def test_an_order_that_dies_with_its_engine_may_be_given_again() -> None:
    async def test(client: EngineClient) -> None:
        engine = await FakeEngine.connect(client)
        ordered = asyncio.create_task(client.order("sleep"))
        while (await read_message(engine.reader)).get("order") != ["sleep"]:
            pass
        await engine.die(client)
        with pytest.raises(EngineUnavailableError, match="gone"):
            await ordered

    run(test)
