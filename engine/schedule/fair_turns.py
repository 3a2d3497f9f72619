"""Turns by what everybody has been served: virtual token counters (Sheng et al., OSDI 2024).

A flow's counter is what it has been served, divided by its weight; of those who wait, who has the
least goes first. A flow that comes back starts from where the others are: nobody saves up turns by
not asking. Rows are shared alike: who has more of them than is due gives up one.
"""

from collections import defaultdict

from engine.schedule.sequence import Sequence
from engine.schedule.turns import Turns

# A step computes many prompt tokens in the time of few output tokens.
_OUTPUT_COST = 2.0
# So many counters of clients with nothing in the queue are kept, at most.
_MANY = 1024


class FairTurns(Turns):
    """Turns of the scheduling policy "fair"; within a flow they are in order of arrival."""

    counts_tokens = True

    def __init__(self) -> None:
        super().__init__()
        self._floor = 0.0  # the counter of who went last
        self._counters: dict[str, float] = {}

    def counter(self, flow: str) -> float:
        return self._counters.get(flow, self._floor)

    def wait(self, flow: str) -> None:
        if flow not in self._num_waiting:
            least = min(map(self.counter, self._num_waiting), default=self._floor)
            self._counters[flow] = max(self.counter(flow), least)
            if len(self._counters) > _MANY + len(self._num_waiting):
                self._drop()
        super().wait(flow)

    def leave(self, flow: str, turn: int = 0) -> None:
        super().leave(flow, turn)
        if turn:
            self._floor = max(self._floor, self.counter(flow))

    def first(self, waiting: list[Sequence]) -> Sequence:
        return min(waiting, key=lambda sequence: self.counter(sequence.request.flow))

    def charge(self, sequence: Sequence, num_prompt: int = 0, num_output: int = 0) -> None:
        request = sequence.request
        cost = (num_prompt + num_output * _OUTPUT_COST) / request.weight
        self._counters[request.flow] = self.counter(request.flow) + cost

    def victim(self, first: Sequence, running: list[Sequence]) -> Sequence | None:
        rows: dict[str, float] = defaultdict(float)  # by weight
        for sequence in running:
            rows[sequence.request.flow] += 1 / sequence.request.weight
        most = max(rows, key=rows.__getitem__, default="")
        if rows[most] <= rows[first.request.flow] + 1 / first.request.weight:
            return None
        return [sequence for sequence in running if sequence.request.flow == most][-1]

    def _drop(self) -> None:
        """Half of the counters of flows with nothing in the queue, the lowest ones.

        A flow that is dropped and comes back starts from the highest of them.
        """
        idle = [flow for flow in self._counters if flow not in self._num_waiting]
        for flow in sorted(idle, key=self.counter)[: len(idle) // 2]:
            self._floor = max(self._floor, self._counters.pop(flow))
