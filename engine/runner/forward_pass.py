"""From scheduled rows to hidden states: the model over its KV cache, launched or replayed."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.device.kv_cache import KVCacheLayout
from engine.device.recorded_steps import (
    RecordedSteps,
    Shape,
    default_sizes,
    draft_shapes,
    prompt_shapes,
)
from engine.device.tables import DeviceTables
from engine.device.transfer import to_device
from engine.models.shape import LanguageModel
from engine.schedule.step import StepPlan
from kernels import Ops
from kernels.types import Decodes, KVCache, StepRows

# Most tokens of a row that is attended to as one that decodes: each takes memory by its context's
# chunks.
_LONGEST = 32
# Of a step that is recorded as it comes. Larger ones take long, and seldom come again alike.
_MOST_TOKENS = 64


class ForwardPass:
    """One rank's model, device tables, KV cache and recorded steps.

    Args:
        max_drafts: most of a row in one step.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: LanguageModel,
        tables: DeviceTables,
        cache_layout: KVCacheLayout,
        ops: Ops,
        device: torch.device,
        max_drafts: int,
    ) -> None:
        self.model = model
        self._tables = tables
        self._cache_layout = cache_layout
        self._ops = ops
        self._device = device
        self.kv_caches: list[KVCache] = []
        records = model.is_recordable and not config.enforce_eager
        self._new_recorder = ops.new_recorder if records else None
        # Whether `record` takes time and memory.
        self.records_ahead = self._new_recorder is not None and self._new_recorder().ahead
        max_rows, max_tokens = config.step_size
        self._sizes: Sequence[int] = range(1, max_rows + 1)
        self._others: list[Shape] = []
        self._longest = min(1 + max_drafts, _LONGEST)  # most tokens of a row that decodes
        self._largest: Shape | None = None
        if self.records_ahead:
            self._sizes = config.cuda_graph_sizes or default_sizes(max_rows)
            most = min(config.cuda_graph_max_tokens or 0, max_tokens)
            self._others = prompt_shapes(most, max_rows)
            if max_drafts > 0 and not config.deterministic:  # which attends to all as to prompts
                self._others += draft_shapes(config.max_sampled, max_rows, self._longest)
        elif device.type == "cpu":
            if max_drafts > 0:
                self._largest = Shape(min(_MOST_TOKENS, max_tokens), max_rows, self._longest)
            for name in ("cuda_graph_sizes", "cuda_graph_max_tokens"):
                if (value := getattr(config, name)) is not None:
                    raise ValueError(f"{name}: {value} is for GPUs only; leave it out")
        self._recorded: RecordedSteps | None = None

    @property
    def recorded(self) -> str:
        """What has been recorded, in words."""
        return str(self._recorded) if self._recorded is not None else "no steps recorded"

    @property
    def num_replays(self) -> int:
        """Of recorded steps."""
        return self._recorded.num_replays if self._recorded is not None else 0

    @property
    def num_recordings(self) -> int:
        """Steps that were recorded, which takes longer than running them."""
        return self._recorded.num_recordings if self._recorded is not None else 0

    def close(self) -> None:
        """Let go of the KV cache and of what was recorded over it."""
        self._recorded = None
        self.kv_caches = []

    @torch.inference_mode()
    def allocate(self, num_blocks: Sequence[int]) -> None:
        """Make a KV cache of so many blocks for each group, in place of any there was.

        A draft model has the first group of those that there are.
        """
        self.close()
        layout = self._cache_layout
        own = num_blocks[: len(layout.groups)]
        self.kv_caches = layout.allocate(own, self._ops, self._device)

    @torch.inference_mode()
    def record(self) -> None:
        """Record steps over this cache, where the device has a use for it."""
        if self._new_recorder is not None:
            self._recorded = RecordedSteps(
                self._new_recorder(),
                self._sizes,
                self._others,
                self._largest,
                self._run,
                self._device,
            )

    def hidden_states(self, plan: StepPlan) -> Tensor:
        """[T, hidden] of a step's T tokens, in order; to be used before the next step."""
        rows, starts, lengths = plan.rows, plan.starts, plan.lengths
        if self._recorded is not None:
            hidden = self._recorded.run(rows, starts, lengths)
            if hidden is not None:
                return hidden
        packed = to_device([*rows, *starts, 0, *accumulate(lengths)], torch.int32, self._device)
        num_rows = len(rows)
        return self._run(
            StepRows(
                packed[:num_rows],
                packed[num_rows : 2 * num_rows],
                packed[2 * num_rows :],
                num_tokens=sum(lengths),
                decodes=Decodes.of(lengths, self._longest),  # the scheduler puts short ones first
                max_query_len=max(lengths),
            )
        )

    def _run(self, rows: StepRows) -> Tensor:
        """Hidden states [T, hidden].

        Only numbers that are the same for all steps of a shape come from the host.
        """
        specs, tables = [group.spec for group in self._cache_layout.groups], self._tables
        step = self._ops.prepare_step(
            rows, tables.token_ids, tables.block_tables, specs[0].block_size
        )
        plan = self._ops.attention.plan
        planned = tuple(plan(own, spec) for own, spec in zip(step.attention, specs, strict=True))
        return self.model(replace(step, attention=planned), self.kv_caches)
