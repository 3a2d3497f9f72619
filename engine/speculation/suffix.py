"""A text goes on as it, or another output of this engine, did after the same tokens.

After Oliaro et al., "SuffixDecoding", 2024. Outputs are shared where cached blocks are: between
requests of one salt and one owner. What is kept of them is bounded.
"""

from collections import OrderedDict
from collections.abc import Iterable

from engine.schedule.sequence import Sequence
from engine.speculation.ngram import NgramDrafter
from engine.speculation.texts import END_OF_TEXT, RUN, TextIndex

_NUM_TOKENS = 1 << 14  # of a generation of outputs
_NUM_SHARES = 16  # most that are kept, the least recently used goes first


class _Outputs:
    """Recent outputs: a generation that grows, and the one before it."""

    def __init__(self) -> None:
        self.generations = [TextIndex([])]

    def add(self, token_ids: list[int]) -> None:
        newest = self.generations[0]
        if len(newest.token_ids) >= _NUM_TOKENS:
            newest = TextIndex([])
            self.generations = [newest, self.generations[0]]
        newest.token_ids += [END_OF_TEXT, *token_ids[-_NUM_TOKENS:]]


class SuffixDrafter(NgramDrafter):
    name = "suffix"

    def __init__(self) -> None:
        super().__init__()
        self._shared: OrderedDict[tuple[str, str], _Outputs] = OrderedDict()

    def _others(self, sequence: Sequence) -> Iterable[TextIndex]:
        outputs = self._shared.get(_share(sequence)) if self._shared else None
        return outputs.generations if outputs is not None else ()

    def end(self, sequence: Sequence) -> None:
        super().end(sequence)
        if len(sequence.token_ids) == sequence.num_prompt:
            return
        share = _share(sequence)
        outputs = self._shared.setdefault(share, _Outputs())
        self._shared.move_to_end(share)
        # With the end of the prompt, by which the beginnings of outputs are found.
        outputs.add(sequence.token_ids[max(sequence.num_prompt - RUN, 0) :])
        if len(self._shared) > _NUM_SHARES:
            self._shared.popitem(last=False)


def _share(sequence: Sequence) -> tuple[str, str]:
    return sequence.request.cache_owner, sequence.request.cache_salt
