"""What an engine is told when it starts."""

import secrets
from typing import Annotated, Literal

from pydantic import Field, PrivateAttr, model_validator

from engine.strict import StrictModel


class EngineConfig(StrictModel):
    """Settings of one engine. Every field has one meaning and is obeyed or refused."""

    model: str = Field(min_length=1, description="Checkpoint directory or Hugging Face hub id.")
    revision: str | None = Field(None, description="Branch, tag or commit on the hub.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Type of weights and activations; auto takes the checkpoint's.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto takes the GPU when there is one."
    )
    num_threads: int | None = Field(
        None,
        ge=1,
        description="Compute threads of a rank on a CPU; default: its share of the physical cores.",
    )
    quantization: Literal["w8a8", "int4"] | None = Field(
        None,
        description="Round the linear layers' weights when they are loaded, on a CPU: w8a8 to 8 "
        "bits, int4 to 4.5; activations to 8. The language-model head always takes w8a8.",
    )
    kv_cache_dtype: Literal["auto", "fp8"] = Field(
        "auto",
        description="Type of the KV cache: auto is that of the activations; fp8 (e4m3) holds twice "
        "as many tokens as 16 bits do, with 4 significant bits.",
    )
    attention_backend: Literal["auto", "triton", "flash-attn-2", "flash-attn-4"] = Field(
        "auto",
        description="Who attends to prompts on a GPU: auto takes the newest flash-attn that is "
        "installed and serves the model, else Triton, which always attends for decoding.",
    )
    load_format: Literal["safetensors", "dummy"] = Field(
        "safetensors", description="dummy makes random weights, for benchmarks."
    )
    max_model_len: int | None = Field(
        None,
        ge=2,
        description="Longest prompt + output, in tokens; default: the checkpoint's window.",
    )
    max_num_seqs: int = Field(64, ge=1, description="Most requests that run at once (rows).")
    max_num_batched_tokens: int = Field(
        2048, ge=1, description="Token budget of one step; longer prompts are computed in chunks."
    )
    tensor_parallel_size: int = Field(
        1, ge=1, le=64, description="Ranks that share the model, one device each."
    )
    block_size: int = Field(32, ge=1, le=256, description="Tokens per KV cache block.")
    num_blocks: int | None = Field(
        None, ge=1, description="Size of the block pool; default: as kv_cache_memory_bytes says."
    )
    kv_cache_memory_bytes: int | None = Field(
        None,
        ge=1,
        description="Memory of a rank's KV cache; default: on a GPU what gpu_memory_utilization "
        "leaves, on a CPU half of what is free, but no more than max_num_seqs can fill.",
    )
    host_cache_memory_bytes: int = Field(
        0,
        ge=0,
        description="Host memory of a rank for blocks that the KV cache evicts, from which later "
        "requests with the same prefix get them back; 0 drops them.",
    )
    gpu_memory_utilization: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of a GPU's memory for weights, activations, CUDA graphs and KV cache "
        "together; default 0.9. Measured by this engine's own peak, whatever else runs there.",
    )
    scheduling_policy: Literal["fcfs", "fair", "priority", "shortest"] = Field(
        "fcfs",
        description="Who is admitted first, and preempted last: fcfs as they come, API keys by "
        "turns; fair by the tokens that keys have had, by their weights; priority by the "
        "requests' priority, smallest first; shortest by prompt length, where every later arrival "
        "counts as 32 tokens more, so that long prompts wait only so long.",
    )
    enable_prefix_caching: bool = Field(
        True, description="Reuse the blocks of earlier requests that begin with the same tokens."
    )
    async_scheduling: bool | None = Field(
        None,
        description="Schedule step N + 1 while step N runs; default: on a GPU yes, on a CPU no, "
        "where host and device are the same cores.",
    )
    enforce_eager: bool = Field(
        False,
        description="Launch the kernels of every step; else decoding is recorded and replayed, on "
        "a GPU as CUDA graphs.",
    )
    cuda_graph_sizes: list[Annotated[int, Field(ge=1)]] | None = Field(
        None,
        min_length=1,
        description="Batch sizes for which decoding is recorded as a CUDA graph; batches between "
        "two are padded, larger ones not replayed. Default: a ladder up to max_num_seqs.",
    )
    seed: int = Field(0, description="Seeds dummy weights and, in LLM, requests without a seed.")
    _block_key: bytes = PrivateAttr(default_factory=lambda: secrets.token_bytes(16))

    @property
    def block_key(self) -> bytes:
        """The secret in the names of blocks: shared by all that are given this configuration.

        No setting, so it is drawn at random, and is in no dump and no repr.
        """
        return self._block_key

    @property
    def num_ranks(self) -> int:
        """Processes that an engine is made of, one device each."""
        return self.tensor_parallel_size

    @model_validator(mode="after")
    def _no_contradictions(self) -> "EngineConfig":
        sizes = ("num_blocks", "kv_cache_memory_bytes", "gpu_memory_utilization")
        given = [name for name in sizes if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} each say how large the KV cache is; give one")
        if self.host_cache_memory_bytes and not self.enable_prefix_caching:
            raise ValueError(
                "host_cache_memory_bytes: without enable_prefix_caching nothing is found there; "
                "leave one out"
            )
        if self.enforce_eager and self.cuda_graph_sizes is not None:
            raise ValueError("cuda_graph_sizes: enforce_eager means no graphs; leave one out")
        return self

    @model_validator(mode="after")
    def _budget_covers_rows(self) -> "EngineConfig":
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least "
                f"max_num_seqs ({self.max_num_seqs}), so that every running request gets a token "
                "in every step; raise the first or lower the second"
            )
        return self

    def check_device(self, device_type: str) -> None:
        """Raises ValueError for settings that mean nothing on the device found: cpu or cuda."""
        name, other = ("quantization", "CPU")
        if device_type == "cpu":
            name, other = ("gpu_memory_utilization", "GPU")
        value = getattr(self, name)
        if value is not None:
            raise ValueError(f"{name}: {value!r} is for {other}s only; leave it out")
