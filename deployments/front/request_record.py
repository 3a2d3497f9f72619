"""How a request is to be treated, and what became of it."""

import time
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "timeout", "error"]


@dataclass(slots=True)
class RequestRecord:
    """One request's times, on the clock of time.monotonic(), and counts: for metrics and logs."""

    num_prompt: int
    max_tokens: int | None
    arrived_at: float = field(default_factory=time.monotonic)
    first_token_at: float | None = None
    last_token_at: float = 0.0
    ended_at: float | None = None
    num_output: int = 0
    num_cached: int = 0
    finish_reason: str | None = None

    @property
    def ttft_s(self) -> float | None:
        """Seconds from arrival to the first token."""
        return None if self.first_token_at is None else self.first_token_at - self.arrived_at


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """What a request asks of the server, beside what it asks of the model."""

    stream: bool = True
    cache_salt: str = ""
    cache_owner: str = ""
    priority: int = 0
    flow: str = ""
    timeout_s: float | None = None
    shown_tokens: frozenset[int] = frozenset()  # in the text though they are special
    records: list[RequestRecord] = field(default_factory=list)  # where its records are put
