"""Turns step plans into tokens on one rank's device."""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.decoder import Batch, Decoder
from engine.decoder_config import DecoderConfig
from engine.device_tables import DeviceTables
from engine.loader import load_dummy_weights, load_weights
from engine.logits_processor import LogitsProcessor
from engine.logprobs import PendingLogprobs, PromptLogprobs, take_logprobs
from engine.memory import available_bytes
from engine.parallel import TensorParallel
from engine.step import ScheduledRow, StepPlan, StepResult
from engine.threads import num_compute_threads
from engine.transfer import ToHost, to_device
from kernels import select_ops

# Of the memory that is free once the weights are loaded; the rest is for activations and others.
_KV_CACHE_SHARE = {"cpu": 0.5, "cuda": 0.85}


class PendingStep:
    """A step that the device is running."""

    def __init__(
        self,
        tokens: ToHost | None = None,
        logprobs: tuple[list[int], PendingLogprobs] | None = None,
        prompt_logprobs: dict[int, list[PendingLogprobs]] | None = None,
    ) -> None:
        self._tokens = tokens
        self._logprobs = logprobs
        self._prompt_logprobs = prompt_logprobs or {}

    def result(self) -> StepResult:
        """What it has brought, once it has."""
        if self._tokens is None:
            return StepResult([])
        logprobs = {}
        if self._logprobs is not None:
            logprobs = dict(zip(self._logprobs[0], self._logprobs[1].wait(), strict=True))
        prompt_logprobs = {
            i: [position for part in parts for position in part.wait()]
            for i, parts in self._prompt_logprobs.items()
        }
        return StepResult(self._tokens.wait().tolist(), logprobs, prompt_logprobs)


class ModelRunner:
    """The model, its KV cache and the device tables of one rank.

    Every rank executes the same plans in the same order and samples the same tokens.
    """

    def __init__(
        self,
        config: EngineConfig,
        model_config: DecoderConfig,
        directory: Path,
        eos_token_ids: frozenset[int] = frozenset(),
        parallel: TensorParallel | None = None,
        show_progress: bool = False,
    ) -> None:
        self.device = select_device(config.device)
        self.parallel = parallel or TensorParallel()
        if self.device.type == "cpu":
            torch.set_num_threads(config.num_threads or num_compute_threads(self.parallel.size))
        elif config.quantization is not None:
            raise ValueError(
                f"quantization: {config.quantization!r} is for CPUs only; leave it out, or set "
                "device to 'cpu'"
            )
        self.ops = select_ops(self.device)
        self.dtype = getattr(torch, model_config.dtype if config.dtype == "auto" else config.dtype)
        self.max_len = config.max_model_len or model_config.max_position
        self.vocab_size = model_config.vocab_size
        self.eos_token_ids = eos_token_ids
        self._block_size = config.block_size
        self.model = self._build_model(model_config)
        if config.load_format == "dummy":
            load_dummy_weights(self.model, config.seed)
        else:
            load_weights(self.model, directory, show_progress)
        self.model.pack(config.quantization, show_progress)
        self.num_blocks = config.num_blocks or self._default_num_blocks(config, model_config)
        self.kv_caches = [
            self.ops.new_kv_cache(
                self.num_blocks,
                config.block_size,
                _local_kv_heads(model_config, self.parallel),
                model_config.head_dim,
                self.dtype,
                self.device,
            )
            for _ in range(model_config.num_layers)
        ]
        self.tables = DeviceTables(
            config.max_num_seqs, self.max_len, config.block_size, self.device
        )
        self._processor = LogitsProcessor(
            self.tables.token_ids, self.vocab_size, eos_token_ids, self.ops
        )
        self._num_logprobs: dict[int, int] = {}  # of the rows that want logprobs
        self._prompt_logprobs = PromptLogprobs(self.tables.token_ids, self.model, self.ops)

    def _build_model(self, model_config: DecoderConfig) -> Decoder:
        _check_divisible(model_config, self.parallel.size)
        previous = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with self.device:
                return Decoder(model_config, self.max_len, self.ops, self.parallel)
        finally:
            torch.set_default_dtype(previous)

    def _default_num_blocks(self, config: EngineConfig, model_config: DecoderConfig) -> int:
        """A share of the free memory, but no more than the rows could ever fill."""
        kv_heads = _local_kv_heads(model_config, self.parallel)
        token_bytes = 2 * model_config.num_layers * kv_heads * model_config.head_dim
        block_bytes = token_bytes * self.dtype.itemsize * config.block_size
        share = _KV_CACHE_SHARE[self.device.type]
        affordable = int(available_bytes(self.device) * share) // block_bytes
        usable = config.max_num_seqs * -(-self.max_len // config.block_size)
        if affordable == 0:
            raise MemoryError(
                f"no memory is left for the KV cache: one block takes {block_bytes} bytes; free "
                "some, or lower block_size or set num_blocks"
            )
        return self.parallel.agree_on_minimum(min(affordable, usable))

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> PendingStep:
        """Start a step, behind those before it; the host waits for nothing that a GPU does.

        The sampled tokens also stay in the device's tables, where the next step finds them.
        """
        self._enter_rows(plan)
        sampling = [row for row in plan.scheduled if row.samples]
        logits = self.forward(plan)
        if not sampling:
            return PendingStep()
        rows, positions = self._tensor(
            [[row.row for row in sampling], [row.start + row.num_tokens for row in sampling]]
        )
        tokens = self._sample(logits, sampling, rows, positions)
        self.tables.token_ids[rows, positions] = tokens
        return PendingStep(
            ToHost(tokens),
            self._take_logprobs(logits, sampling, tokens),
            self._prompt_logprobs.take([row.row for row in sampling]),
        )

    def _enter_rows(self, plan: StepPlan) -> None:
        for new in plan.new_rows:
            self.tables.enter(new)
            self._processor.enter(new)
            self._prompt_logprobs.enter(new)
            self._num_logprobs.pop(new.row, None)
            if new.params.logprobs is not None:
                self._num_logprobs[new.row] = new.params.logprobs
        self.tables.append_blocks(plan.scheduled)

    def _sample(
        self, logits: Tensor, sampling: list[ScheduledRow], rows: Tensor, positions: Tensor
    ) -> Tensor:
        """The next token of each row, [N] int64, from logits [N, V], which stay as they are."""
        ends = [row.start + row.num_tokens for row in sampling]
        processed = [
            i for i, row in enumerate(sampling) if self._processor.applies(row.row, ends[i])
        ]
        if not processed:
            return self._draw(logits, rows, positions)
        # In float32, for in 16 bits a small penalty would be lost in rounding; and only these rows,
        # for a copy of all logits would be felt.
        index = self._tensor(processed)
        own = logits[index].float()
        self._processor.process(
            own, [sampling[i].row for i in processed], [ends[i] for i in processed]
        )
        own_tokens = self._draw(own, rows[index], positions[index])
        self._processor.count(rows[index], own_tokens)
        if len(processed) == len(sampling):
            return own_tokens
        return self._draw(logits, rows, positions).index_copy(0, index, own_tokens)

    def _draw(self, logits: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        temperature, top_p, min_p = self.tables.shares[:, rows]
        top_k, seeds = self.tables.numbers[:, rows]
        return self.ops.sample(logits, temperature, top_k, top_p, min_p, seeds, positions)

    def _take_logprobs(
        self, logits: Tensor, sampling: list[ScheduledRow], tokens: Tensor
    ) -> tuple[list[int], PendingLogprobs] | None:
        """Of the rows that want them, and their indices in `sampling`; only the leader is asked."""
        if not self._num_logprobs or self.parallel.rank != 0:
            return None
        wanted = [i for i, row in enumerate(sampling) if row.row in self._num_logprobs]
        if not wanted:
            return None
        counts = [self._num_logprobs[sampling[i].row] for i in wanted]
        if len(wanted) < len(sampling):
            index = self._tensor(wanted)
            logits, tokens = logits[index], tokens[index]
        return wanted, take_logprobs(self.ops, logits, tokens, counts)

    def forward(self, plan: StepPlan) -> Tensor:
        """Logits [rows that sample, vocab] of a plan whose rows have been entered."""
        hidden = self.model(self._make_batch(plan.scheduled), self.kv_caches)
        self._prompt_logprobs.collect(plan.scheduled, hidden)
        ends = accumulate(row.num_tokens for row in plan.scheduled)
        last = [end - 1 for row, end in zip(plan.scheduled, ends, strict=True) if row.samples]
        return self.model.logits(hidden if len(last) == len(hidden) else hidden[self._tensor(last)])

    def _make_batch(self, scheduled: list[ScheduledRow]) -> Batch:
        lengths = [row.num_tokens for row in scheduled]
        rows, starts, ends = self._tensor(
            [
                [row.row for row in scheduled],
                [row.start for row in scheduled],
                [*accumulate(lengths)],
            ]
        )
        query_starts = torch.nn.functional.pad(ends, (1, 0))
        return self._prepare(rows, starts, query_starts, sum(lengths))

    def _prepare(self, rows: Tensor, starts: Tensor, query_starts: Tensor, total: int) -> Batch:
        """Look up in the tables what a step of `total` tokens computes.

        Args:
            rows, starts: [B] int64.
            query_starts: [B + 1] int64.
        """
        lengths = query_starts.diff()
        token_rows = rows.repeat_interleave(lengths, output_size=total)
        # A token's position: its index in the step, less its request's, plus where that starts.
        shift = (starts - query_starts[:-1]).repeat_interleave(lengths, output_size=total)
        positions = torch.arange(total, device=self.device) + shift
        blocks = self.tables.block_tables[token_rows, positions // self._block_size].long()
        return Batch(
            token_ids=self.tables.token_ids[token_rows, positions],
            positions=positions,
            slots=blocks * self._block_size + positions % self._block_size,
            query_starts=query_starts.int(),
            context_lens=(starts + lengths).int(),
            block_tables=self.tables.block_tables[rows],
        )

    def _tensor(self, values: Sequence[object]) -> Tensor:
        return to_device(values, torch.int64, self.device)


def select_device(name: str) -> torch.device:
    """The configured device; raises ValueError when it is not there."""
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise ValueError("device: 'cuda' was asked for, but torch sees no CUDA GPU; use 'cpu'")
    return torch.device("cuda" if name != "cpu" and has_cuda else "cpu")


def _check_divisible(model_config: DecoderConfig, size: int) -> None:
    kv_heads = model_config.num_kv_heads
    for name, value in (
        ("attention heads", model_config.num_heads),
        ("intermediate features", model_config.intermediate_size),
        ("key/value heads", max(kv_heads, size) if size % kv_heads == 0 else kv_heads),
    ):
        if value % size != 0:
            raise ValueError(f"the model's {value} {name} cannot be split over {size} ranks")


def _local_kv_heads(model_config: DecoderConfig, parallel: TensorParallel) -> int:
    return max(model_config.num_kv_heads // parallel.size, 1)
