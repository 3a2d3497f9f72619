"""The playground: a page at `/` that talks to this server like any other client.

It is plain files, made of nothing that must be built or fetched from elsewhere; the browser is told
to refuse whatever does not come from this server.
"""

from html import escape
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, HTMLResponse, Response
from starlette.exceptions import HTTPException

ASSETS = Path(__file__).parents[2] / "playground"

_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; object-src 'none'; "
    "base-uri 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # asks again, and gets 304 for what has not changed
}
_MEDIA_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


def routes() -> APIRouter:
    router = APIRouter(include_in_schema=False)
    page = (ASSETS / "index.html").read_text(encoding="utf-8")

    @router.api_route("/", methods=["GET", "HEAD"], response_model=None)  # clients look for both
    async def playground(request: Request) -> Response:
        """Links in the page are relative to where the application is mounted."""
        base = escape(request.scope.get("root_path", "").rstrip("/") + "/", quote=True)
        return HTMLResponse(page.replace('<base href="/">', f'<base href="{base}">'), 200, _HEADERS)

    @router.get("/playground/{name}", response_model=None)
    async def asset(name: str) -> Response:
        path = ASSETS / name
        media_type = _MEDIA_TYPES.get(path.suffix)
        if media_type is None or path.parent != ASSETS or not path.is_file():
            raise HTTPException(404, f"the playground has no file {name!r}")
        return FileResponse(path, headers=_HEADERS, media_type=media_type)

    return router
