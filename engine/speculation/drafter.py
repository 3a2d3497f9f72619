"""Who guesses how a text goes on: one interface. A kind of drafter is a file here."""

from dataclasses import dataclass, field

from engine.schedule.sequence import Sequence
from engine.speculation.costs import DecodeCosts


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens that may come next."""

    token_ids: list[int] = field(default_factory=list)
    # How sure each is, from 0 to 1, if those before it come.
    confidences: list[float] = field(default_factory=list)


class Drafter:
    name = ""

    def prepare(self, sequences: list[Sequence], limit: int, costs: DecodeCosts) -> None:
        """These are about to be asked about, for up to `limit` tokens, in steps of such costs.

        For who makes the drafts of all of them together.
        """

    def draft(self, sequence: Sequence, limit: int) -> Draft:
        """Up to `limit` tokens that may follow the sequence's `token_ids`."""
        raise NotImplementedError

    def judge(self, num_drafts: int, num_accepted: int) -> None:
        """What became of drafts that a row was given."""

    def end(self, sequence: Sequence) -> None:
        """The sequence has ended, and is not asked about again."""
