"""Batches: the requests of a file, answered a few at a time, and again where a server was killed.

A batch is worked off in parts, each of which is written whole: whoever goes on with it does only
what is not there yet. Some parts are on their way at a time, for the end of one is its longest
answer alone. Their requests take turns with those of others as one client's, or come last
where the server has priorities.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from typing import Any, TypeVar

from deployments.api.errors import ApiError
from deployments.api.streaming import cancel_all
from deployments.batch.jsonl import JsonlFormat
from deployments.batch.rows import Answer, Row, answer, row_seed
from deployments.batch.storage import Location
from deployments.files.store import FileStore, Record
from deployments.front.engine_client import EngineUnavailableError
from deployments.front.front import Front
from engine.strict import shown

T = TypeVar("T")

WINDOW_S = 24 * 3600
UNFINISHED = ("validating", "in_progress")
_ROWS_PER_PART = 32
# On their way at a time: leaving room for others, or filling an engine where others go first.
_PARTS_AT_ONCE, _PARTS_WHERE_LAST = 4, 16
_RETRY_S = 2.0
_LEASE_S = 60.0  # a batch whose runner has not been heard of for so long is anybody's
_MAX_FAULTS = 10  # that are told
_LOWEST_PRIORITY = 2**31 - 1

logger = logging.getLogger(__name__)


class _TakenError(Exception):
    """Another runner has not heard of this one for too long."""


class BatchRunner:
    """Works off the batches that come to this replica, and those that others have left."""

    def __init__(
        self,
        front: Front,
        store: FileStore,
        max_line_bytes: int | None = None,
        retry_s: float = _RETRY_S,
    ) -> None:
        """
        Args:
            max_line_bytes: see `JsonlFormat`.
        """
        self._front = front
        self._store = store
        self._retry_s = retry_s
        self._format = JsonlFormat(max_line_bytes)
        self._name = secrets.token_hex(8)  # in leases
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._ended: set[str] = set()  # batches, which stay so

    def start(self, directory: str, batch_id: str) -> None:
        if batch_id not in self._tasks:
            task = asyncio.create_task(self._run_safely(directory, batch_id))
            self._tasks[batch_id] = task
            task.add_done_callback(lambda _: self._tasks.pop(batch_id, None))

    async def cancel(self, directory: str, record: Record) -> None:
        """Whoever works on it sees to it; where nobody does, this runner."""
        await asyncio.to_thread(self._store.cancel, directory, record["id"])
        if self._is_free(record):
            self.start(directory, record["id"])

    async def adopt_forever(self) -> None:
        """Start whatever is unfinished and nobody's, now and from time to time."""
        while True:
            try:
                for directory, batch_id in await asyncio.to_thread(self._orphans):
                    self.start(directory, batch_id)
            except OSError as error:
                logger.warning("batches cannot be looked at now: %s", error)
            await asyncio.sleep(_LEASE_S / 2)

    def _orphans(self) -> list[tuple[str, str]]:
        found = []
        for directory in self._store.tenants():
            for batch_id in set(self._store.ids(directory, "batches")) - self._ended:
                record = self._store.read(directory, "batches", batch_id)
                if record is not None and record["status"] not in UNFINISHED:
                    self._ended.add(batch_id)
                elif record is not None and self._is_free(record):
                    found.append((directory, batch_id))
        return found

    def _is_free(self, record: Record) -> bool:
        owner, heard_at = record.get("_runner", ("", 0.0))
        return owner == self._name or time.time() - heard_at > _LEASE_S

    async def close(self) -> None:
        """What is unfinished stays so, for the next one."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run_safely(self, directory: str, batch_id: str) -> None:
        try:
            await self._run(directory, batch_id)
        except asyncio.CancelledError:
            with suppress(_TakenError):
                await asyncio.shield(self._update(directory, batch_id, is_left=True))
            raise
        except _TakenError:
            logger.warning("batch %s goes on elsewhere", batch_id)
        except OSError as error:  # its storage's: whoever looks for batches next tries again
            logger.warning("batch %s is interrupted, and goes on later: %s", batch_id, error)
        except Exception as error:
            logger.exception("batch %s failed", batch_id)
            message = f"internal error: {type(error).__name__}"
            with suppress(Exception):
                await self._finish(directory, batch_id, _failed(_fault(message)))

    async def _run(self, directory: str, batch_id: str) -> None:
        record = await self._update(directory, batch_id)
        if record["status"] not in UNFINISHED:  # it has ended since it was looked at
            return
        file_id = record["input_file_id"]
        if await asyncio.to_thread(self._store.read, directory, "files", file_id) is None:
            gone = _fault("input_file_id: the file has been deleted", param="input_file_id")
            await self._finish(directory, batch_id, _failed(gone))
            return
        source = self._store.source(directory, file_id)
        parts = await asyncio.to_thread(lambda: list(self._format.split(source, _ROWS_PER_PART)))
        total = sum(num_rows for _, num_rows in parts)
        if record["status"] == "validating":
            faults = await self._keep(directory, batch_id, lambda: self._faults(source))
            if total == 0:
                faults = [_fault("the input file has no requests")]
            if faults:
                await self._update(directory, batch_id, _failed(*faults))
                return
            started = {"status": "in_progress", "in_progress_at": int(time.time())}
            await self._update(directory, batch_id, started)
        results = self._results(directory, batch_id)
        num_failed = await asyncio.to_thread(_num_failed, results)  # by part that is done

        def counts() -> Record:
            failed = sum(num_failed.values())
            completed = sum(parts[number][1] for number in num_failed) - failed
            return {"request_counts": {"total": total, "completed": completed, "failed": failed}}

        async def work_off(number: int) -> None:
            start, num_rows = parts[number]
            raw = await asyncio.to_thread(self._format.read, source, start, num_rows)
            parsed = await asyncio.to_thread(self._format.parse, raw)
            rows = [_checked(row, record["endpoint"]) for row in parsed]
            said = await self._answer(directory, record, rows, number * _ROWS_PER_PART)
            if said is not None:
                await asyncio.to_thread(self._write, results, number, raw, rows, said)
                num_failed[number] = sum(not _is_good(a) for a in said)

        left = (work_off(number) for number in range(len(parts)) if number not in num_failed)
        await self._work_through(directory, batch_id, left, counts)
        ending = "completed" if len(num_failed) == len(parts) else "expired"
        await self._finish(directory, batch_id, {"status": ending, **counts()})

    def _faults(self, source: Location) -> list[Record]:
        """What is wrong with the file as a whole; what is wrong with a line is its answer."""
        return [
            _fault(
                f"custom_id: {shown(custom_id)} is that of a line before, too",
                **{"code": "duplicate_custom_id", "line": line, "param": "custom_id"},
            )
            for line, custom_id in islice(self._format.duplicates(source), _MAX_FAULTS)
        ]

    async def _work_through(
        self,
        directory: str,
        batch_id: str,
        left: Iterator[Coroutine[Any, Any, None]],
        counts: Callable[[], Record],
    ) -> None:
        """Do what is left, some at a time, while the batch is this runner's and wanted."""
        at_once = _PARTS_WHERE_LAST if self._front.has_priorities else _PARTS_AT_ONCE
        tasks: set[asyncio.Task[None]] = set()
        try:
            while True:
                record = await self._update(directory, batch_id, counts())
                if await self._is_wanted(directory, record):
                    tasks |= set(map(asyncio.create_task, islice(left, at_once - len(tasks))))
                if not tasks:
                    return
                done, tasks = await asyncio.wait(
                    tasks, timeout=_LEASE_S / 4, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    task.result()
        finally:
            await cancel_all(list(tasks))

    async def _answer(
        self, directory: str, record: Record, rows: list[Row], first_row: int
    ) -> list[Answer] | None:
        """None where the batch is no longer wanted before there is an engine."""
        defaults = {"priority": _LOWEST_PRIORITY} if self._front.has_priorities else {}
        owner = record.get("_owner", {})
        while True:
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [
                        group.create_task(
                            answer(self._front, row, defaults, row_seed(0, i), **owner)
                        )
                        for i, row in enumerate(rows, start=first_row)
                    ]
                return [task.result() for task in tasks]
            except* EngineUnavailableError:
                await asyncio.sleep(self._retry_s)
            if not await self._is_wanted(directory, record):
                return None

    def _write(
        self, results: Location, number: int, raw: list[bytes], rows: list[Row], said: list[Answer]
    ) -> None:
        """The part's good answers, its others, and last that it is done, with how many failed."""
        for kind, wanted in (("output", True), ("error", False)):
            chosen = [i for i, a in enumerate(said) if _is_good(a) == wanted]
            if chosen:
                content = self._format.encode(
                    [raw[i] for i in chosen], [rows[i] for i in chosen], [said[i] for i in chosen]
                )
                results.write(f"{number:08}.{kind}", content)
        num_failed = sum(not _is_good(a) for a in said)
        results.write(f"{number:08}.done", str(num_failed).encode())

    async def _finish(self, directory: str, batch_id: str, told: Record) -> None:
        """
        Args:
            told: how it has ended, unless it was cancelled.
        """
        record = await self._update(directory, batch_id)
        if await self._is_cancelled(directory, batch_id):
            told["status"] = "cancelled"
        results = self._results(directory, batch_id)
        names = await asyncio.to_thread(results.names)
        for kind in ("output", "error"):
            own = sorted(name for name in names if name.endswith(f".{kind}"))
            if own and not record.get(f"{kind}_file_id"):  # else of a runner before

                def put(kind: str = kind, own: list[str] = own) -> Record:
                    pieces = map(results.read, own)
                    name = f"{batch_id}_{kind}.jsonl"
                    return self._store.put(directory, pieces, name, "batch_output")

                made = await self._keep(directory, batch_id, put)
                await self._update(directory, batch_id, {f"{kind}_file_id": made["id"]})
        await self._update(directory, batch_id, told | {f"{told['status']}_at": int(time.time())})
        await asyncio.to_thread(results.filesystem.delete_dir, results.path)

    async def _keep(self, directory: str, batch_id: str, call: Callable[[], T]) -> T:
        """What the call returns; the batch is this runner's however long that takes."""
        task = asyncio.create_task(asyncio.to_thread(call))
        while not (await asyncio.wait([task], timeout=_LEASE_S / 4))[0]:
            await self._update(directory, batch_id)
        return task.result()

    async def _is_wanted(self, directory: str, record: Record) -> bool:
        return not (await self._is_cancelled(directory, record["id"]) or _is_late(record))

    async def _is_cancelled(self, directory: str, batch_id: str) -> bool:
        return await asyncio.to_thread(self._store.is_cancelled, directory, batch_id)

    def _results(self, directory: str, batch_id: str) -> Location:
        place = self._store.place(directory, f"results/{batch_id}")
        place.filesystem.create_dir(place.path, recursive=True)
        return place

    async def _update(
        self, directory: str, batch_id: str, changes: Record | None = None, is_left: bool = False
    ) -> Record:
        """The record, as it is now and with these changes; and that it is being worked on.

        Raises _TakenError where another works on it.

        Args:
            is_left: it is not any longer.
        """

        def update() -> Record:
            record = self._store.read(directory, "batches", batch_id)
            assert record is not None, "batches are not deleted"
            if not self._is_free(record):
                raise _TakenError
            record |= (changes or {}) | {"_runner": (self._name, 0.0 if is_left else time.time())}
            self._store.write(directory, record)
            return record

        return await asyncio.to_thread(update)


def _is_late(record: Record) -> bool:
    return bool(time.time() > record["expires_at"])


def _num_failed(results: Location) -> dict[int, int]:
    """How many rows have failed, by the number of each part that is done."""
    done = [name for name in results.names() if name.endswith(".done")]
    return {int(name.removesuffix(".done")): int(results.read(name) or 0) for name in done}


def _is_good(answer: Answer) -> bool:
    return answer.status == 200


def _checked(row: Row, endpoint: str) -> Row:
    if row.error is None and row.url != endpoint:
        error = ApiError(400, f"url: {row.url!r}, but the batch's endpoint is {endpoint!r}", "url")
        return replace(row, error=error)
    return row


def _fault(message: str, **where: Any) -> Record:
    return {"code": "invalid_input", "message": message, "line": None, "param": None} | where


def _failed(*faults: Record) -> Record:
    return {
        "status": "failed",
        "failed_at": int(time.time()),
        "errors": {"object": "list", "data": faults},
    }
