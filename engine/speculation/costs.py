"""What a step costs, by its rows and their drafts: measured, while it serves."""

import numpy as np

# What drafts must promise at least, against errors of measurement.
MIN_GAIN = 1.03
# What a draft for each row adds to a step that was never measured with any: sure ones are tried.
_GUESS = 0.05
_WEIGHT = 0.2  # of a new measurement
_MOST = 3.0  # times what was expected; more is some accident
_MAX_AGE = 512  # steps after which a size that has not come again counts as unknown


class DecodeCosts:
    """Seconds of a step that decodes, without drafts and with.

    The two are measured apart: a step without may be one that is replayed, or run by other
    kernels. One with drafts costs no less, and with fewer than were measured it lies between.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self._without, self._with = StepCosts(), StepCosts()

    def count(self, num_rows: int, num_tokens: int, seconds: float) -> None:
        """A step has taken so long."""
        (self._with if num_tokens > num_rows else self._without).count(num_tokens, seconds)

    def of(self, num_rows: int, num_drafts: np.ndarray) -> np.ndarray:
        """Seconds of a step of these rows with so many drafts, [N]."""
        num_tokens = num_rows + num_drafts
        without = self._without.of(np.array([num_rows]))[0]
        larger = [(n, s) for n, s in self._with.measured() if n > num_rows]
        if not larger:
            guess = without * (1 + _GUESS * num_drafts / num_rows)
            return np.maximum(self._without.of(num_tokens), guess)
        sizes, seconds = zip((num_rows, without), *larger, strict=True)
        return np.interp(num_tokens, sizes, np.maximum(seconds, without))


class StepCosts:
    """Seconds of steps of one kind, by their number of tokens.

    Sizes between two that are known lie on the line between them. What lies outside is guessed
    low: a larger step to cost no more than the largest, a smaller one as much less as it is
    smaller. So it is tried sooner or later, and then known.
    """

    def __init__(self, unknown: float = 1.0) -> None:
        self._unknown = unknown
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self._num_steps = 0
        self._seconds: dict[int, float] = {}
        self._counted_at: dict[int, int] = {}

    def measured(self) -> list[tuple[int, float]]:
        """Sizes that are known and their seconds, smallest first."""
        return sorted(self._seconds.items())

    def count(self, num_tokens: int, seconds: float) -> None:
        """A step has taken so long."""
        self._num_steps += 1
        known = self._seconds.get(num_tokens)
        if known is None or self._counted_at[num_tokens] < self._num_steps - _MAX_AGE:
            self._seconds[num_tokens] = seconds
        else:
            self._seconds[num_tokens] += _WEIGHT * (min(seconds, _MOST * known) - known)
        self._counted_at[num_tokens] = self._num_steps
        if self._num_steps % _MAX_AGE == 0:
            self._drop_old()

    def _drop_old(self) -> None:
        oldest = self._num_steps - _MAX_AGE
        for num_tokens in [n for n, at in self._counted_at.items() if at < oldest]:
            del self._seconds[num_tokens], self._counted_at[num_tokens]

    def of(self, num_tokens: np.ndarray) -> np.ndarray:
        """Seconds of steps of so many tokens, [N]; all alike until the first has been counted."""
        if not self._seconds:
            return np.full(len(num_tokens), self._unknown)
        sizes, seconds = zip((0, 0.0), *self.measured(), strict=True)
        return np.interp(num_tokens, sizes, seconds)
