"""A prompt's hidden states as one vector, which comes with the first sampled token."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.device.transfer import ToHost, to_device
from engine.sampling_params import Pooling
from engine.schedule.step import NewRow, StepPlan


@dataclass
class _Prompt:
    length: int
    pooling: Pooling
    vector: Tensor | None = None  # so far


class PromptPooling:
    """Pools prompts as they are computed, in chunks. Every rank does, for all compute logits."""

    def __init__(self, logits: Callable[[Tensor], Tensor]) -> None:
        """
        Args:
            logits: of hidden states, [N, hidden] -> [N, labels] or [N, vocab].
        """
        self._logits = logits
        self._prompts: dict[int, _Prompt] = {}

    def enter(self, new: NewRow) -> None:
        """A request enters a row; one that comes with output has had its vector."""
        self._prompts.pop(new.row, None)
        if new.params.pooling is not None and len(new.token_ids) == new.num_prompt_tokens:
            self._prompts[new.row] = _Prompt(new.num_prompt_tokens, new.params.pooling)

    def collect(self, plan: StepPlan, hidden: Tensor) -> None:
        """Take what is wanted of a step's hidden states [T, hidden]."""
        if not self._prompts:
            return
        first = 0  # index of the row's first hidden state
        for row in plan.scheduled:
            prompt = self._prompts.get(row.row)
            if prompt is not None:
                end = min(row.start + row.num_tokens, prompt.length)
                self._add(prompt, hidden[first : first + end - row.start], row.start, end)
            first += row.num_tokens

    def _add(self, prompt: _Prompt, states: Tensor, start: int, end: int) -> None:
        """The states of tokens start .. end - 1."""
        match prompt.pooling.kind:
            case "last" if end == prompt.length:
                prompt.vector = self._of_last(prompt.pooling, states[-1:])
            case "labels" if end == prompt.length:
                prompt.vector = self._logits(states[-1:])[0].float()
            case "cls" if start == 0:
                prompt.vector = _kept(states[0])
            case "mean":
                total = states.float().sum(0)
                prompt.vector = total if prompt.vector is None else prompt.vector + total
                if end == prompt.length:
                    prompt.vector = prompt.vector / prompt.length

    def _of_last(self, pooling: Pooling, state: Tensor) -> Tensor:
        if not pooling.logits:
            return _kept(state[0])
        index = to_device(pooling.logits, torch.int64, state.device)
        return self._logits(state)[0, index].float()

    def take(self, rows: Iterable[int]) -> dict[int, ToHost]:
        """Of those of the rows, which have been computed to their end, that want one; by index."""
        vectors: dict[int, ToHost] = {}
        for i, row in enumerate(rows if self._prompts else ()):
            prompt = self._prompts.pop(row, None)
            if prompt is not None and prompt.vector is not None:
                vectors[i] = ToHost(prompt.vector)
        return vectors


def _kept(state: Tensor) -> Tensor:
    """In float32, and beyond the step, whose states the next one may overwrite."""
    return state.to(torch.float32, copy=True)
