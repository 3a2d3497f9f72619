"""What belongs to one HTTP request, wherever it is handled."""

import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field

from starlette.datastructures import Headers

from deployments.api.requests.handed_tokens import HandedTokens
from deployments.args import ServiceArgs
from deployments.front.quotas import Quota
from deployments.observe.request_record import RequestRecord


@dataclass
class RequestScope:
    """Made by the gate (`deployments.api.gate`), which also tells afterwards what happened."""

    service: ServiceArgs = field(default_factory=ServiceArgs.unlimited)
    request_id: str = ""
    method: str = ""
    path: str = ""
    is_anthropic: bool = False  # it has come to an endpoint of their API
    headers: Headers = field(default_factory=Headers)
    body_start: bytes = b""  # its beginning
    handed: HandedTokens | None = None  # of its prompt, if a router has made them
    flow: str = ""  # requests of one take turns with those of others
    end_reading: Callable[[], None] = lambda: None  # called when the body is of no more use
    tenant: str = ""  # the name of its API key
    quota: Quota = field(default_factory=Quota)
    cache_owner: str = ""  # the tenant, if its cached prefixes are its own
    # What the client calls parameters that have other names here, one after another: for errors.
    names: dict[str, str] = field(default_factory=dict)
    records: list[RequestRecord] = field(default_factory=list)  # one per choice
    arrived_at: float = field(default_factory=time.time)
    began: float = field(default_factory=time.perf_counter)
    error: str = ""  # the code of what the client was told, if it was an error
    status: int = 0  # 0 while no response has begun: then the client went first
    handler: str = "none"  # the route's path, not the request's: so there are few

    @property
    def status_class(self) -> str:
        return f"{self.status // 100}xx" if self.status else "gone"

    @property
    def seconds(self) -> float:
        """Since it came."""
        return time.perf_counter() - self.began


_current: ContextVar[RequestScope | None] = ContextVar("request_scope", default=None)


def scope() -> RequestScope:
    """That of the request being handled; outside of HTTP one without limits or tenant."""
    return _current.get() or RequestScope()


def enter(new: RequestScope) -> None:
    """Make it the scope of this task, and of those that it starts."""
    _current.set(new)
