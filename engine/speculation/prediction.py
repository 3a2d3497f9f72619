"""A request that says how its output may go on: OpenAI's predicted outputs."""

from engine.schedule.sequence import Sequence
from engine.speculation.drafter import Draft, Drafter
from engine.speculation.texts import RUN, TextIndex

_SURE = 2 * RUN  # its beginning, as if so many tokens had agreed


class PredictionDrafter(Drafter):
    name = "prediction"

    def __init__(self) -> None:
        self._predictions: dict[str, TextIndex] = {}

    def draft(self, sequence: Sequence, limit: int) -> Draft:
        predicted = sequence.request.prediction_token_ids
        if not predicted:
            return Draft()
        index = self._predictions.setdefault(sequence.id, TextIndex(predicted))
        index.catch_up()
        output = sequence.output_token_ids
        if output == predicted[: len(output)]:
            return index.continuation(len(output), _SURE, limit)
        return index.draft(output, limit)

    def end(self, sequence: Sequence) -> None:
        self._predictions.pop(sequence.id, None)
