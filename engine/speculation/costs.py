"""What a step costs, by its rows and their drafts: measured, while it serves."""

import numpy as np

# What drafts must promise at least, against errors of measurement.
MIN_GAIN = 1.03
# What a draft for each row adds to a step that was never measured with any: sure ones are tried.
_GUESS = 0.05
_WEIGHT = 0.2  # of a new measurement
_MOST = 3.0  # times what was expected; more is some accident
# Steps after which a size that has not come again counts as unknown: so many for each time that it
# has been measured, for once may have been an accident, and at most.
_AGE, _MAX_AGE = 32, 512


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
        without = self._without.of(num_rows)
        sizes, seconds = self._with.above(num_rows)
        if not len(sizes):
            guess = without * (1 + _GUESS * num_drafts / num_rows)
            return np.maximum(self._without.of(num_tokens), guess)
        sizes = np.concatenate(((num_rows,), sizes))
        seconds = np.concatenate(((without,), np.maximum(seconds, without)))
        return np.interp(num_tokens, sizes, seconds)


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
        # By size: of none first, which takes no time.
        self._sizes, self._seconds, self._times, self._expires = np.zeros((4, 1))
        self._expires[0] = np.inf

    def _known(self) -> tuple[np.ndarray, np.ndarray]:
        is_known = self._expires >= self._num_steps
        return self._sizes[is_known], self._seconds[is_known]

    def above(self, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Larger sizes that are known, and their seconds."""
        sizes, seconds = self._known()
        first = sizes.searchsorted(num_tokens, "right")
        return sizes[first:], seconds[first:]

    def count(self, num_tokens: int, seconds: float) -> None:
        """A step has taken so long."""
        self._num_steps += 1
        i = int(self._sizes.searchsorted(num_tokens))
        if i == len(self._sizes) or self._sizes[i] != num_tokens:
            columns = np.array((self._sizes, self._seconds, self._times, self._expires))
            columns = np.insert(columns, i, (num_tokens, 0, 0, 0), axis=1)
            self._sizes, self._seconds, self._times, self._expires = columns
        if self._expires[i] < self._num_steps:
            self._seconds[i] = seconds
        else:
            known = self._seconds[i]
            self._seconds[i] += _WEIGHT * (min(seconds, _MOST * known) - known)
        self._times[i] += 1
        self._expires[i] = self._num_steps + min(_AGE * self._times[i], _MAX_AGE)

    def of(self, num_tokens: int | np.ndarray) -> np.ndarray:
        """Seconds of steps of so many tokens; all alike until the first has been counted."""
        sizes, seconds = self._known()
        if len(sizes) == 1:
            return np.full(np.shape(num_tokens), self._unknown)
        return np.asarray(np.interp(num_tokens, sizes, seconds))
