"""From scheduled rows to hidden states: the model over its KV cache, launched or replayed."""

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config import EngineConfig
from engine.decoder import Batch, Decoder
from engine.device_tables import DeviceTables
from engine.graphs import DecodeGraphs, default_sizes, select_recorder
from engine.kv_cache import KVCacheShape
from engine.step import ScheduledRow
from engine.transfer import to_device
from kernels import Ops
from kernels.reference import KVCache


class ForwardPass:
    """One rank's model, device tables, KV cache and recorded decoding steps.

    The last row of the tables and the last block of the cache belong to no request: they are what
    the padding of a recorded batch reads and writes.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: Decoder,
        tables: DeviceTables,
        cache_shape: KVCacheShape,
        ops: Ops,
        device: torch.device,
    ) -> None:
        self.model = model
        self.num_replays = 0  # of recorded steps
        self._tables = tables
        self._cache_shape = cache_shape
        self._ops = ops
        self._device = device
        self._kv_caches: list[KVCache] = []
        self._recorder = None if config.enforce_eager else select_recorder(device)
        if self._recorder is None and config.cuda_graph_sizes is not None:
            raise ValueError(
                f"cuda_graph_sizes: {config.cuda_graph_sizes} is for GPUs only; leave it out"
            )
        self._sizes = config.cuda_graph_sizes or default_sizes(config.max_num_seqs)
        self._graphs: DecodeGraphs | None = None

    @property
    def records(self) -> bool:
        return self._recorder is not None

    def close(self) -> None:
        """Let go of the KV cache and of what was recorded over it."""
        self._graphs = None
        self._kv_caches = []

    @torch.inference_mode()
    def allocate(self, num_blocks: int) -> None:
        """Make a KV cache of so many blocks and the padding's, in place of any there was."""
        self.close()
        self._kv_caches = self._cache_shape.allocate(num_blocks + 1, self._ops, self._device)
        self._tables.block_tables[-1] = num_blocks

    @torch.inference_mode()
    def record(self) -> None:
        """Record decoding over this cache, where the device has a use for it."""
        if self._recorder is not None:
            padding_row = len(self._tables.token_ids) - 1
            self._graphs = DecodeGraphs(
                self._recorder, self._sizes, self._decode, padding_row, self._device
            )

    def hidden_states(self, scheduled: Sequence[ScheduledRow]) -> Tensor:
        """[T, hidden] of a step's T tokens, in order; to be used before the next step."""
        rows = [row.row for row in scheduled]
        starts = [row.start for row in scheduled]
        lengths = [row.num_tokens for row in scheduled]
        total = sum(lengths)
        if total == len(rows) and self._graphs is not None and self._graphs.fits(len(rows)):
            self.num_replays += 1
            return self._graphs.run(rows, starts)
        inputs = to_device([rows, starts, [*accumulate(lengths)]], torch.int64, self._device)
        return self._run(inputs[0], inputs[1], F.pad(inputs[2], (1, 0)), total)

    def _decode(self, rows: Tensor, starts: Tensor) -> Tensor:
        """As `_run`, with one token in each row."""
        query_starts = torch.arange(len(rows) + 1, device=self._device)
        return self._run(rows, starts, query_starts, len(rows))

    def _run(self, rows: Tensor, starts: Tensor, query_starts: Tensor, num_tokens: int) -> Tensor:
        """Hidden states [num_tokens, hidden].

        Args:
            rows, starts: [B] int64, the rows of the tables and their first tokens in this step.
            query_starts: [B + 1] int64, cumulative numbers of tokens from 0 to num_tokens.
        """
        lengths = query_starts.diff()
        token_rows = rows.repeat_interleave(lengths, output_size=num_tokens)
        # A token's position: its index in the step, less its request's, plus where that starts.
        shift = (starts - query_starts[:-1]).repeat_interleave(lengths, output_size=num_tokens)
        positions = torch.arange(num_tokens, device=self._device) + shift
        block_size = self._cache_shape.block_size
        blocks = self._tables.block_tables[token_rows, positions // block_size].long()
        batch = Batch(
            token_ids=self._tables.token_ids[token_rows, positions],
            positions=positions,
            slots=blocks * block_size + positions % block_size,
            query_starts=query_starts.int(),
            context_lens=(starts + lengths).int(),
            block_tables=self._tables.block_tables[rows],
        )
        hidden: Tensor = self.model(batch, self._kv_caches)
        return hidden
