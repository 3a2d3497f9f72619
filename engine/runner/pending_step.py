"""What a step brings, while the device is still at it."""

from engine.device.transfer import ToHost
from engine.sampling.logprobs import PendingLogprobs
from engine.schedule.step import StepResult


class PendingStep:
    """A step that has been launched; without arguments, one that brings nothing.

    Args:
        tokens: [N] int64, of the N rows that sample.
        logprobs: indices of the rows that want them, and what they get.
        prompt_logprobs: parts of the prompt's, by index of the row.
        errors: why rows cannot go on, by their index.
    """

    def __init__(
        self,
        tokens: ToHost | None = None,
        logprobs: tuple[list[int], PendingLogprobs] | None = None,
        prompt_logprobs: dict[int, list[PendingLogprobs]] | None = None,
        errors: dict[int, str] | None = None,
    ) -> None:
        self._tokens = tokens
        self._logprobs = logprobs
        self._prompt_logprobs = prompt_logprobs or {}
        self._errors = errors or {}

    def result(self) -> StepResult:
        """What it has brought, once it has."""
        if self._tokens is None:
            return StepResult([])
        logprobs = {}
        if self._logprobs is not None:
            logprobs = dict(zip(self._logprobs[0], self._logprobs[1].wait(), strict=True))
        prompt_logprobs = {
            i: [position for part in parts for position in part.wait()]
            for i, parts in self._prompt_logprobs.items()
        }
        return StepResult(self._tokens.wait().tolist(), logprobs, prompt_logprobs, self._errors)
