"""What the scheduler asks of whoever guesses tokens ahead; see `engine.speculation`."""

from typing import Protocol

from engine.schedule.sequence import Sequence


class Speculation(Protocol):
    """Guesses how texts go on, for the device to check several tokens in one step."""

    def propose(self, sequences: list[Sequence], budget: int) -> dict[Sequence, list[int]]:
        """Drafts for rows that would each compute one token, at most so many in all."""

    def judge(self, sequence: Sequence, num_drafts: int, num_accepted: int) -> None:
        """What became of drafts that the sequence was given."""

    def end(self, sequence: Sequence) -> None:
        """The sequence has ended."""
