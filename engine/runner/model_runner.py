"""Turns step plans into tokens on one rank's device."""

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.device.host_cache import new_host_cache
from engine.device.kv_cache import KVCacheLayout
from engine.device.memory import DeviceMemory, MemoryMeter, MemoryUse, kv_cache_bytes
from engine.device.select import select_device
from engine.device.tables import DeviceTables
from engine.device.threads import num_compute_threads
from engine.models.loader import load_model
from engine.models.shape import LanguageModel, ModelShape, ModelSpec
from engine.models.shared import RestingModel, WeightFiles
from engine.ranks.rank_group import Ranks
from engine.runner.draft_model import DraftModel
from engine.runner.forward_pass import ForwardPass
from engine.runner.new_weights import read_alike, with_weights_of
from engine.runner.preflight import Checkpoint
from engine.runner.profiler import Profiler
from engine.runner.warm_up import warm_up_plans
from engine.sampling.pending_step import PendingStep
from engine.sampling.sampler import Sampler
from engine.schedule.step import StepPlan
from kernels import AttentionNeeds, Ops, select_ops, watch_compilation

logger = logging.getLogger(__name__)


class ModelRunner:
    """The model, its KV cache and the device tables of one rank.

    Every rank executes the same plans in the same order and samples the same tokens.
    """

    def __init__(
        self,
        config: EngineConfig,
        shape: ModelShape,
        directory: Path,
        eos_token_ids: frozenset[int] = frozenset(),
        ranks: Ranks | None = None,
        show_progress: bool = False,
        files: WeightFiles | None = None,
        draft: Checkpoint | None = None,
    ) -> None:
        """
        Args:
            files: see `load_model`.
        """
        self._files = files
        self.shape = shape
        self._resting: list[RestingModel] = []
        self.device = select_device(config.device)
        self.ranks = ranks or Ranks()
        self.profiler = Profiler(config.profile_directory, self.ranks.world.rank)
        self.config = config = self._on_device(config, shape)
        self.dtype = getattr(torch, shape.dtype if config.dtype == "auto" else config.dtype)
        self.cache_dtype = torch.float8_e4m3fn if config.kv_cache_dtype == "fp8" else self.dtype
        self.max_len = config.max_model_len or shape.max_position
        self.vocab_size, self.num_labels = shape.vocab_size, shape.num_labels
        self.eos_token_ids = eos_token_ids
        self._keeps_states = shape.state_bytes > 0
        self.startup_s: dict[str, float] = {}  # by phase
        shape.check_divisible(self.ranks.tensor.size)
        with self._phase("kernels"):
            self.ops = self._select_ops([shape, *(draft[1:] if draft else ())])
        meter = MemoryMeter(self.device)
        before = meter.in_use()
        with self._phase("weights"):
            self.model = self._load(config, directory, shape, show_progress)
            draft_model = self._load(config, *draft, show_progress) if draft else None
        weights = max(meter.in_use() - before, 0)
        draft_layout = self._layout(draft[1]) if draft else None
        self._build(self._layout(shape, draft_layout))
        self.draft: DraftModel | None = None
        if draft_model is not None and draft_layout is not None:
            self.draft = DraftModel(
                config,
                draft_model,
                draft_layout,
                self.tables,
                self.sampler,
                self.ops,
                self.device,
                self.max_drafts,
            )
        watch = watch_compilation(self.device)
        with self._phase("cache"):  # and rehearsal, on a GPU
            self.memory = self._open(meter, weights)
        watch.start_serving()
        self.late_compilations = watch.late  # while requests were waiting; there should be none
        if show_progress:
            print(self, file=sys.stderr)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Of the start."""
        begin = time.monotonic()
        yield
        self.startup_s[name] = time.monotonic() - begin

    def _on_device(self, config: EngineConfig, shape: ModelShape) -> EngineConfig:
        """With what it leaves to the device, which is as good as the least of all ranks."""
        if shape.state_bytes:  # which are there of a text's end only
            off = {"enable_prefix_caching": False, "speculation": "off"}
            config = config.model_copy(update=off)
        size = self.ranks.world.size
        if self.device.type == "cpu":
            torch.set_num_threads(config.num_threads or num_compute_threads(size))
        memory = DeviceMemory.of(self.device, size).total
        return config.on_device(self.device.type, self.ranks.world.agree_on_minimum(memory))

    def _build(self, layout: KVCacheLayout) -> None:
        """What stands around the model: tables, sampler, forward pass, host cache."""
        config, self.cache_layout = self.config, layout
        rows, num_groups = config.step_size.rows, len(layout.groups)
        self.tables = DeviceTables(rows, self.max_len, config.block_size, self.device, num_groups)
        self.sampler = Sampler(
            self.model, self.tables, self.vocab_size, self.eos_token_ids, self.ops, self.ranks.world
        )
        self.forward_pass = ForwardPass(
            config, self.model, self.tables, layout, self.ops, self.device, self.max_drafts
        )
        self.host_cache = new_host_cache(config, layout, self.device)

    def _select_ops(self, shapes: list[ModelShape]) -> Ops:
        config, num_ranks = self.config, self.ranks.tensor.size
        needs = AttentionNeeds(
            config.attention_backend,
            self.dtype,
            self.cache_dtype,
            max(cache.head_dim for shape in shapes for cache in shape.caches(num_ranks)),
            config.block_size,
            config.deterministic,
            config.quantization,
        )
        return select_ops(self.device, needs)

    def _layout(self, shape: ModelShape, draft: KVCacheLayout | None = None) -> KVCacheLayout:
        ranks, block_size = self.ranks.tensor, self.config.block_size
        return KVCacheLayout.of(shape, ranks, block_size, self.cache_dtype, draft)

    def _load(
        self, config: EngineConfig, directory: Path, shape: ModelShape, show_progress: bool = False
    ) -> LanguageModel:
        spec = ModelSpec(
            config,
            shape,
            directory,
            self.max_len,
            self.dtype,
            self.device,
            self.ops,
            self.ranks.tensor,
        )
        return load_model(spec, show_progress, self._files)

    @property
    def _passes(self) -> list[ForwardPass]:
        """The model's, and the draft model's."""
        return [self.forward_pass, *([self.draft.forward_pass] if self.draft else [])]

    @property
    def is_exact(self) -> bool:
        """Whether a token comes out of a step of many as it does of one of its own.

        In float32 but for rounding that hardly ever matters. More than two ranks add up their parts
        in an order that depends on how many tokens there are.
        """
        exact_dtypes = self.dtype is self.cache_dtype is torch.float32
        if self.config.deterministic or (exact_dtypes and not self.config.quantization):
            return True
        return self.ops.is_invariant and self.model.is_all_ops and self.ranks.tensor.size <= 2

    @property
    def max_drafts(self) -> int:
        """Most of a row in one step; 0 where nothing is guessed. By itself an engine guesses only
        where that changes no text."""
        speculation = self.config.speculation
        is_off = speculation == "off" or (speculation == "auto" and not self.is_exact)
        return 0 if is_off else self.config.num_speculative_tokens

    def __str__(self) -> str:
        counts = " + ".join(map(str, self.num_blocks))
        blocks = f"{counts} KV cache blocks of {self.cache_dtype} on {self.device}"
        recorded = f"; {self.forward_pass.recorded}" if self.forward_pass.records_ahead else ""
        states = "; it keeps states: no prefix is shared, nothing drafted"
        arithmetic = self._arithmetic() + (states if self._keeps_states else "")
        return f"{blocks}; {self.memory}\n{self.ops.name} kernels; {arithmetic}{recorded}"

    def _arithmetic(self) -> str:
        """The types that it computes in, where they come from, and what that means here."""
        text = str(self.dtype).removeprefix("torch.")
        kind: torch.dtype | str = self.dtype
        if self.config.dtype == "auto":
            text = f"dtype=auto is the checkpoint's {text}"
        if self.config.quantization:
            text, kind = f"{text}, {self.config.quantization}", self.config.quantization
        how = self.ops.products.get(kind)
        return f"{text}, {how}" if how else text

    @torch.inference_mode()
    def _open(self, meter: MemoryMeter, weights: int) -> MemoryUse:
        """Allocate the KV cache, once it is known what the rest takes at its peak."""
        in_use = peak = meter.in_use()
        graphs, activations = 0, None
        if self.device.type == "cuda" or self.forward_pass.records_ahead:
            in_use, peak, graphs = self._rehearse(meter)
            activations = peak - in_use
        memory = DeviceMemory.of(self.device, self.ranks.world.size)
        host_cache = self.host_cache.num_bytes if self.host_cache is not None else 0
        own = host_cache if memory.is_host else peak + graphs
        self.num_blocks = self._choose_num_blocks(memory, own)
        self._allocate(self.num_blocks)
        self._record()
        kv_cache = self.cache_layout.num_bytes(self.num_blocks)
        return MemoryUse(
            weights=weights,
            other=max(in_use - weights, 0),
            activations=activations,
            graphs=graphs,
            kv_cache=kv_cache,
            host_cache=host_cache,
            left=memory.left(own, kv_cache),
        )

    def _choose_num_blocks(self, memory: DeviceMemory, own: int) -> list[int]:
        """Of each cache group; the same on every rank."""
        config, layout = self.config, self.cache_layout
        block_bytes = layout.num_bytes([1] * len(layout.groups))
        if config.num_blocks is not None:
            return layout.num_blocks(config, config.num_blocks * block_bytes)
        budget = kv_cache_bytes(config, memory, own, block_bytes, self.max_len)
        return [self.ranks.world.agree_on_minimum(n) for n in layout.num_blocks(config, budget)]

    def _rehearse(self, meter: MemoryMeter) -> tuple[int, int, int]:
        """Run the largest steps and record all graphs, over a cache of one block.

        Returns (bytes in use between steps, bytes at the peak of a step, bytes of the graphs).
        """
        self._allocate([1] * len(self.cache_layout.groups))
        meter.reset_peak()
        for plan in warm_up_plans(self.config, self.max_len, self.max_drafts):
            self.launch(plan).result()
        peak, in_use = meter.peak(), meter.in_use()
        self._record()
        graphs = max(meter.in_use() - in_use, 0)
        for own in self._passes:
            own.close()
        return in_use, max(peak, in_use), graphs

    def _allocate(self, num_blocks: Sequence[int]) -> None:
        for own in self._passes:
            own.allocate(num_blocks)

    def _record(self) -> None:
        for own in self._passes:
            own.record()

    def sleep(self) -> None:
        """Let go of the KV cache and, on a GPU, of the weights, which wait in host memory."""
        for own in self._passes:
            own.close()
            if self.device.type != "cpu":  # where they lie there already
                self._resting.append(RestingModel(own.model, {"ops": self.ops}))
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def wake_up(self) -> None:
        while self._resting:
            self._resting.pop().return_to(self.device)
        self._allocate(self.num_blocks)
        self._record()

    def update_weights(self, path: str) -> str | None:
        """Compute with another checkpoint's from now on, over an empty KV cache.

        Meanwhile the old ones wait in host memory. Returns why they were taken up again, if they
        were: no rank goes on with others where one of them cannot load its part.
        """
        self.sleep()
        model, failure = self.model, None
        try:
            other = read_alike(self.config, self.shape, path)
            model = self._load(with_weights_of(self.config, path), *other)
        except (ValueError, OSError, RuntimeError) as error:
            failure = str(error)
            logger.warning("The weights of %s are not computed with: %s", path, failure)
        if self.ranks.world.agree_on_minimum(int(failure is None)):
            self.model = self.forward_pass.model = self.sampler.model = model
            del self._resting[:1]
        elif failure is None:
            failure = "another rank cannot load them; its log says why"
        self.wake_up()
        return failure

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> PendingStep:
        """Start a step, behind those before it; the host waits for nothing that a GPU does."""
        if self.host_cache is not None:
            caches = [cache for own in self._passes for cache in own.kv_caches]
            self.host_cache.run(plan.copies, caches)
        for new in plan.new_rows:
            self.tables.enter(new)
            self.sampler.enter(new)
        self.tables.append_blocks(plan.new_blocks)
        self.tables.write_drafts(plan.drafts)
        sampling = self.sampler.begin(plan)
        pending = self.sampler.finish(sampling, self.forward_pass.hidden_states(plan))
        if self.draft is not None:
            self.draft.follow(plan)
        return pending
