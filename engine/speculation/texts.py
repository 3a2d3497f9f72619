"""Where in a text the end of a text has come before."""

from collections.abc import Iterable

from engine.speculation.drafter import NO_DRAFT, Draft

END_OF_TEXT = -1  # between texts of which one index is made
RUN = 3  # tokens that must agree at least
_LONGER = (6, 12, 24, 48)
_NUM_PLACES = 4  # the latest ones of a run that are looked at
# Tokens that are indexed at once: a long text is not to hold up a step.
_AT_ONCE = 4096
_LONGEST = 1024  # agreement makes no draft surer than so much of it does
# By how many tokens agree: as sure as these are many.
_CONFIDENCES = [length / (length + RUN) for length in range(2 * _LONGEST)]


class TextIndex:
    """A growing text by its runs of tokens.

    Candidates are the places after the run that a text ends with; of these the one counts before
    which most tokens agree. A suffix tree would find the same, at many times the cost for each
    token that is added.
    """

    def __init__(self, token_ids: list[int]) -> None:
        self.token_ids = token_ids
        self._latest: dict[tuple[int, ...], int] = {}  # the last place after a run
        self._earlier = [0] * RUN  # by place: the one before it after the same run, 0 for none

    def _catch_up(self) -> None:
        """Index what has been added to the text."""
        tokens, latest, earlier = self.token_ids, self._latest, self._earlier
        first = len(earlier)
        end = min(len(tokens), first + _AT_ONCE)
        if first >= end:
            return
        new = tokens[first - RUN : end - 1]
        for place, run in enumerate(zip(new, new[1:], new[2:], strict=False), first):
            earlier.append(latest.get(run, 0))
            latest[run] = place

    def find(self, text: list[int]) -> tuple[int, int]:
        """(place, length): what stands at the place follows `length` tokens that `text` ends with.

        The length is a lower bound; 0 if nothing is found.
        """
        self._catch_up()
        tokens, best, best_length = self.token_ids, 0, 0
        place = self._latest.get(tuple(text[-RUN:]), 0)
        for _ in range(_NUM_PLACES):
            if not place:
                break
            length = RUN
            for longer in _LONGER:
                if text[-longer:] != tokens[max(place - longer, 0) : place]:
                    break
                length = longer
            if length > best_length and tokens[place] != END_OF_TEXT:
                best, best_length = place, length
            place = self._earlier[place]
        return best, best_length


class Match:
    """A text that grows, and where it has agreed with an index: found once, and then followed.

    Args:
        text: compared from its end on.
        index: in which it is to be found.
        place, length: of a beginning that is known, from which `text` has gone on since it had
            `num_seen` tokens.
    """

    def __init__(
        self,
        text: list[int],
        index: TextIndex,
        place: int = 0,
        length: int = 0,
        num_seen: int = 0,
    ) -> None:
        self._text = text
        self._own = self._index = index
        self._place, self._length = place, length
        self._num_seen = num_seen

    def draft(self, limit: int, others: Iterable[TextIndex] = ()) -> Draft:
        """How the text goes on if it does as after the longest agreement, here or in the others."""
        if not self._follow():
            self._find(others)
            if not self._length:
                return NO_DRAFT
        place, text = self._place, self._index.token_ids
        tokens = text[place : place + limit]
        count = len(tokens)
        if END_OF_TEXT in tokens:
            del tokens[tokens.index(END_OF_TEXT) :]
        elif text is self._text and count < limit:  # it has repeated itself to its end
            tokens = (tokens * (limit // count + 1))[:limit]
        length = min(self._length, _LONGEST)
        return Draft(tokens, _CONFIDENCES[length : length + len(tokens)])

    def _follow(self) -> bool:
        """Whether the text has gone on as at the place, where there is more."""
        num_seen, self._num_seen = self._num_seen, len(self._text)
        if not self._length:
            return False
        end = self._place + self._num_seen - num_seen
        tokens = self._index.token_ids
        if self._text[num_seen:] != tokens[self._place : end]:
            return False
        self._length += end - self._place
        self._place = end
        return end < len(tokens) and tokens[end] != END_OF_TEXT

    def _find(self, others: Iterable[TextIndex]) -> None:
        self._index = self._own
        self._place, self._length = self._own.find(self._text)
        for index in others:
            place, length = index.find(self._text)
            if length > self._length:
                self._index, self._place, self._length = index, place, length
