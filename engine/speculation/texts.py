"""Where in a text the end of a text has come before."""

from engine.speculation.drafter import Draft

END_OF_TEXT = -1  # between texts of which one index is made
RUN = 3  # tokens that must agree at least
_LONGER = (6, 12, 24, 48)
_NUM_PLACES = 4  # the latest ones of a run that are remembered
# Tokens that are indexed at once: a long text is not to hold up a step.
_AT_ONCE = 4096


class TextIndex:
    """A growing text by its runs of tokens.

    Candidates are the places after the run that a text ends with; of these the one counts before
    which most tokens agree. A suffix tree would find the same, at many times the cost for each
    token that is added.
    """

    def __init__(self, token_ids: list[int]) -> None:
        self.token_ids = token_ids
        self._next = RUN  # the first token whose place is not indexed
        self._places: dict[tuple[int, ...], list[int]] = {}

    def catch_up(self) -> None:
        """Index what has been added to the text."""
        tokens, places = self.token_ids, self._places
        end = min(len(tokens), self._next + _AT_ONCE)
        for place in range(self._next, end):
            found = places.setdefault(tuple(tokens[place - RUN : place]), [])
            found.append(place)
            if len(found) > _NUM_PLACES:
                del found[0]
        self._next = max(self._next, end)

    def draft(self, text: list[int], limit: int) -> Draft:
        """How `text`, which may be this one, goes on if it goes on as here."""
        place, length = self._find(text)
        if not length:
            return Draft()
        draft = self.continuation(place, length, limit)
        period = len(draft.token_ids)
        if text is self.token_ids and 0 < period < limit:  # it has repeated itself to its end
            tokens = [draft.token_ids[i % period] for i in range(limit)]
            return Draft(tokens, _confidences(length, limit))
        return draft

    def _find(self, text: list[int]) -> tuple[int, int]:
        """(place, length): what stands at the place follows `length` tokens that `text` ends with.

        The length is a lower bound; 0 if nothing is found.
        """
        best = 0, 0
        for place in reversed(self._places.get(tuple(text[-RUN:]), ())):
            length = RUN
            for longer in _LONGER:
                if text[-longer:] != self.token_ids[max(place - longer, 0) : place]:
                    break
                length = longer
            if length > best[1]:
                best = place, length
        return best

    def continuation(self, place: int, length: int, limit: int) -> Draft:
        """What stands at a place, before which so many tokens agree."""
        tokens = self.token_ids[place : place + limit]
        if END_OF_TEXT in tokens:
            del tokens[tokens.index(END_OF_TEXT) :]
        return Draft(tokens, _confidences(length, len(tokens)))


def _confidences(length: int, count: int) -> list[float]:
    """As sure as the agreement is long, which each token that comes makes longer."""
    return [(length + i) / (length + i + RUN) for i in range(count)]
