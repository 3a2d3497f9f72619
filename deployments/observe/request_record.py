"""What became of a request."""

import time
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class RequestRecord:
    """One request's times, on the clock of time.monotonic(), and counts: for metrics and logs."""

    num_prompt: int  # with the output tokens that were there, which are computed as a prompt is
    max_tokens: int | None
    shares_prompt: bool = False  # with the choice before it: the prompt is asked for once
    arrived_at: float = field(default_factory=time.monotonic)
    first_token_at: float | None = None
    last_token_at: float = 0.0
    ended_at: float | None = None
    num_output: int = 0
    num_cached: int = 0
    num_predicted: tuple[int, int] = (0, 0)  # tokens of its prediction that came, or did not
    num_drafted: tuple[int, int] | None = None  # tokens guessed and right, once it has ended
    waits: list[float] = field(default_factory=list)  # for a row of the batch, in seconds
    # "stop", "length", "timeout" or "error"; None while it runs, and if it was aborted.
    finish_reason: str | None = None

    @property
    def ttft_s(self) -> float | None:
        """Seconds from arrival to the first token."""
        return None if self.first_token_at is None else self.first_token_at - self.arrived_at

    @property
    def queue_s(self) -> float:
        """Seconds from the engine's taking it in to its place in the batch."""
        return self.waits[0] if self.waits else 0.0

    @property
    def decode_s(self) -> float:
        """Seconds from the first token to the last so far."""
        return self.last_token_at - self.first_token_at if self.first_token_at is not None else 0.0

    @property
    def counts(self) -> dict[str, int]:
        """Tokens as the answer's usage has them."""
        of_prompt = {"prompt": self.num_prompt, "cached": self.num_cached}
        return ({} if self.shares_prompt else of_prompt) | {"output": self.num_output}

    def metrics(self) -> dict[str, Any]:
        """For whoever asked: as in vLLM, and the tokens found cached."""
        if self.ttft_s is None:
            return {}
        drafted, accepted = self.num_drafted or (0, 0)
        rate = (self.num_output - 1) / self.decode_s if self.decode_s > 0 else None
        return {
            "time_to_first_token_ms": _ms(self.ttft_s),
            "generation_time_ms": _ms(self.decode_s),
            "queue_time_ms": _ms(self.queue_s),
            "mean_itl_ms": _ms(1 / rate) if rate else None,
            "tokens_per_second": round(rate, 3) if rate else None,
            "cached_tokens": self.num_cached,
            "num_preemptions": max(len(self.waits) - 1, 0),
            "speculative_decoding": {
                "num_draft_tokens": drafted,
                "num_accepted_draft_tokens": accepted,
            }
            if self.num_drafted is not None
            else None,
        }


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)
