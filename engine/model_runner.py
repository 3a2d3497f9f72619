"""Turns step plans into tokens on one rank's device."""

import sys
from collections.abc import Sequence
from concurrent.futures import Future
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.decoder_config import DecoderConfig
from engine.device_tables import DeviceTables
from engine.forward_pass import ForwardPass
from engine.grammar_matcher import GrammarMatchers
from engine.host_cache import HostCache
from engine.kv_cache import KVCacheShape
from engine.loader import load_model
from engine.logits_processor import LogitsProcessor
from engine.logprobs import PendingLogprobs, PromptLogprobs, take_logprobs
from engine.memory import DeviceMemory, MemoryMeter, MemoryUse
from engine.parallel import TensorParallel
from engine.pending_step import PendingStep
from engine.step import ScheduledRow, StepPlan
from engine.threads import num_compute_threads
from engine.transfer import ToHost, to_device
from engine.warm_up import warm_up_plans
from kernels import AttentionNeeds, select_ops, watch_compilation


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
        config.check_device(self.device.type)
        self.dtype = getattr(torch, model_config.dtype if config.dtype == "auto" else config.dtype)
        self.cache_dtype = torch.float8_e4m3fn if config.kv_cache_dtype == "fp8" else self.dtype
        self.ops = select_ops(
            self.device,
            AttentionNeeds(
                config.attention_backend,
                self.dtype,
                self.cache_dtype,
                model_config.head_dim,
                config.block_size,
            ),
        )
        self.max_len = config.max_model_len or model_config.max_position
        self.vocab_size = model_config.vocab_size
        self.eos_token_ids = eos_token_ids
        _check_divisible(model_config, self.parallel.size)
        self._config = config
        meter = MemoryMeter(self.device)
        before = meter.in_use()
        self.model = load_model(
            config,
            model_config,
            directory,
            self.max_len,
            self.dtype,
            self.device,
            self.ops,
            self.parallel,
            show_progress,
        )
        weights = max(meter.in_use() - before, 0)
        self.tables = DeviceTables(
            config.max_num_seqs, self.max_len, config.block_size, self.device
        )
        self._processor = LogitsProcessor(
            self.tables.token_ids, self.vocab_size, eos_token_ids, self.ops
        )
        self.matchers = GrammarMatchers(self.vocab_size, self.device)
        self._num_logprobs: dict[int, int] = {}  # of the rows that want logprobs
        self._prompt_logprobs = PromptLogprobs(self.tables.token_ids, self.model, self.ops)
        self.cache_shape = KVCacheShape.of(
            model_config, self.parallel, config.block_size, self.cache_dtype
        )
        self.forward_pass = ForwardPass(
            config, self.model, self.tables, self.cache_shape, self.ops, self.device
        )
        block_bytes, host_bytes = self.cache_shape.block_bytes, config.host_cache_memory_bytes
        if 0 < host_bytes < block_bytes:
            raise ValueError(
                f"host_cache_memory_bytes: {host_bytes} is less than one block, which takes "
                f"{block_bytes}; give more, or 0"
            )
        self.num_host_blocks = host_bytes // block_bytes
        self._host_cache: HostCache | None = None
        if self.num_host_blocks:
            self._host_cache = HostCache(self.num_host_blocks, block_bytes, self.device)
        watch = watch_compilation(self.device)
        self.memory = self._open(meter, weights)
        watch.start_serving()
        # Kernels that were compiled while requests were waiting; there should be none.
        self.late_compilations = watch.late
        if show_progress:
            blocks = f"{self.num_blocks} KV cache blocks of {self.cache_dtype}"
            print(f"{blocks} on {self.device}; {self.memory}", file=sys.stderr)
            print(f"{self.ops.name} kernels", file=sys.stderr)

    @torch.inference_mode()
    def _open(self, meter: MemoryMeter, weights: int) -> MemoryUse:
        """Allocate the KV cache, once it is known what the rest takes at its peak."""
        in_use = peak = meter.in_use()
        graphs, activations = 0, None
        if self.device.type == "cuda" or self.forward_pass.records_ahead:
            in_use, peak, graphs = self._rehearse(meter)
            activations = peak - in_use
        memory = DeviceMemory.of(self.device, self.parallel.size)
        host_cache = self.num_host_blocks * self.cache_shape.block_bytes
        own = host_cache if memory.is_host else peak + graphs
        self.num_blocks = self._choose_num_blocks(memory, own)
        self.forward_pass.allocate(self.num_blocks)
        self.forward_pass.record()
        kv_cache = self.num_blocks * self.cache_shape.block_bytes
        return MemoryUse(
            weights=weights,
            other=max(in_use - weights, 0),
            activations=activations,
            graphs=graphs,
            kv_cache=kv_cache,
            host_cache=host_cache,
            left=memory.left(own, kv_cache),
        )

    def _rehearse(self, meter: MemoryMeter) -> tuple[int, int, int]:
        """Run the largest steps and record all graphs, over a cache of one block.

        Returns (bytes in use between steps, bytes at the peak of a step, bytes of the graphs).
        """
        self.forward_pass.allocate(1)
        meter.reset_peak()
        for plan in warm_up_plans(self._config, self.max_len):
            self.launch(plan).result()
        peak, in_use = meter.peak(), meter.in_use()
        self.forward_pass.record()
        graphs = max(meter.in_use() - in_use, 0)
        self.forward_pass.close()
        return in_use, max(peak, in_use), graphs

    def _choose_num_blocks(self, memory: DeviceMemory, own_bytes: int) -> int:
        config, block_bytes = self._config, self.cache_shape.block_bytes
        if config.num_blocks is not None:
            return config.num_blocks
        budget = config.kv_cache_memory_bytes
        if budget is None:
            budget = memory.kv_cache_budget(own_bytes, config.gpu_memory_utilization)
            if memory.is_host:  # others need it too: no more than the rows could ever fill
                blocks_per_row = -(-self.max_len // config.block_size)
                budget = min(budget, config.max_num_seqs * blocks_per_row * block_bytes)
        num_blocks = budget // block_bytes
        if num_blocks < 1:
            raise MemoryError(
                f"no memory is left for the KV cache: it has {budget} bytes, and one block "
                f"takes {block_bytes}; free some, lower block_size or "
                "max_num_batched_tokens, or raise kv_cache_memory_bytes or, on a GPU, "
                "gpu_memory_utilization"
            )
        return self.parallel.agree_on_minimum(num_blocks)

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> PendingStep:
        """Start a step, behind those before it; the host waits for nothing that a GPU does.

        The sampled tokens also stay in the device's tables, where the next step finds them.
        """
        if self._host_cache is not None:
            self._host_cache.run(plan.copies, self.forward_pass.kv_caches)
        self._enter_rows(plan)
        sampling = [row for row in plan.scheduled if row.samples]
        processed = self._processor.concerned(sampling)
        constrained = self.matchers.constrained(sampling)
        mask = None  # of the rows to be processed, computed while the model runs
        if constrained and self.parallel.rank == 0:
            mask = self.matchers.start([sampling[i].row for i in processed])
        logits = self.forward(plan)
        if not sampling:
            return PendingStep()
        rows, positions = self._tensor(
            [[row.row for row in sampling], [row.end for row in sampling]]
        )
        tokens = self._sample(logits, sampling, rows, positions, processed, mask)
        if constrained:  # only the leader follows the grammars, so its choice is everyone's
            tokens = self.parallel.broadcast(tokens)
        self.tables.token_ids[rows, positions] = tokens
        brought = ToHost(tokens)
        errors = self.matchers.accept(sampling, constrained, brought)
        return PendingStep(
            brought,
            self._take_logprobs(logits, sampling, tokens),
            self._prompt_logprobs.take([row.row for row in sampling]),
            errors,
        )

    def _enter_rows(self, plan: StepPlan) -> None:
        for new in plan.new_rows:
            self.tables.enter(new)
            self._processor.enter(new)
            self._prompt_logprobs.enter(new)
            self.matchers.enter(new)
            self._num_logprobs.pop(new.row, None)
            if new.params.logprobs is not None:
                self._num_logprobs[new.row] = new.params.logprobs
        self.tables.append_blocks(plan.scheduled)

    def _sample(
        self,
        logits: Tensor,
        sampling: list[ScheduledRow],
        rows: Tensor,
        positions: Tensor,
        processed: list[int],
        mask: "Future[Tensor] | None",
    ) -> Tensor:
        """The next token of each row, [N] int64, from logits [N, V], which stay as they are."""
        if not processed:
            return self._draw(logits, rows, positions)
        # In float32, for in 16 bits a small penalty would be lost in rounding; and only these rows,
        # for a copy of all logits would be felt.
        index = self._tensor(processed)
        own = logits[index].float()
        self._processor.process(
            own,
            [sampling[i].row for i in processed],
            [sampling[i].end for i in processed],
            mask.result() if mask is not None else None,
        )
        own_tokens = self._draw(own, rows[index], positions[index])
        self._processor.count(rows[index], own_tokens)
        if len(processed) == len(sampling):
            return own_tokens
        return self._draw(logits, rows, positions).index_copy(0, index, own_tokens)

    def _draw(self, logits: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        temperature, top_p, min_p = self.tables.shares.index_select(1, rows)
        top_k, seeds = self.tables.numbers.index_select(1, rows)
        return self.ops.sampling.sample(logits, temperature, top_k, top_p, min_p, seeds, positions)

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
        hidden = self.forward_pass.hidden_states(plan.scheduled)
        self._prompt_logprobs.collect(plan.scheduled, hidden)
        ends = accumulate(row.num_tokens for row in plan.scheduled)
        last = [end - 1 for row, end in zip(plan.scheduled, ends, strict=True) if row.samples]
        return self.model.logits(hidden if len(last) == len(hidden) else hidden[self._tensor(last)])

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
