"""How a request is to be treated."""

from dataclasses import dataclass, field

from deployments.observe.request_record import RequestRecord


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """What a request asks of the server, beside what it asks of the model."""

    stream: bool = True
    cache_salt: str = ""
    cache_owner: str = ""
    priority: int = 0
    flow: str = ""
    weight: float = 1.0
    timeout_s: float | None = None
    prediction: list[int] = field(default_factory=list)  # tokens that the output may have
    # Of a stream that broke: output tokens that are there already, and up to where its client has
    # the text. None where there was none.
    known_tokens: tuple[int, ...] = ()
    position: int | None = None
    by_token: bool = False  # text comes so, for whoever reads it may end it anywhere
    shown_tokens: frozenset[int] = frozenset()  # in the text though they are special
    records: list[RequestRecord] = field(default_factory=list)  # where its records are put
