"""What became of a request."""

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
    num_predicted: tuple[int, int] = (0, 0)  # tokens of its prediction that came, or did not
    finish_reason: str | None = None

    @property
    def ttft_s(self) -> float | None:
        """Seconds from arrival to the first token."""
        return None if self.first_token_at is None else self.first_token_at - self.arrived_at
