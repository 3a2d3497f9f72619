"""Where a grammar leaves no choice, what it demands is a draft."""

from collections.abc import Callable
from functools import lru_cache

from engine.schedule.sequence import Sequence
from engine.speculation.drafter import NO_DRAFT, Draft, Drafter

_SURE = 0.97  # the text is certain, and how it is cut into tokens nearly so


class GrammarDrafter(Drafter):
    """
    Args:
        forced: of a row, and whether no step in flight is about it, (number of tokens, what its
            text must go on with after so many).
        encode: text to tokens.
    """

    name = "grammar"

    def __init__(
        self, forced: Callable[[int, bool], tuple[int, str]], encode: Callable[[str], list[int]]
    ) -> None:
        self._forced = forced
        self._encode = lru_cache(maxsize=1024)(encode)

    def serves(self, sequence: Sequence) -> bool:
        return sequence.request.params.structured_outputs is not None

    def draft(self, sequence: Sequence, limit: int) -> Draft:
        num_tokens, text = self._forced(sequence.row, sequence.num_pending == 0)
        if not text:
            return NO_DRAFT
        tokens = self._encode(text)
        since = sequence.token_ids[num_tokens:]
        if tokens[: len(since)] != since:
            return NO_DRAFT
        rest = tokens[len(since) :][:limit]
        return Draft(rest, [_SURE] * len(rest))
