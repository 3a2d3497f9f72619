"""How many drafts a step takes: those that make its tokens cheapest.

A step of more tokens brings more of them and takes longer. Each draft is worth the probability that
it comes, which its drafter estimates, and its record and the row's own experience correct; what it
costs is measured. So the drafts are ordered by probability, and the step takes as many of them as
make tokens per second most: many where a step is bound by memory, none where it is bound by
arithmetic.

Drafting takes time as well. Where it has saved less than that of late, drafters are asked now and
then only.
"""

import time
from collections import Counter
from collections.abc import Sequence as Listed
from dataclasses import dataclass

import numpy as np

from engine.schedule.sequence import Sequence
from engine.speculation.costs import MIN_GAIN, DecodeCosts
from engine.speculation.drafter import Drafter

# Drafts that a drafter's own estimate counts for, against those that have been accepted or not.
_PRIOR = 4.0
_DECAY = 0.9  # of what a row has experienced, with each draft
_FORGIVENESS = 0.99  # of its failures, with each step in which it was not given any
_TRIALS = 8.0  # tokens that a drafter counts as having been right about as often as it said
_MEMORY = 0.99  # of what it was right about since, with each draft, and each step without
# Tokens of a step with drafts, or all that there are: of few sizes it is soon known what they cost,
# and they can be replayed.
_SIZES = np.array([size for n in range(1, 20) for size in (1 << n, 3 << (n - 1))])
_SELDOM = 8  # steps from one to the next in which drafters are asked who have not been worth it
_WEIGHT = 0.03  # of a step, in what drafters are worth


class DrafterRecord:
    """How often a drafter has been right of late, in all rows, and how often it said it would."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter
        self._right = self._said = _TRIALS

    @property
    def trust(self) -> float:
        """What to multiply its confidence with."""
        return self._right / self._said

    def judge(self, confidences: Listed[float], num_accepted: int) -> None:
        """Of a draft, the first tokens that came true, and one that did not if there were more."""
        self.forget(1)
        self._right += num_accepted
        self._said += sum(confidences[: num_accepted + 1])

    def forget(self, num_steps: int) -> None:
        kept = _MEMORY**num_steps
        self._right = _TRIALS + kept * (self._right - _TRIALS)
        self._said = _TRIALS + kept * (self._said - _TRIALS)


@dataclass(slots=True)
class _Row:
    """A row's experience with the drafts that it has been given."""

    records: list[DrafterRecord]  # of who may have drafts for it
    hits: float = 0.0
    misses: float = 0.0
    record: DrafterRecord | None = None  # of whose the last one was
    confidences: Listed[float] = ()  # of that

    def probabilities(self, confidences: Listed[float], trust: float) -> list[float]:
        """That each token of a draft comes, and all before it."""
        total = self.hits + self.misses + _PRIOR
        hits, weight, most = self.hits / total, trust * _PRIOR / total, _PRIOR / total
        probability, probabilities = 1.0, []
        for confidence in confidences:
            probability *= hits + min(weight * confidence, most)
            probabilities.append(probability)
        return probabilities


class Speculator:
    """Implements `engine.schedule.speculation.Speculation`.

    Args:
        max_drafts: most for one row in one step.
        num_ahead: steps that are scheduled while one is in flight, which a row with drafts sits
            out: how far it has come is known only then.
    """

    def __init__(self, drafters: Listed[Drafter], max_drafts: int, num_ahead: int) -> None:
        self._records = [DrafterRecord(drafter) for drafter in drafters]
        self._max_drafts = max_drafts
        self._num_ahead = num_ahead
        self.costs = DecodeCosts()
        self._rows: dict[Sequence, _Row] = {}
        self._num_steps = 0  # since drafters were asked last
        self._num_rows = 1  # of which they were asked then
        self._seconds = 0.0  # that they took in this step
        # What it has saved of late to ask them, in steps, less what it took: at first they may try.
        self._worth = 1.0
        # By drafter: rows that were given drafts, drafts, and those that came true.
        self.num_drafts: Counter[str] = Counter()
        self.num_draft_tokens: Counter[str] = Counter()
        self.num_accepted: Counter[str] = Counter()

    def propose(self, sequences: list[Sequence], budget: int) -> dict[Sequence, list[int]]:
        """Drafts for rows that would each compute one token, at most so many in all."""
        budget = min(budget, self._max_drafts * len(sequences))
        self._seconds = 0.0
        self._num_steps += 1
        if budget <= 0 or (self._worth < 0 and self._num_steps < _SELDOM):
            return {}
        begin = time.perf_counter()
        costs = self.costs.of(len(sequences), np.arange(budget + 1))
        drafts = self._ask(sequences, costs) if _may_pay(len(sequences), costs) else {}
        num_drafts = sum(map(len, drafts.values()))
        self._num_steps, self._num_rows = 0, len(sequences)
        self._seconds = time.perf_counter() - begin
        spent = (costs[num_drafts] - costs[0] + self._seconds) / costs[0]
        self._worth -= _WEIGHT * (self._worth + float(spent))
        return drafts

    def count(self, num_rows: int, num_tokens: int, seconds: float) -> None:
        """A step that decodes has taken so long, with what it took to make drafts for it.

        Unless another step ran meanwhile.
        """
        own = seconds - self._seconds if self._num_ahead == 0 else seconds
        self.costs.count(num_rows, num_tokens, max(own, 1e-9))

    def _ask(self, sequences: list[Sequence], costs: np.ndarray) -> dict[Sequence, list[int]]:
        """The drafts that a step is to take; it costs so much by how many there are."""
        for record in self._records:
            record.forget(self._num_steps)
            record.drafter.prepare(sequences, self._max_drafts, self.costs)
        owners: list[Sequence] = []
        drafts: list[list[int]] = []
        probabilities: list[list[float]] = []
        for sequence in sequences:
            tokens, own = self._draft(sequence)
            if tokens and sum(own) > self._num_ahead:
                owners.append(sequence)
                drafts.append(tokens)
                probabilities.append(own)
        if not drafts:
            return {}
        counts = _choose(len(sequences), probabilities, costs)
        return {
            sequence: tokens[:count]
            for sequence, tokens, count in zip(owners, drafts, counts, strict=True)
            if count
        }

    def _draft(self, sequence: Sequence) -> tuple[list[int], list[float]]:
        """Of all drafters' the one that promises most, and the probabilities of its tokens."""
        row = self._rows.get(sequence)
        if row is None:
            row = _Row([own for own in self._records if own.drafter.serves(sequence)])
            self._rows[sequence] = row
        row.misses *= _FORGIVENESS**self._num_steps
        num_pending = sequence.num_pending
        best: tuple[list[int], list[float]] = [], []
        # The last token that it may have follows the last draft.
        limit = min(self._max_drafts, sequence.max_len - sequence.num_tokens - 1)
        if limit <= 0:
            return best
        promise = 0.0
        for record in row.records:
            tokens, confidences = record.drafter.draft(sequence, limit + num_pending)
            if len(tokens) <= num_pending:
                continue
            probabilities = row.probabilities(confidences, record.trust)[num_pending:]
            if (expected := sum(probabilities)) > promise:
                best, promise = (tokens[num_pending:], probabilities), expected
                row.record, row.confidences = record, confidences[num_pending:]
        return best

    def judge(self, sequence: Sequence, num_drafts: int, num_accepted: int) -> None:
        """What became of drafts that the sequence was given."""
        row = self._rows[sequence]
        row.hits = _DECAY * row.hits + num_accepted
        row.misses = _DECAY * row.misses + (num_accepted < num_drafts)
        self._worth += _WEIGHT * (num_accepted - self._num_ahead) / self._num_rows
        assert row.record is not None
        row.record.judge(row.confidences[:num_drafts], num_accepted)
        drafter = row.record.drafter
        drafter.judge(sequence, num_drafts, num_accepted)
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
        for record in self._records:
            record.drafter.end(sequence)


def _may_pay(num_rows: int, costs: np.ndarray) -> bool:
    """Whether the surest drafts would: else nobody is asked for any."""
    num_tokens = num_rows + np.arange(len(costs))
    return bool((num_tokens * costs[0] > MIN_GAIN * num_rows * costs)[1:].any())


def _choose(num_rows: int, rows: list[list[float]], costs: np.ndarray) -> list[int]:
    """How many drafts each row gets, given their probabilities, which fall within a row."""
    probabilities = np.concatenate(rows)
    order = (-probabilities).argsort(kind="stable")[: len(costs) - 1]
    expected = num_rows + np.concatenate(((0.0,), probabilities[order].cumsum()))
    counts = _SIZES[_SIZES.searchsorted(num_rows, "right") :] - num_rows
    counts = np.concatenate(((0,), counts[counts < len(order)], (len(order),)))
    rates = expected[counts] / costs[counts]
    rates[1:] /= MIN_GAIN
    taken = order[: counts[rates.argmax()]]
    owners = np.arange(len(rows)).repeat([len(own) for own in rows])
    return np.bincount(owners[taken], minlength=len(rows)).tolist()
