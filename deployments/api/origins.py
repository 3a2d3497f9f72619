"""Which web pages may use the server from a visitor's browser.

A page can read an answer of another origin, or send it JSON, only if that origin allows it (CORS):
`allowed_origins`, and none by default. CORS does not see a page whose owner lets its name mean this
machine's address for a while (DNS rebinding): it has the server's own origin then. Where a key is
asked for, it has none. Where none is, the name must be one that no stranger can own; API clients,
which are no pages and so have no origin, may call the server by any.
"""

import re
from collections.abc import Collection
from ipaddress import ip_address

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from starlette.datastructures import Headers

from deployments.api.errors import ApiError

# Ends of names that no public DNS has.
_PRIVATE_ENDS = (".localhost", ".local", ".internal", ".lan", ".home.arpa", ".svc")
_PORT = re.compile(r":\d*$")


def allow_origins(api: FastAPI, origins: Collection[str]) -> None:
    """Answers browsers that ask whether pages of these origins, "*" for all, may use `api`."""
    if origins:
        api.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )


def check_page(headers: Headers, allowed: Collection[str]) -> None:
    """Raises ApiError for a page that may not use a server without keys."""
    origin, host = headers.get("origin"), headers.get("host", "")
    if origin is None or origin in allowed or "*" in allowed or _is_private(host):
        return
    raise ApiError(
        403,
        f"pages of {origin} may not use this server, which has no API keys and does not know the "
        f"name {host!r}: list the origin in allowed_origins, or set keys",
        code="origin_not_allowed",
    )


def check_upload(headers: Headers, allowed: Collection[str]) -> None:
    """Raises ApiError for a form of a page that may not read the answer.

    Browsers send forms anywhere without asking first, unlike JSON.
    """
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise ApiError(
            415,
            "a file is sent as multipart/form-data, with its purpose",
            code="unsupported_media_type",
        )
    origin, host = headers.get("origin"), headers.get("host", "")
    is_own = origin is not None and origin.partition("://")[2] == host
    if not (origin is None or is_own or origin in allowed or "*" in allowed):
        raise ApiError(403, f"pages of {origin} may not send files here", code="origin_not_allowed")


def _is_private(host: str) -> bool:
    """Whether a host is an address, or a name that has no meaning outside of a network."""
    name = _PORT.sub("", host).removesuffix(".").lower()
    try:
        ip_address(name.strip("[]"))
    except ValueError:
        return "." not in name or name.endswith(_PRIVATE_ENDS)
    return True
