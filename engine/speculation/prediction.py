"""A request that says how its output may go on: OpenAI's predicted outputs."""

from engine.schedule.sequence import Sequence
from engine.speculation.drafter import Draft, Drafter
from engine.speculation.texts import RUN, Match, TextIndex

_SURE = 2 * RUN  # its beginning, as if so many tokens had agreed


class PredictionDrafter(Drafter):
    name = "prediction"

    def __init__(self) -> None:
        self._matches: dict[Sequence, Match] = {}

    def serves(self, sequence: Sequence) -> bool:
        return bool(sequence.request.prediction_token_ids)

    def draft(self, sequence: Sequence, limit: int) -> Draft:
        match = self._matches.get(sequence)
        if match is None:
            index = TextIndex(sequence.request.prediction_token_ids)
            match = self._matches[sequence] = Match(
                sequence.token_ids, index, place=0, length=_SURE, num_seen=sequence.num_prompt
            )
        return match.draft(limit)

    def judge(self, sequence: Sequence, num_drafts: int, num_accepted: int) -> None:
        accepted, rejected = sequence.num_predicted
        rejected += num_drafts - num_accepted
        sequence.num_predicted = accepted + num_accepted, rejected

    def end(self, sequence: Sequence) -> None:
        self._matches.pop(sequence, None)
