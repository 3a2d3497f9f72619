"""The whole application: the API, and files and batches where there is a place for them."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from deployments.api import build_api
from deployments.args import ServiceArgs
from deployments.front.front import Front


def build_application(
    front: Front, service: ServiceArgs, tells_request_ids: bool = True
) -> FastAPI:
    """See `build_api`."""
    api = build_api(front, service, tells_request_ids)
    if service.files_directory is not None:
        _add_files(api, front, service.files_directory, service.max_request_bytes)
    return api


def _add_files(api: FastAPI, front: Front, directory: str, max_line_bytes: int) -> None:
    from deployments.files.batches import BatchRunner
    from deployments.files.routes import routes
    from deployments.files.store import FileStore

    store = FileStore(directory)
    runner = BatchRunner(front, store, max_line_bytes)
    api.include_router(routes(store, runner))

    @asynccontextmanager
    async def running(_: FastAPI) -> AsyncGenerator[None]:
        adopting = asyncio.create_task(runner.adopt_forever())
        try:
            yield
        finally:
            adopting.cancel()
            await runner.close()

    api.router.lifespan_context = running
