"""Hidden states to tokens: logits, what requests want done to them, a draw, log-probabilities."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from operator import add

import numpy as np
import torch
from torch import Tensor

from engine.device.tables import DeviceTables
from engine.device.transfer import ToHost, to_device
from engine.models.shape import LanguageModel
from engine.ranks.rank_group import RankGroup
from engine.sampling.bans import AllowedTokens, BadWords
from engine.sampling.bias import LogitBias
from engine.sampling.grammar.matcher import GrammarMask, GrammarMatchers
from engine.sampling.logprobs import PendingLogprobs, PromptLogprobs, take_logprobs
from engine.sampling.penalties import Penalties
from engine.sampling.pending_step import PendingStep
from engine.sampling.pooling import PromptPooling
from engine.sampling.processor import LogitsProcessor, LogitsRows, ranges
from engine.sampling.thinking import ThinkingLimits
from engine.schedule.step import NewRow, StepPlan
from kernels import Ops


@dataclass(frozen=True)
class SamplingStep:
    """What a step is going to sample: of N positions of the rows that sample."""

    plan: StepPlan
    owners: Sequence[int]  # of each position, the index of its row among those that sample
    at: LogitsRows
    processed: list[int]  # positions whose logits are processed, by index
    processed_at: LogitsRows


class Sampler:
    """Draws the next tokens of rows, each a pure function of logits, seed and position.

    A step is begun before the model runs, so that the host computes masks meanwhile, and finished
    with its hidden states. Every rank samples the same tokens.
    """

    def __init__(
        self,
        model: LanguageModel,
        tables: DeviceTables,
        vocab_size: int,
        eos_token_ids: frozenset[int],
        ops: Ops,
        world: RankGroup,
    ) -> None:
        token_ids = tables.token_ids
        self.model = model
        self._tables = tables
        self._ops = ops
        self._world = world
        self._device = token_ids.device
        self.matchers = GrammarMatchers(vocab_size, self._device)
        # The order is vLLM's: what is allowed, then biases and bans, then penalties. The end of
        # thinking is last: whatever else is wanted gives way to it.
        self.processors: list[LogitsProcessor] = [
            GrammarMask(self.matchers, world.rank, self._device, ops),
            AllowedTokens(vocab_size, self._device, ops),
            LogitBias(eos_token_ids, self._device),
            BadWords(token_ids),
            Penalties(token_ids, vocab_size, ops),
            ThinkingLimits(token_ids),
        ]
        self._num_logprobs: dict[int, int] = {}  # of the rows that want logprobs
        self._prompt_logprobs = PromptLogprobs(token_ids, self._logits_of, ops)
        self._pooling = PromptPooling(self._logits_of)

    def enter(self, new: NewRow) -> None:
        """A request enters a row; what the row held before is gone."""
        for processor in self.processors:
            processor.enter(new)
        self._prompt_logprobs.enter(new)
        self._pooling.enter(new)
        self._num_logprobs.pop(new.row, None)
        if new.params.logprobs is not None:
            self._num_logprobs[new.row] = new.params.logprobs

    def begin(self, plan: StepPlan) -> SamplingStep:
        """The step is about to run, for rows that have entered."""
        rows, positions, owners = _sampled(plan)
        drafts = {draft.row: draft.token_ids for draft in plan.drafts}
        at = processed_at = self._logits_rows(rows, positions, drafts)
        processed: set[int] = set()
        for processor in self.processors:
            processed.update(processor.applies_to(rows, positions))
        index = sorted(processed)
        if 0 < len(index) < len(rows):
            own_rows, own_positions = [rows[i] for i in index], [positions[i] for i in index]
            processed_at = self._logits_rows(own_rows, own_positions, drafts)
        if index:
            for processor in self.processors:
                processor.prepare(processed_at)
        return SamplingStep(plan, owners, at, index, processed_at)

    def finish(self, step: SamplingStep, hidden: Tensor) -> PendingStep:
        """Sample from the step's hidden states [T, hidden].

        The tokens also go into the device's table, where the next step finds them.
        """
        self._prompt_logprobs.collect(step.plan, hidden)
        self._pooling.collect(step.plan, hidden)
        if not step.owners:
            return PendingStep()
        logits = self.logits(step.plan, hidden)
        tokens = self._sample(logits, step)
        if self.matchers.constrained(step.at.rows):
            tokens = self._world.broadcast(tokens)  # only the leader follows the grammars
        self._tables.token_ids[step.at.row_index, step.at.position] = tokens
        brought, plan = ToHost(tokens), step.plan
        return PendingStep(
            brought,
            [count for count in plan.num_sampled if count],
            self._take_logprobs(logits, step, tokens),
            self._prompt_logprobs.take(compress(plan.rows, plan.num_sampled)),
            {step.owners[i]: why for i, why in self.matchers.accept(step.at, brought).items()},
            self._pooling.take(compress(plan.rows, plan.num_sampled)),
        )

    def guess(self, plan: StepPlan, logits: Tensor) -> None:
        """Draw the tokens of rows that compute one, by a draft model's logits [N, vocab].

        By the same numbers as `finish` will, but without what else requests want done to logits.
        They go into the device's table.
        """
        rows, positions, _ = _sampled(plan)
        at = self._logits_rows(rows, positions, {})
        self._tables.token_ids[at.row_index, at.position] = self._draw(logits, at)

    def logits(self, plan: StepPlan, hidden: Tensor) -> Tensor:
        """[N, vocab] at the N positions that are sampled, of a step's hidden states [T, hidden]."""
        if sum(plan.num_sampled) < len(hidden):
            ends = np.cumsum(plan.lengths)
            hidden = hidden[self._tensor(ranges(ends - np.asarray(plan.num_sampled), ends)[1])]
        return self._logits_of(hidden)

    def _logits_of(self, hidden: Tensor) -> Tensor:
        return self.model.logits(hidden)

    def _sample(self, logits: Tensor, step: SamplingStep) -> Tensor:
        """The next tokens, [N] int64, from logits [N, V], which stay as they are."""
        if not step.processed:
            return self._draw(logits, step.at)
        # In float32, for in 16 bits a small penalty would be lost in rounding; and only these rows,
        # for a copy of all logits would be felt.
        index = self._tensor(step.processed)
        own = logits[index].float()
        for processor in self.processors:
            processor.process(own, step.processed_at)
        own_tokens = self._draw(own, step.processed_at)
        if len(step.processed) == len(logits):
            return own_tokens
        return self._draw(logits, step.at).index_copy(0, index, own_tokens)

    def _draw(self, logits: Tensor, at: LogitsRows) -> Tensor:
        return self._ops.sampling.sample(logits, self._tables.sampling, at.row_index, at.position)

    def _take_logprobs(
        self, logits: Tensor, step: SamplingStep, tokens: Tensor
    ) -> tuple[list[int], PendingLogprobs] | None:
        """Log-probabilities of the rows that want them, and which rows; on the leader alone."""
        if not self._num_logprobs or self._world.rank != 0:
            return None
        wanted = [i for i, row in enumerate(step.at.rows) if row in self._num_logprobs]
        if not wanted:
            return None
        counts = [self._num_logprobs[step.at.rows[i]] for i in wanted]
        if len(wanted) < len(tokens):
            index = self._tensor(wanted)
            logits, tokens = logits[index], tokens[index]
        return [step.owners[i] for i in wanted], take_logprobs(self._ops, logits, tokens, counts)

    def _logits_rows(
        self, rows: list[int], positions: list[int], drafts: Mapping[int, Sequence[int]]
    ) -> LogitsRows:
        row_index, position = self._tensor((rows, positions)).unbind()
        return LogitsRows(rows, positions, row_index, position, drafts)

    def _tensor(self, values: Sequence[object] | np.ndarray) -> Tensor:
        return to_device(values, torch.int64, self._device)

    def close(self) -> None:
        """Stop what runs beside this thread."""
        self.matchers.close()


def _sampled(plan: StepPlan) -> tuple[list[int], list[int], Sequence[int]]:
    """What a step samples: rows, positions, and which of the rows that sample each belongs to."""
    ends = list(map(add, plan.starts, plan.lengths))
    if max(plan.num_sampled, default=0) <= 1:  # nearly always
        rows = list(compress(plan.rows, plan.num_sampled))
        return rows, list(compress(ends, plan.num_sampled)), range(len(rows))
    num_sampled = np.asarray(plan.num_sampled)
    entry, position = ranges(np.array(ends) - num_sampled + 1, np.array(ends) + 1)
    owners = np.cumsum(num_sampled > 0)[entry] - 1
    return np.asarray(plan.rows)[entry].tolist(), position.tolist(), owners.tolist()
