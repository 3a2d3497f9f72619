"""What a step brings, while the device is still at it."""

from itertools import accumulate, pairwise

from engine.device.transfer import ToHost
from engine.sampling.logprobs import PendingLogprobs
from engine.schedule.step import StepResult, TokenLogprobs


class PendingStep:
    """A step that has been launched; without arguments, one that brings nothing.

    Args:
        tokens: [N] int64, of all rows that sample, end to end.
        num_sampled: how many of them each of these rows has.
        logprobs: which rows have some, by index, once for each position, and those of all.
        prompt_logprobs: parts of the prompt's, by index of the row.
        vectors: the prompts', pooled, by index of the row.
        errors: why rows cannot go on, by their index.
    """

    def __init__(
        self,
        tokens: ToHost | None = None,
        num_sampled: list[int] | None = None,
        logprobs: tuple[list[int], PendingLogprobs] | None = None,
        prompt_logprobs: dict[int, list[PendingLogprobs]] | None = None,
        errors: dict[int, str] | None = None,
        vectors: dict[int, ToHost] | None = None,
    ) -> None:
        self._tokens = tokens
        self._num_sampled = num_sampled or []
        self._logprobs = logprobs
        self._prompt_logprobs = prompt_logprobs or {}
        self._errors = errors or {}
        self._vectors = vectors or {}

    def result(self) -> StepResult:
        """What it has brought, once it has."""
        if self._tokens is None:
            return StepResult([])
        logprobs: dict[int, list[TokenLogprobs]] = {}
        if self._logprobs is not None:
            for i, position in zip(self._logprobs[0], self._logprobs[1].wait(), strict=True):
                logprobs.setdefault(i, []).append(position)
        prompt_logprobs = {
            i: [position for part in parts for position in part.wait()]
            for i, parts in self._prompt_logprobs.items()
        }
        tokens: list[int] = self._tokens.wait().tolist()
        if len(tokens) == len(self._num_sampled):
            token_ids = [[token] for token in tokens]
        else:
            ends = pairwise(accumulate(self._num_sampled, initial=0))
            token_ids = [tokens[start:end] for start, end in ends]
        vectors = {i: vector.wait().tolist() for i, vector in self._vectors.items()}
        return StepResult(token_ids, logprobs, prompt_logprobs, vectors, self._errors)
