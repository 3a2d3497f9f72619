"""Log-probabilities from logits, of sampled tokens and of the prompt's own."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from engine.device.transfer import ToHost
from engine.schedule.step import NewRow, StepPlan, TokenLogprobs
from kernels import Ops

# Positions whose logits are in memory at once: they are many times larger than hidden states.
_SLICE = 128


@dataclass
class _Prompt:
    length: int
    count: int  # most probable tokens wanted at each position
    collected: "list[PendingLogprobs]" = field(default_factory=list)


class PromptLogprobs:
    """Collects the prompts', which are computed in chunks and come with the first sampled token.

    Every rank computes them, for all take part in computing logits.
    """

    def __init__(self, token_ids: Tensor, logits: Callable[[Tensor], Tensor], ops: Ops) -> None:
        """
        Args:
            token_ids: the device's table.
            logits: of hidden states, [N, hidden] -> [N, vocab].
        """
        self._token_ids = token_ids
        self._logits = logits
        self._ops = ops
        self._prompts: dict[int, _Prompt] = {}

    def enter(self, new: NewRow) -> None:
        """A request enters a row; one that comes with output has had its prompt's logprobs."""
        self._prompts.pop(new.row, None)
        count = new.params.prompt_logprobs
        if count is not None and len(new.token_ids) == new.num_prompt_tokens:
            self._prompts[new.row] = _Prompt(new.num_prompt_tokens, count)

    def collect(self, plan: StepPlan, hidden: Tensor) -> None:
        """Take what a step's hidden states [T, hidden] say about the tokens that follow them."""
        if not self._prompts:
            return
        first = 0  # index of the row's first hidden state
        for row in plan.scheduled:
            prompt = self._prompts.get(row.row)
            if prompt is not None:
                end = min(row.end, prompt.length - 1)
                for start in range(row.start, end, _SLICE):
                    stop = min(start + _SLICE, end)
                    own = hidden[first + start - row.start : first + stop - row.start]
                    following = self._token_ids[row.row, start + 1 : stop + 1]
                    logits = self._logits(own)
                    counts = [prompt.count] * len(own)
                    prompt.collected.append(take_logprobs(self._ops, logits, following, counts))
            first += row.num_tokens

    def take(self, rows: Iterable[int]) -> "dict[int, list[PendingLogprobs]]":
        """Of those of the rows, which have been computed to their end, that want them; by index."""
        if not self._prompts:
            return {}
        return {
            i: self._prompts.pop(row).collected
            for i, row in enumerate(rows)
            if row in self._prompts
        }


class PendingLogprobs:
    """Log-probabilities at N positions, on their way to the host."""

    def __init__(self, ids: Tensor, logprobs: Tensor, ranks: Tensor, counts: Sequence[int]) -> None:
        self._ids, self._logprobs, self._ranks = ToHost(ids), ToHost(logprobs), ToHost(ranks)
        self._counts = counts

    def wait(self) -> list[TokenLogprobs]:
        ids, logprobs, ranks = (
            arrived.wait().tolist() for arrived in (self._ids, self._logprobs, self._ranks)
        )
        return [
            TokenLogprobs(rank, own_ids[: 1 + count], own_logprobs[: 1 + count])
            for rank, own_ids, own_logprobs, count in zip(
                ranks, ids, logprobs, self._counts, strict=True
            )
        ]


def take_logprobs(
    ops: Ops, logits: Tensor, token_ids: Tensor, counts: Sequence[int]
) -> PendingLogprobs:
    """For logits [N, V] and the tokens at hand [N], counts[i] most probable tokens of row i."""
    taken = ops.sampling.top_logprobs(logits, token_ids, min(max(counts), logits.shape[1]))
    return PendingLogprobs(*taken, counts)
