"""Files and batches, with the real `openai` client."""

import asyncio
import io
import json
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest

from deployments.batch.rows import Answer, Row
from deployments.batch.storage import Location
from deployments.files import batches
from deployments.files.batches import BatchRunner
from deployments.files.store import FileStore
from deployments.front.engine_client import EngineAsleepError
from tests.deployments.conftest import wait_until
from tests.deployments.local_server import LocalServer, serve_locally

CHAT = "/v1/chat/completions"
OPTIONS: dict[str, Any] = {
    **{"max_model_len": 256, "num_blocks": 256, "max_num_seqs": 16, "request_log": "off"}
}


def line(number: int, **body: Any) -> dict[str, Any]:
    words = ["apple", "river", "stone", "sea"]
    message = {"role": "user", "content": f"Repeat these words: {words[number % 4]}"}
    base = {"model": "manta-demo", "messages": [message], "temperature": 0}
    return {"custom_id": f"row-{number}", "method": "POST", "url": CHAT, "body": base | body}


def jsonl(*lines: Any) -> bytes:
    return "".join(f"{json.dumps(one)}\n" for one in lines).encode()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    directory = tmp_path_factory.mktemp("files")
    with serve_locally(files_directory=str(directory), **OPTIONS) as server:
        yield server


def run_batch(client: openai.OpenAI, content: bytes, **options: Any) -> Any:
    """The batch once it has ended."""
    file = client.files.create(file=("in.jsonl", io.BytesIO(content)), purpose="batch")
    batch = client.batches.create(
        **({"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"} | options)
    )

    def has_ended() -> bool:
        return client.batches.retrieve(batch.id).status not in ("validating", "in_progress")

    wait_until(has_ended, what="the batch ends")
    return client.batches.retrieve(batch.id)


def lines_of(client: openai.OpenAI, file_id: str | None) -> dict[str, Any]:
    assert file_id is not None
    lines = map(json.loads, client.files.content(file_id).text.splitlines())
    return {one["custom_id"]: one for one in lines}


def test_a_file_is_kept_as_it_was_sent(server: LocalServer) -> None:
    content = bytes(range(256)) * 8000  # more than a piece
    with server.client() as client:
        file = client.files.create(file=("../../evil\n.bin", content), purpose="user_data")
        assert (file.bytes, file.purpose, file.status) == (len(content), "user_data", "processed")
        assert client.files.content(file.id).content == content
        assert client.files.retrieve(file.id) == file
        assert file.id in {one.id for one in client.files.list(purpose="user_data")}
        assert not list(client.files.list(purpose="batch_output"))
        other = client.files.create(file=("other", b"{}"), purpose="user_data")
        with pytest.raises(openai.BadRequestError, match="greater than or equal to 1") as refused:
            client.files.list(limit=-3)
        assert refused.value.param == "limit"
        oldest, newest = (list(client.files.list(order=o, limit=1)) for o in ("asc", "desc"))
        assert {file.id, other.id} <= {one.id for one in newest}
        assert oldest == newest[::-1]
        assert client.files.delete(file.id).deleted
        with pytest.raises(openai.NotFoundError):
            client.files.content(file.id)


def test_a_batch_is_answered_line_by_line(server: LocalServer) -> None:
    wrong = line(7) | {"url": "/v1/completions", "body": {"prompt": "a"}}
    lines = [*map(line, range(5)), line(5, temperature=-1), line(6, stream=True), wrong, "no"]
    with server.client() as client:
        batch = run_batch(client, jsonl(*lines), metadata={"night": "1"})
        assert batch.status == "completed" and batch.metadata == {"night": "1"}
        counts = batch.request_counts
        assert (counts.total, counts.completed, counts.failed) == (9, 5, 4)
        output = lines_of(client, batch.output_file_id)
        assert list(output) == [f"row-{i}" for i in range(5)]
        bodies = [one["response"]["body"] for one in output.values()]
        said = [body["choices"][0]["message"]["content"].strip() for body in bodies]
        assert said == ["apple", "river", "stone", "sea", "apple"]
        errors = lines_of(client, batch.error_file_id)
        assert errors["row-5"]["response"]["status_code"] == 400
        assert errors["row-6"]["response"]["body"]["error"]["param"] == "stream"
        assert "endpoint" in errors["row-7"]["error"]["message"] and None in errors
        assert batch.id in {one.id for one in client.batches.list()}
    wait_until(server.is_idle)


def test_a_line_costs_no_more_than_a_body_may(tmp_path: Path) -> None:
    """It is no way around what a server takes at a time."""
    options = OPTIONS | {"files_directory": str(tmp_path), "max_request_bytes": 2**20}
    values = line(1, logit_bias={str(i): 0 for i in range(70_000)})
    large = line(2, user="x" * 2**20)
    with serve_locally(**options) as server, server.client() as client:
        batch = run_batch(client, jsonl(line(0), values, large))
        counts = batch.request_counts
        assert (counts.total, counts.completed, counts.failed) == (3, 1, 2)
        lines = map(json.loads, client.files.content(batch.error_file_id).text.splitlines())
        told = [one["error"] for one in lines]
    assert "too many values" in told[0]["message"]
    assert "max_request_bytes" in told[1]["message"]


def test_a_batch_without_requests_fails(server: LocalServer) -> None:
    with server.client() as client:
        batch = run_batch(client, b"\n\n")
    assert batch.status == "failed" and "no requests" in batch.errors.data[0].message


def test_a_batch_in_which_a_custom_id_comes_twice_fails(server: LocalServer) -> None:
    content = jsonl(line(0), line(1)) + b"\n" + jsonl("no", line(1), line(2), line(0))
    with server.client() as client:
        batch = run_batch(client, content)
    assert batch.status == "failed" and batch.output_file_id is None
    told = [(fault.code, fault.param, fault.line) for fault in batch.errors.data]
    assert told == [("duplicate_custom_id", "custom_id", number) for number in (5, 7)]
    assert "'row-1'" in batch.errors.data[0].message


def test_a_stopped_server_goes_on_and_does_nothing_twice(tmp_path: Path) -> None:
    lines = [line(i, max_tokens=3) for i in range(32 * 16)]
    place: dict[str, Any] = {"files_directory": str(tmp_path), **OPTIONS}
    with serve_locally(**place) as server, server.client() as client:
        file = client.files.create(file=("in.jsonl", jsonl(*lines)), purpose="batch")
        batch_id = client.batches.create(
            input_file_id=file.id, endpoint=CHAT, completion_window="24h"
        ).id
        wait_until(lambda: any(tmp_path.rglob("*.done")), what="a part is done")
    num_done = len(list(tmp_path.rglob("*.done")))
    assert 0 < num_done < 16, "of sixteen parts"
    with serve_locally(**place) as server, server.client() as client:
        wait_until(lambda: client.batches.retrieve(batch_id).status == "completed")
        num_rows = len(lines)
        assert sum(server.front.client.metrics.finished.values()) == num_rows - 32 * num_done
        batch = client.batches.retrieve(batch_id)
        assert batch.request_counts is not None and batch.request_counts.completed == num_rows
        assert len(lines_of(client, batch.output_file_id)) == num_rows


def test_what_a_killed_server_has_left_is_taken_over(tmp_path: Path) -> None:
    """Once nobody has been heard to work on it for a while, and not before."""
    store = FileStore(str(tmp_path))
    runner = BatchRunner(None, store)  # type: ignore[arg-type]
    base = {"object": "batch", "status": "in_progress", "created_at": 0}
    for name, held in (("a", ["other", time.time()]), ("b", ["other", time.time() - 100])):
        store.write("of-ann", {"id": f"batch-{name * 24}", "_runner": held, **base})
    store.write("of-ann", {"id": f"batch-{'c' * 24}", **base, "status": "completed"})
    assert runner._orphans() == [("of-ann", f"batch-{'b' * 24}")]


def test_what_has_been_kept_costs_a_look_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory is listed once, however much is in it, and what has ended is not read again."""
    store = FileStore(str(tmp_path))
    ids = {f"batch-{i:024}" for i in range(5)}
    for batch_id in ids:
        record = {"id": batch_id, "object": "batch", "created_at": 0, "status": "completed"}
        store.write("of-ann", record)
    listed, read, names, read_one = [], [], Location.names, FileStore.read

    def note_list(self: Location) -> set[str]:
        listed.append(self.path)
        return names(self)

    def note_read(self: FileStore, directory: str, kind: str, record_id: str) -> Any:
        read.append(record_id)
        return read_one(self, directory, kind, record_id)

    monkeypatch.setattr(Location, "names", note_list)
    monkeypatch.setattr(FileStore, "read", note_read)
    assert {record["id"] for record in store.all("of-ann", "batches")} == ids
    assert not store.is_cancelled("of-ann", min(ids))
    assert len(listed) == 1
    runner = BatchRunner(None, store)  # type: ignore[arg-type]
    for _ in range(3):
        assert runner._orphans() == []
    assert sorted(read) == sorted([*ids, *ids])


AT_ONCE = batches._PARTS_AT_ONCE * batches._ROWS_PER_PART


class Workshop:
    """A batch in a store, whose requests are answered when the test wants it."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_rows: int) -> None:
        self.store = FileStore(str(tmp_path))
        self.num_answered = 0
        self.go_on = asyncio.Event()
        file = self.store.put("of-ann", [jsonl(*map(line, range(num_rows)))], "in", "batch")
        self._id = f"batch-{'a' * 24}"
        self.tell(
            **{"id": self._id, "object": "batch", "endpoint": CHAT, "input_file_id": file["id"]},
            **{"created_at": 0, "expires_at": time.time() + 60, "status": "in_progress"},
            request_counts={"total": num_rows, "completed": 0, "failed": 0},
        )
        monkeypatch.setattr(batches, "answer", self._answer)

    async def _answer(self, *_: Any) -> Answer:
        self.num_answered += 1
        await self.go_on.wait()
        return Answer(200, {})

    @property
    def record(self) -> dict[str, Any]:
        return self.store.read("of-ann", "batches", self._id) or {}

    def tell(self, **fields: Any) -> None:
        self.store.write("of-ann", (self.record if "id" not in fields else {}) | fields)

    def runner(self) -> BatchRunner:
        front: Any = SimpleNamespace(has_priorities=False)
        return BatchRunner(front, self.store, retry_s=0.01)

    async def run(self) -> dict[str, Any]:
        """The record when a runner that has found the batch has done with it."""
        runner = self.runner()
        runner.start("of-ann", self._id)
        await asyncio.gather(*runner._tasks.values())
        return self.record


def test_a_batch_is_one_runners_however_long_a_part_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "_LEASE_S", 0.4)
    shop = Workshop(tmp_path, monkeypatch, num_rows=AT_ONCE + 1)

    async def run() -> None:
        other, working = shop.runner(), asyncio.create_task(shop.run())
        while not shop.num_answered:
            await asyncio.sleep(0.01)
        heard_at = shop.record["_runner"][1]
        while shop.record["_runner"][1] < heard_at + 2 * batches._LEASE_S:
            await asyncio.sleep(0.05)
        monkeypatch.setattr(batches, "_LEASE_S", 60.0)
        await other.cancel("of-ann", shop.record)  # asked of a replica that does not work on it
        assert not other._tasks
        shop.go_on.set()
        record = await working
        assert record["status"] == "cancelled" and record["request_counts"]["completed"] == AT_ONCE
        output = b"".join(shop.store.pieces("of-ann", record["output_file_id"]))
        assert len(output.splitlines()) == AT_ONCE

    asyncio.run(asyncio.wait_for(run(), 30))


def test_the_longest_answer_of_a_part_keeps_no_other_part_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = Workshop(tmp_path, monkeypatch, num_rows=2 * AT_ONCE)

    async def answer(front: Any, row: Row, *_: Any) -> Answer:
        shop.num_answered += row.custom_id != "row-0"
        if row.custom_id == "row-0":
            await shop.go_on.wait()
        return Answer(200, {})

    monkeypatch.setattr(batches, "answer", answer)

    async def run() -> None:
        working = asyncio.create_task(shop.run())
        while shop.num_answered < 2 * AT_ONCE - 1:
            await asyncio.sleep(0.01)
        shop.go_on.set()
        assert (await working)["request_counts"]["completed"] == 2 * AT_ONCE

    asyncio.run(asyncio.wait_for(run(), 30))


@pytest.mark.parametrize("ending", ["cancelled", "expired"])
def test_a_batch_ends_while_its_engine_sleeps(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = Workshop(tmp_path, monkeypatch, num_rows=1)

    async def answer(*_: Any) -> Answer:
        shop.num_answered += 1
        raise EngineAsleepError

    monkeypatch.setattr(batches, "answer", answer)

    async def run() -> None:
        working = asyncio.create_task(shop.run())
        while shop.num_answered < 2:
            await asyncio.sleep(0.01)
        if ending == "cancelled":
            shop.store.cancel("of-ann", shop.record["id"])
        else:
            monkeypatch.setattr(batches, "_is_late", lambda record: True)
        record = await working
        counts = {"total": 1, "completed": 0, "failed": 0}
        assert (record["status"], record["request_counts"]) == (ending, counts)

    asyncio.run(asyncio.wait_for(run(), 30))


def test_a_batch_is_its_runners_while_its_output_is_put_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "_LEASE_S", 0.4)
    shop = Workshop(tmp_path, monkeypatch, num_rows=1)
    shop.go_on.set()
    begun, may_end, put = threading.Event(), threading.Event(), FileStore.put

    def slow_put(*args: Any) -> Any:
        begun.set()
        may_end.wait(30)
        return put(*args)

    monkeypatch.setattr(FileStore, "put", slow_put)

    async def run() -> None:
        working = asyncio.create_task(shop.run())
        await asyncio.to_thread(begun.wait, 30)
        heard_at = shop.record["_runner"][1]
        while shop.record["_runner"][1] < heard_at + 2 * batches._LEASE_S:
            await asyncio.sleep(0.05)
        may_end.set()
        assert (await working)["status"] == "completed"

    try:
        asyncio.run(asyncio.wait_for(run(), 30))
    finally:
        may_end.set()


@pytest.mark.parametrize("name", [".output", ".done", "_error.jsonl"])
def test_what_storage_fails_at_is_done_again(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the rows one fails: there is a file of each kind."""
    shop = Workshop(tmp_path, monkeypatch, num_rows=33)
    failures, write, put = [OSError("no space left")], Location.write, FileStore.put

    async def answer(front: Any, row: Row, *_: Any) -> Answer:
        return Answer(400 if row.custom_id == "row-0" else 200, {})

    def fail_once(named: str) -> None:
        if failures and named.endswith(name):
            raise failures.pop()

    def write_or_fail(self: Location, named: str, content: bytes) -> None:
        fail_once(named)
        write(self, named, content)

    def put_or_fail(self: FileStore, directory: str, pieces: Any, named: str, why: str) -> Any:
        fail_once(named)
        return put(self, directory, pieces, named, why)

    monkeypatch.setattr(batches, "answer", answer)
    monkeypatch.setattr(Location, "write", write_or_fail)
    monkeypatch.setattr(FileStore, "put", put_or_fail)

    async def run() -> None:
        runner = shop.runner()
        looking = asyncio.create_task(runner.adopt_forever())
        while shop.record["status"] == "in_progress":
            await asyncio.sleep(0.01)
        looking.cancel()

    shop.tell(_runner=["", 0.0])
    monkeypatch.setattr(batches, "_LEASE_S", 0.1)
    asyncio.run(asyncio.wait_for(run(), 30))
    record = shop.record
    assert record["status"] == "completed" and not failures
    assert record["request_counts"] == {"total": 33, "completed": 32, "failed": 1}
    made = [f["id"] for f in shop.store.all("of-ann", "files") if f["purpose"] == "batch_output"]
    assert sorted(made) == sorted([record["output_file_id"], record["error_file_id"]])


def test_batches_are_looked_for_again_where_storage_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = Workshop(tmp_path, monkeypatch, num_rows=1)
    shop.go_on.set()
    monkeypatch.setattr(batches, "_LEASE_S", 0.1)
    failures, tenants = [OSError("gone for a while")], FileStore.tenants

    def tenants_or_fail(self: FileStore) -> list[str]:
        if failures:
            raise failures.pop()
        return tenants(self)

    monkeypatch.setattr(FileStore, "tenants", tenants_or_fail)

    async def run() -> None:
        looking = asyncio.create_task(shop.runner().adopt_forever())
        while shop.record["status"] != "completed":
            await asyncio.sleep(0.01)
        looking.cancel()

    asyncio.run(asyncio.wait_for(run(), 30))


def test_a_batch_whose_file_is_deleted_fails_with_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = Workshop(tmp_path, monkeypatch, num_rows=33)
    place = shop.store.place("of-ann", f"results/{shop.record['id']}")
    place.write("00000000.output", b"{}\n")
    place.write("00000000.done", b"0")
    shop.store.delete("of-ann", shop.record["input_file_id"])
    record = asyncio.run(shop.run())
    (fault,) = record["errors"]["data"]
    assert (record["status"], fault["param"]) == ("failed", "input_file_id")
    assert b"".join(shop.store.pieces("of-ann", record["output_file_id"])) == b"{}\n"


def test_who_is_thought_dead_leaves_the_batch_to_who_has_it_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = Workshop(tmp_path, monkeypatch, num_rows=AT_ONCE + 1)

    async def run() -> None:
        working = asyncio.create_task(shop.run())
        while shop.num_answered < AT_ONCE:
            await asyncio.sleep(0.01)
        shop.tell(_runner=["other", time.time()])
        shop.go_on.set()
        record = await working
        assert record["status"] == "in_progress" and record["_runner"][0] == "other"
        assert shop.num_answered == AT_ONCE  # of the parts that were on their way

    asyncio.run(asyncio.wait_for(run(), 30))


@pytest.mark.parametrize(
    ("done", "status", "completed"), [((0, 1), "completed", 30), ((0,), "expired", 29)]
)
def test_a_batch_is_what_is_done_of_it_wherever_its_runner_was_killed(
    done: tuple[int, ...],
    status: str,
    completed: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before it could tell how many answers it had written, say; and then it was too late."""
    shop = Workshop(tmp_path, monkeypatch, num_rows=33)
    for number in done:
        place = shop.store.place("of-ann", f"results/{shop.record['id']}")
        place.write(f"{number:08}.done", b"0" if number else b"3")
    shop.tell(expires_at=time.time() - 1)
    record = asyncio.run(shop.run())
    counts = {"total": 33, "completed": completed, "failed": 3}
    assert (record["status"], record["request_counts"]) == (status, counts)
    assert record[f"{status}_at"] and not shop.num_answered
    shop.tell(_runner=["", 0.0])
    assert asyncio.run(shop.run())["request_counts"] == counts  # what has ended is not begun again


def test_what_is_cancelled_keeps_what_is_done(server: LocalServer) -> None:
    lines = [line(i, max_tokens=30, ignore_eos=True) for i in range(300)]
    with server.client() as client:
        file = client.files.create(file=("in.jsonl", jsonl(*lines)), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
        assert client.batches.cancel(batch.id).status == "cancelling"
        wait_until(lambda: client.batches.retrieve(batch.id).status == "cancelled")
        counts = client.batches.retrieve(batch.id).request_counts
    assert counts is not None and counts.completed < 300


def test_names_lead_nowhere(server: LocalServer) -> None:
    for name in ("..%2f..%2fetc%2fpasswd", "file-..", "file-" + "0" * 24, "batch-" + "0" * 24):
        for path in (f"files/{name}", f"files/{name}/content", f"batches/{name}"):
            assert httpx.get(f"{server.url}/v1/{path}").status_code == 404
    with server.client() as client, pytest.raises(openai.BadRequestError) as refused:
        client.batches.create(input_file_id="../x", endpoint=CHAT, completion_window="24h")
    assert refused.value.param == "input_file_id"


def test_what_is_no_form_or_too_large_is_refused(tmp_path: Path) -> None:
    limit = 2**20
    with serve_locally(files_directory=str(tmp_path), max_file_bytes=limit, **OPTIONS) as server:
        url = f"{server.url}/v1/files"
        assert httpx.post(url, json={"purpose": "batch"}).status_code == 415
        file = {"file": ("a", b"a")}
        assert httpx.post(url, files=file).json()["error"]["param"] == "purpose"
        form = {"purpose": "batch"}
        page = httpx.post(url, files=file, data=form, headers={"Origin": "https://evil.example"})
        assert page.status_code == 403
        own = httpx.post(url, files=file, data=form, headers={"Origin": server.url})
        assert own.status_code == 200
        large = httpx.post(url, files={"file": ("a", b"a" * 2 * limit)}, data=form)
        assert (large.status_code, large.json()["error"]["code"]) == (413, "request_too_large")
        assert len(httpx.get(url).json()["data"]) == 1


def test_a_large_file_is_never_in_memory(tmp_path: Path) -> None:
    size = 100 * 2**20
    with serve_locally(files_directory=str(tmp_path), **OPTIONS) as server:
        tracemalloc.start()
        try:
            with open("/dev/zero", "rb") as zeros:
                content = io.BufferedReader(_Limited(zeros, size))
                file = {"file": ("zeros", content)}
                sent = httpx.post(
                    f"{server.url}/v1/files", files=file, data={"purpose": "batch"}, timeout=120
                )
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert sent.status_code == 200 and sent.json()["bytes"] == size
    assert peak < size / 4


class _Limited(io.RawIOBase):
    """The beginning of a file."""

    def __init__(self, file: Any, size: int) -> None:
        self._file = file
        self._left = size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self._file.read(min(len(buffer), self._left))
        buffer[: len(piece)] = piece
        self._left -= len(piece)
        return len(piece)


def test_what_is_anothers_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANTA_API_KEYS", "ann:one,bob:two")
    with serve_locally(files_directory=str(tmp_path), **OPTIONS) as server:
        ann, bob = (server.client(api_key=key) for key in ("one", "two"))
        with ann, bob:
            file = ann.files.create(file=("in", jsonl(line(0))), purpose="batch")
            assert not list(bob.files.list())
            for ask in (bob.files.retrieve, bob.files.content, bob.files.delete):
                with pytest.raises(openai.NotFoundError):
                    ask(file.id)
            with pytest.raises(openai.BadRequestError):
                bob.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
            assert [one.id for one in ann.files.list()] == [file.id]


def test_what_a_batch_has_cached_is_its_keys_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANTA_API_KEYS", "ann:one,bob:two")
    ask = line(0, messages=[{"role": "user", "content": "apple river stone " * 12}], max_tokens=1)
    cached = []
    with serve_locally(files_directory=str(tmp_path), **OPTIONS) as server:
        for key in ("one", "two", "two"):
            with server.client(api_key=key) as client:
                batch = run_batch(client, jsonl(ask))
                (answer,) = lines_of(client, batch.output_file_id).values()
            usage = answer["response"]["body"]["usage"]
            cached.append(usage["prompt_tokens_details"]["cached_tokens"])
        tokens = server.front.client.metrics.key_tokens
        assert cached[:2] == [0, 0] and cached[2] > 0
        assert tokens["bob", "prompt"] == 2 * tokens["ann", "prompt"] == 2 * usage["prompt_tokens"]
        assert tokens["bob", "cached"] == cached[2] and tokens["ann", "output"] == 1


def test_without_a_place_for_them_there_are_none(demo: LocalServer) -> None:
    with demo.client() as client, pytest.raises(openai.NotFoundError) as missing:
        client.files.create(file=("a", b"a"), purpose="batch")
    assert "files_directory" in missing.value.message
