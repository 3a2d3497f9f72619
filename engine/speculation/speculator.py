"""How many drafts a step takes: those that make its tokens cheapest.

A step of more tokens brings more of them and takes longer. Each draft is worth the probability that
it comes, which its drafter estimates and the row's own experience corrects; what it costs is
measured. So the drafts are ordered by probability, and the step takes as many of them as make
tokens per second most: many where a step is bound by memory, none where it is bound by arithmetic.
"""

from collections import Counter
from collections.abc import Sequence as Listed
from dataclasses import dataclass

import numpy as np

from engine.schedule.sequence import Sequence
from engine.speculation.costs import MIN_GAIN, DecodeCosts
from engine.speculation.drafter import Draft, Drafter
from engine.speculation.prediction import PredictionDrafter

# Drafts that a drafter's own estimate counts for, against those that have been accepted or not.
_PRIOR = 4.0
_DECAY = 0.9  # of what a row has experienced, with each draft
_FORGIVENESS = 0.99  # of its failures, with each draft that it was not given


@dataclass(slots=True)
class _Experience:
    """A row's, with the drafts that it has been given."""

    hits: float = 0.0
    misses: float = 0.0
    drafter: Drafter | None = None  # whose the last one was

    def probabilities(self, draft: Draft, num_pending: int) -> np.ndarray:
        """That each of its tokens comes, and all before it, but for those that are pending."""
        confidences = np.array(draft.confidences)
        total = self.hits + self.misses + _PRIOR
        return np.cumprod((self.hits + _PRIOR * confidences) / total)[num_pending:]


class Speculator:
    """Implements `engine.schedule.speculation.Speculation`.

    Args:
        max_drafts: most for one row in one step.
        num_ahead: steps that are scheduled while one is in flight, which a row with drafts sits
            out: how far it has come is known only then.
    """

    def __init__(self, drafters: Listed[Drafter], max_drafts: int, num_ahead: int) -> None:
        self._drafters = drafters
        self._max_drafts = max_drafts
        self._num_ahead = num_ahead
        self.costs = DecodeCosts()
        self._rows: dict[Sequence, _Experience] = {}
        # By drafter: rows that were given drafts, drafts, and those that came true.
        self.num_drafts: Counter[str] = Counter()
        self.num_draft_tokens: Counter[str] = Counter()
        self.num_accepted: Counter[str] = Counter()

    def propose(self, sequences: list[Sequence], budget: int) -> dict[Sequence, list[int]]:
        """Drafts for rows that would each compute one token, at most so many in all."""
        budget = min(budget, self._max_drafts * len(sequences))
        if budget <= 0 or not self._may_pay(len(sequences), budget):
            return {}
        for drafter in self._drafters:
            drafter.prepare(sequences, self._max_drafts, self.costs)
        drafts: list[tuple[Sequence, list[int], np.ndarray]] = []
        for sequence in sequences:
            tokens, probabilities = self._draft(sequence)
            if probabilities.sum() > self._num_ahead:
                drafts.append((sequence, tokens, probabilities))
        if not drafts:
            return {}
        counts = self._choose(len(sequences), [p for *_, p in drafts], budget)
        return {
            sequence: tokens[:count]
            for (sequence, tokens, _), count in zip(drafts, counts, strict=True)
            if count
        }

    def _may_pay(self, num_rows: int, budget: int) -> bool:
        """Whether the surest drafts would: else nobody is asked for any."""
        extra = 2 ** np.arange(budget.bit_length())
        cost = self.costs.of(num_rows, np.append(0, extra))
        return bool(((num_rows + extra) * cost[0] > MIN_GAIN * num_rows * cost[1:]).any())

    def _draft(self, sequence: Sequence) -> tuple[list[int], np.ndarray]:
        """Of all drafters' the one that promises most, and the probabilities of its tokens."""
        experience = self._rows.setdefault(sequence, _Experience())
        experience.misses *= _FORGIVENESS
        num_pending = sequence.num_pending
        # The last token that it may have follows the last draft.
        limit = min(self._max_drafts, sequence.max_len - sequence.num_tokens - 1)
        best: tuple[list[int], np.ndarray] = [], np.empty(0)
        if limit <= 0:
            return best
        for drafter in self._drafters:
            draft = drafter.draft(sequence, limit + num_pending)
            if not draft.token_ids:
                continue
            probabilities = experience.probabilities(draft, num_pending)
            if probabilities.sum() > best[1].sum():
                best = draft.token_ids[num_pending:], probabilities
                experience.drafter = drafter
        return best

    def _choose(self, num_rows: int, rows: list[np.ndarray], budget: int) -> list[int]:
        """How many drafts each row gets, given their probabilities, which fall within a row."""
        probabilities = np.concatenate(rows)
        order = np.argsort(-probabilities, kind="stable")[:budget]
        expected = num_rows + np.append(0.0, probabilities[order].cumsum())
        rates = expected / self.costs.of(num_rows, np.arange(len(expected)))
        rates[1:] /= MIN_GAIN
        taken = order[: rates.argmax()]
        owners = np.repeat(np.arange(len(rows)), [len(p) for p in rows])
        return np.bincount(owners[taken], minlength=len(rows)).tolist()

    def judge(self, sequence: Sequence, num_drafts: int, num_accepted: int) -> None:
        """What became of drafts that the sequence was given."""
        experience = self._rows[sequence]
        experience.hits = _DECAY * experience.hits + num_accepted
        experience.misses = _DECAY * experience.misses + (num_accepted < num_drafts)
        drafter = experience.drafter
        assert drafter is not None
        drafter.judge(num_drafts, num_accepted)
        if isinstance(drafter, PredictionDrafter):
            accepted, rejected = sequence.num_predicted
            rejected += num_drafts - num_accepted
            sequence.num_predicted = accepted + num_accepted, rejected
        self.num_drafts[drafter.name] += 1
        self.num_draft_tokens[drafter.name] += num_drafts
        self.num_accepted[drafter.name] += num_accepted

    def stats(self) -> dict[str, float]:
        """Counts since the start, by drafter."""
        return {
            f"{name}:{drafter}": count
            for name, counts in (
                ("drafts", self.num_drafts),
                ("draft_tokens", self.num_draft_tokens),
                ("accepted_tokens", self.num_accepted),
            )
            for drafter, count in counts.items()
        }

    def end(self, sequence: Sequence) -> None:
        """The sequence has ended."""
        self._rows.pop(sequence, None)
        for drafter in self._drafters:
            drafter.end(sequence)
