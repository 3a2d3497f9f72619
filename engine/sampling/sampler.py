"""Hidden states to tokens: logits, what requests want done to them, a draw, log-probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

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
from engine.sampling.processor import LogitsProcessor, LogitsRows
from engine.sampling.thinking import ThinkingLimits
from engine.schedule.step import NewRow, ScheduledRow
from kernels import Ops


@dataclass(frozen=True)
class SamplingStep:
    """What a step is going to sample: of N positions of the rows that sample."""

    scheduled: Sequence[ScheduledRow]
    sampling: list[ScheduledRow]
    owners: list[int]  # index in `sampling` of each position's row
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
        self._model = model
        self._tables = tables
        self._ops = ops
        self._world = world
        self._device = token_ids.device
        self.matchers = GrammarMatchers(vocab_size, self._device)
        # The order is vLLM's: what is allowed, then biases and bans, then penalties.
        self.processors: list[LogitsProcessor] = [
            GrammarMask(self.matchers, world.rank, self._device, ops),
            AllowedTokens(vocab_size, self._device, ops),
            LogitBias(eos_token_ids, self._device),
            BadWords(token_ids),
            Penalties(token_ids, vocab_size, ops),
            ThinkingLimits(token_ids),
        ]
        self._num_logprobs: dict[int, int] = {}  # of the rows that want logprobs
        self._prompt_logprobs = PromptLogprobs(token_ids, model, ops)
        self._pooling = PromptPooling(model)

    def enter(self, new: NewRow) -> None:
        """A request enters a row; what the row held before is gone."""
        for processor in self.processors:
            processor.enter(new)
        self._prompt_logprobs.enter(new)
        self._pooling.enter(new)
        self._num_logprobs.pop(new.row, None)
        if new.params.logprobs is not None:
            self._num_logprobs[new.row] = new.params.logprobs

    def begin(self, scheduled: Sequence[ScheduledRow]) -> SamplingStep:
        """The step is about to run, for rows that have entered."""
        sampling = [row for row in scheduled if row.num_sampled]
        owners = [i for i, row in enumerate(sampling) for _ in range(row.num_sampled)]
        rows = [sampling[i].row for i in owners]
        positions = [
            position
            for row in sampling
            for position in range(row.end - row.num_sampled + 1, row.end + 1)
        ]
        processed: set[int] = set()
        for processor in self.processors:
            processed.update(processor.applies_to(rows, positions))
        at = processed_at = self._logits_rows(rows, positions)
        index = sorted(processed)
        if 0 < len(index) < len(rows):
            processed_at = self._logits_rows(
                [rows[i] for i in index], [positions[i] for i in index]
            )
        if index:
            for processor in self.processors:
                processor.prepare(processed_at)
        return SamplingStep(scheduled, sampling, owners, at, index, processed_at)

    def finish(self, step: SamplingStep, hidden: Tensor) -> PendingStep:
        """Sample from the step's hidden states [T, hidden].

        The tokens also go into the device's table, where the next step finds them.
        """
        self._prompt_logprobs.collect(step.scheduled, hidden)
        self._pooling.collect(step.scheduled, hidden)
        if not step.sampling:
            return PendingStep()
        logits = self.logits(step.scheduled, hidden)
        tokens = self._sample(logits, step)
        if self.matchers.constrained(step.at.rows):
            tokens = self._world.broadcast(tokens)  # only the leader follows the grammars
        self._tables.token_ids[step.at.row_index, step.at.position] = tokens
        brought = ToHost(tokens)
        return PendingStep(
            brought,
            [row.num_sampled for row in step.sampling],
            self._take_logprobs(logits, step, tokens),
            self._prompt_logprobs.take([row.row for row in step.sampling]),
            {step.owners[i]: why for i, why in self.matchers.accept(step.at.rows, brought).items()},
            self._pooling.take([row.row for row in step.sampling]),
        )

    def logits(self, scheduled: Sequence[ScheduledRow], hidden: Tensor) -> Tensor:
        """[N, vocab] at the N positions that are sampled, of a step's hidden states [T, hidden]."""
        ends = accumulate(row.num_tokens for row in scheduled)
        last = [
            index
            for row, end in zip(scheduled, ends, strict=True)
            for index in range(end - row.num_sampled, end)
        ]
        if len(last) < len(hidden):
            hidden = hidden[self._tensor(last)]
        return self._model.logits(hidden)

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
        temperature, top_p, min_p = self._tables.sampling_floats.index_select(1, at.row_index)
        top_k, seeds = self._tables.sampling_ints.index_select(1, at.row_index)
        return self._ops.sampling.sample(
            logits, temperature, top_k, top_p, min_p, seeds, at.position
        )

    def _take_logprobs(
        self, logits: Tensor, step: SamplingStep, tokens: Tensor
    ) -> tuple[list[int], PendingLogprobs] | None:
        """Of the rows that want them, with their indices; only the leader is asked."""
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

    def _logits_rows(self, rows: list[int], positions: list[int]) -> LogitsRows:
        return LogitsRows(rows, positions, *self._tensor([rows, positions]))

    def _tensor(self, values: Sequence[object]) -> Tensor:
        return to_device(values, torch.int64, self._device)

    def close(self) -> None:
        """Stop what runs beside this thread."""
        self.matchers.close()
