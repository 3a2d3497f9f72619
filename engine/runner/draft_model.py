"""A small model that guesses how rows go on, for the large one to check."""

import time
from collections.abc import Sequence

import numpy as np
import torch

from engine.config import EngineConfig
from engine.device.kv_cache import KVCacheLayout
from engine.device.tables import DeviceTables
from engine.device.transfer import to_device
from engine.models.shape import LanguageModel
from engine.runner.forward_pass import ForwardPass
from engine.sampling.processor import ranges
from engine.sampling.sampler import Sampler
from engine.schedule.step import DraftedTokens, DraftRow, StepPlan
from kernels import Ops


class DraftModel:
    """Computes whatever the large model does, over a KV cache of its own of the same blocks.

    So a block holds the same tokens in both: what is found cached, preempted, given back or copied
    to host memory is so in both. What it drafts lies behind a row's tokens, in blocks that the row
    holds, until the step that checks it computes these places anew.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: LanguageModel,
        layout: KVCacheLayout,
        tables: DeviceTables,
        sampler: Sampler,
        ops: Ops,
        device: torch.device,
        max_drafts: int,
    ) -> None:
        self._model = model
        self._tables = tables
        self._sampler = sampler
        self._device = device
        self.forward_pass = ForwardPass(
            config, model, tables.first_group, layout, ops, device, max_drafts
        )

    def follow(self, plan: StepPlan) -> None:
        """Compute what the large model computes."""
        self.forward_pass.hidden_states(plan)

    @torch.inference_mode()
    def draft(self, rows: Sequence[DraftRow]) -> DraftedTokens:
        """A token after the other, drawn as the large model's are; waits for the device."""
        first = np.array([row.position + 1 for row in rows])
        num_pending, num_drafts = np.array([(row.num_pending, row.num_drafts) for row in rows]).T
        pending = self._read(rows, first - num_pending, first)
        begin = time.perf_counter()
        num_steps = int(num_drafts.max())
        for i in range(num_steps):
            plan = StepPlan()
            for row in rows:
                if row.num_drafts > i:
                    plan.add(row.row, row.position + i, num_tokens=1, num_sampled=1)
            self._sampler.guess(plan, self._model.logits(self.forward_pass.hidden_states(plan)))
        drafts = self._read(rows, first, first + num_drafts)
        seconds = (time.perf_counter() - begin) / num_steps
        return DraftedTokens([a + b for a, b in zip(pending, drafts, strict=True)], seconds)

    def _read(
        self, rows: Sequence[DraftRow], starts: np.ndarray, ends: np.ndarray
    ) -> list[list[int]]:
        """Tokens of these places, which steps have left on the device."""
        index, positions = ranges(starts, ends)
        where = np.stack((np.array([row.row for row in rows])[index], positions))
        own_rows, own_positions = to_device(where, torch.int64, self._device)
        tokens = self._tables.token_ids[own_rows, own_positions].tolist()
        bounds = np.cumsum(ends - starts).tolist()
        return [tokens[a:b] for a, b in zip([0, *bounds], bounds, strict=False)]
