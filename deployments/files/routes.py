"""/v1/files and /v1/batches, as OpenAI has them."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import Field
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from deployments.api.bodies import BodyRoute
from deployments.api.errors import ApiError
from deployments.api.schema import answers
from deployments.api.schema.answers import Answer, documented
from deployments.api.schema.protocol import Metadata
from deployments.api.scope import scope
from deployments.files.batches import UNFINISHED, WINDOW_S, BatchRunner
from deployments.files.store import FileStore, Record, new_id, pieces_of
from engine.strict import shown
from engine.text.request_model import RequestModel, Unserved

_MAX_LISTED = 100
Limit = Annotated[int, Query(ge=1, description=f"At most {_MAX_LISTED} are listed.")]


class BatchRequest(RequestModel):
    input_file_id: str
    endpoint: Literal["/v1/chat/completions", "/v1/completions"]
    completion_window: Literal["24h"] = "24h"
    metadata: Metadata = Field(default_factory=dict)
    output_expires_after: Unserved = None


class FileObject(Answer):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["processed"]


class RequestCounts(Answer):
    total: int
    completed: int
    failed: int


class Batch(Answer):
    id: str
    object: Literal["batch"]
    endpoint: str
    input_file_id: str
    completion_window: str
    status: (
        Literal["validating", "in_progress", "cancelling", "cancelled"]
        | Literal["completed", "expired", "failed"]
    )
    output_file_id: str | None
    error_file_id: str | None
    errors: dict[str, Any] | None
    created_at: int
    in_progress_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    cancelled_at: int | None = None
    expired_at: int | None = None
    expires_at: int
    request_counts: RequestCounts
    metadata: dict[str, str]


class _List(Answer):
    object: Literal["list"]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileList(_List):
    data: list[FileObject]


class BatchList(_List):
    data: list[Batch]


_CONTENT: dict[int | str, dict[str, Any]] = {
    **documented(FileObject),
    200: {"content": {"application/octet-stream": {}}},
}


def routes(store: FileStore, runner: BatchRunner) -> APIRouter:
    router = APIRouter(route_class=BodyRoute)
    _add_files(router, store)
    _add_batches(router, store, runner)
    return router


def _add_files(router: APIRouter, store: FileStore) -> None:
    @router.post("/v1/files", responses=documented(FileObject))
    async def create_file(http: Request) -> dict[str, Any]:
        """Sent as a form: `file`, and `purpose`."""
        try:
            async with http.form(max_files=1, max_fields=8) as form:
                file, purpose = form.get("file"), form.get("purpose")
                if not isinstance(file, UploadFile):
                    raise ApiError(400, "file: send one, as multipart/form-data", "file")
                if not isinstance(purpose, str) or not purpose.isidentifier():
                    raise ApiError(400, "purpose: Field required, such as batch", "purpose")
                name = (file.filename or "file")[:256]
                return await asyncio.to_thread(
                    store.put, _directory(), pieces_of(file.file), name, purpose
                )
        except HTTPException as error:
            raise ApiError(400, f"the form cannot be read: {error.detail}") from error

    @router.get("/v1/files", responses=documented(FileList))
    async def list_files(
        limit: Limit = 100,
        after: str = "",
        purpose: str = "",
        order: Literal["asc", "desc"] = "desc",
    ) -> dict[str, Any]:
        found = await asyncio.to_thread(store.all, _directory(), "files")
        if order == "asc":
            found.reverse()
        return _listed([f for f in found if purpose in ("", f["purpose"])], limit, after)

    @router.get("/v1/files/{file_id}", responses=documented(FileObject))
    async def get_file(file_id: str) -> dict[str, Any]:
        return await _find(store, "files", file_id)

    @router.delete("/v1/files/{file_id}", responses=documented(answers.Deleted))
    async def delete_file(file_id: str) -> dict[str, Any]:
        await _find(store, "files", file_id)
        await asyncio.to_thread(store.delete, _directory(), file_id)
        return {"id": file_id, "object": "file", "deleted": True}

    @router.get("/v1/files/{file_id}/content", response_model=None, responses=_CONTENT)
    async def get_content(file_id: str) -> Response:
        await _find(store, "files", file_id)
        pieces = store.pieces(_directory(), file_id)

        async def lines() -> AsyncGenerator[bytes]:
            while (piece := await asyncio.to_thread(next, pieces, b"")) != b"":
                yield piece

        return StreamingResponse(lines(), media_type="application/octet-stream")


def _add_batches(router: APIRouter, store: FileStore, runner: BatchRunner) -> None:
    @router.post("/v1/batches", response_model=None, responses=documented(Batch))
    async def create_batch(request: BatchRequest) -> Response:
        await _find(store, "files", request.input_file_id, "input_file_id")
        now = int(time.time())
        record = {
            "id": new_id("batch"),
            "object": "batch",
            "endpoint": request.endpoint,
            "input_file_id": request.input_file_id,
            "completion_window": request.completion_window,
            "status": "validating",
            "output_file_id": None,
            "error_file_id": None,
            "errors": None,
            "created_at": now,
            "expires_at": now + WINDOW_S,
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
            "metadata": request.metadata,
            "_owner": {"tenant": scope().tenant, "cache_owner": scope().cache_owner},
        }
        directory = _directory()
        await asyncio.to_thread(store.write, directory, record)
        runner.start(directory, str(record["id"]))
        return JSONResponse(await _told(store, record))

    @router.get("/v1/batches", responses=documented(BatchList))
    async def list_batches(limit: Limit = 20, after: str = "") -> dict[str, Any]:
        found = await asyncio.to_thread(store.all, _directory(), "batches")
        return _listed([await _told(store, record) for record in found], limit, after)

    @router.get("/v1/batches/{batch_id}", responses=documented(Batch))
    async def get_batch(batch_id: str) -> dict[str, Any]:
        return await _told(store, await _find(store, "batches", batch_id))

    @router.post("/v1/batches/{batch_id}/cancel", responses=documented(Batch))
    async def cancel_batch(batch_id: str) -> dict[str, Any]:
        """What has been answered by then is kept."""
        record = await _find(store, "batches", batch_id)
        if record["status"] in UNFINISHED:
            await runner.cancel(_directory(), record)
        return await _told(store, record)


def _directory() -> str:
    return FileStore.directory_of(scope().tenant)


async def _find(store: FileStore, kind: str, record_id: str, param: str | None = None) -> Record:
    """Raises ApiError for what is not there, or is another's."""
    found = await asyncio.to_thread(store.read, _directory(), kind, record_id)
    if found is None:
        where = f"{param}: " if param else ""
        message = f"{where}there is no {shown(record_id)} among your {kind}"
        raise ApiError(400 if param else 404, message, param)
    return found


async def _told(store: FileStore, record: Record) -> Record:
    told = {name: value for name, value in record.items() if not name.startswith("_")}
    if record["status"] in UNFINISHED and await asyncio.to_thread(
        store.is_cancelled, _directory(), record["id"]
    ):
        told["status"] = "cancelling"
    return told


def _listed(records: Sequence[Record], limit: int, after: str) -> dict[str, Any]:
    ids = [record["id"] for record in records]
    start = ids.index(after) + 1 if after in ids else 0
    page = records[start : start + min(limit, _MAX_LISTED)]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": start + len(page) < len(records),
    }
