"""What an engine is told when it starts."""

import json
import secrets
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field, PrivateAttr, ValidationInfo, field_validator, model_validator

from engine.strict import StrictModel


class StepSize(NamedTuple):
    """The most that a step holds."""

    rows: int
    tokens: int


_ON_A_CPU = StepSize(64, 2048)
_ON_A_GPU = StepSize(256, 2048)
_ON_A_LARGE_GPU = StepSize(1024, 8192)
_LARGE_GPU_BYTES = 70e9
_MAX_SAMPLED = 256
# Above, a GPU takes longer than the host, which launches the next step meanwhile.
_GRAPH_TOKENS = 2048


class EngineConfig(StrictModel):
    """Settings of one engine. Every field has one meaning and is obeyed or refused."""

    model: str = Field(
        min_length=1, description="Checkpoint directory, Hugging Face hub id, or URI."
    )
    revision: str | None = Field(None, description="Branch, tag or commit on the hub.")
    model_impl: Literal["auto", "transformers"] = Field(
        "auto",
        description="Who computes the model: transformers its modules, auto our own blocks where "
        "they can.",
    )
    tokenizer: str | None = Field(
        None,
        min_length=1,
        description="Directory or hub id whose tokenizer and chat template are taken; default: the "
        "model's.",
    )
    chat_template: str | None = Field(
        None,
        min_length=1,
        description="A file with a chat template, or the template itself; default: the model's.",
    )
    generation_config: str = Field(
        "auto",
        min_length=1,
        description="Whose sampling is the default: auto the model's, none nobody's, else that of "
        "the generation_config.json in this directory.",
    )
    hf_overrides: dict[str, Any] = Field(
        default_factory=dict,
        description="Fields of the model's config.json that are to be others, as a JSON object.",
    )
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
    quantization: Literal["w8a8", "int4", "fp8"] | None = Field(
        None,
        description="Round the linear layers' weights when they are loaded: int4 to 4.75 bits, on "
        "a CPU w8a8 to 8, on a GPU fp8 (e4m3) to 8. Activations are rounded to 8 as well, but for "
        "int4 on a GPU. The language-model head takes 8 bits on a CPU, and stays on a GPU.",
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
    weights: str | None = Field(
        None,
        min_length=1,
        description="A checkpoint of the same model whose weights are computed with instead: "
        "tokenizer, template and settings stay the model's.",
    )
    load_format: Literal["safetensors", "dummy"] = Field(
        "safetensors", description="dummy makes random weights, for benchmarks."
    )
    max_model_len: int | None = Field(
        None,
        ge=2,
        description="Longest prompt + output, in tokens; default: the checkpoint's window.",
    )
    max_num_seqs: int | None = Field(
        None,
        ge=1,
        description="Most requests that run at once (rows); default: 64 on a CPU, 256 on a GPU, "
        "1024 on one of 70 GB or more.",
    )
    max_num_batched_tokens: int | None = Field(
        None,
        ge=1,
        description="Token budget of one step; longer prompts are computed in chunks. Default: "
        "2048, on a GPU of 70 GB or more 8192: a full step of an 8B model then takes about 0.2 s.",
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
    deterministic: bool = Field(
        False,
        description="On a GPU, compute every token by the same operations in the same order, so "
        "that a text does not depend on who shares its steps, by no bit; products and attention "
        "are slower.",
    )
    speculation: Literal["auto", "off", "suffix", "ngram", "grammar", "model"] = Field(
        "auto",
        description="Who guesses tokens ahead, so that a step checks several of a row; texts stay "
        "the same. suffix: what followed the same tokens before, in this text or recent outputs; "
        "ngram: in this text alone; model: what draft_model says; grammar: what structured outputs "
        "leave no choice about, as the others do too. auto: suffix where a token comes out the "
        "same whatever shares its step, as on a CPU and in float32; else off.",
    )
    draft_model: str | None = Field(
        None,
        min_length=1,
        description="For speculation=model: a small checkpoint of the same vocabulary, as model is "
        "named. It computes all that the model does, on the same devices.",
    )
    num_speculative_tokens: int = Field(
        16,
        ge=1,
        le=256,
        description="Most tokens guessed for a row in one step; how many are, follows the load.",
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
    cuda_graph_max_tokens: int | None = Field(
        None,
        ge=0,
        description="Steps with prompts are recorded as CUDA graphs too, for a ladder of sizes up "
        "to so many tokens; 0: none. Default on a GPU: 2048.",
    )
    enable_sleep_mode: bool = Field(
        False,
        description="POST /sleep and /wake_up (of a server), and sleep and wake_up of LLM, have an "
        "idle engine give back its KV cache and keep its weights in host memory, and take both "
        "again.",
    )
    profile_directory: str | None = Field(
        None,
        min_length=1,
        description="Where POST /start_profile and /stop_profile (of a server), and "
        "start_profile and stop_profile of LLM, leave what every rank has done between them, by "
        "torch's profiler, on the rank's machine. Without it there are no profiles.",
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
    def step_size(self) -> StepSize:
        """As configured; what `on_device` has not decided yet is as on a CPU."""
        return self._step_size(_ON_A_CPU)

    def _step_size(self, default: StepSize) -> StepSize:
        rows, tokens = self.max_num_seqs, self.max_num_batched_tokens
        rows = rows or min(default.rows, tokens or default.tokens)
        return StepSize(rows, tokens or max(default.tokens, rows))

    @property
    def max_sampled(self) -> int:
        """Most tokens that a step with drafts samples: as many logits take memory."""
        rows, tokens = self.step_size
        return max(rows, min(tokens, _MAX_SAMPLED))

    @property
    def num_ranks(self) -> int:
        """Processes that an engine is made of, one device each."""
        return self.tensor_parallel_size

    @field_validator("hf_overrides", "cuda_graph_sizes", mode="before")
    @classmethod
    def _read_json(cls, value: Any, info: ValidationInfo) -> Any:
        """Of a command line, where it is a string."""
        kind = "object" if info.field_name == "hf_overrides" else "list, such as [1, 2, 4]"
        try:
            return json.loads(value) if isinstance(value, str) else value
        except ValueError as error:
            raise ValueError(f"should be a JSON {kind} ({error})") from error

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
        if self.weights is not None and self.load_format == "dummy":
            raise ValueError("weights: with load_format=dummy none are read; leave one out")
        if (self.speculation == "model") != (self.draft_model is not None):
            raise ValueError(
                "draft_model: it is what speculation=model drafts with; give both or neither "
                f"(got draft_model={self.draft_model!r}, speculation={self.speculation!r})"
            )
        if self.deterministic and self.attention_backend.startswith("flash"):
            raise ValueError(
                f"attention_backend: {self.attention_backend!r} is not deterministic; leave it out"
            )
        if self.deterministic and self.quantization:
            raise ValueError(
                f"quantization: {self.quantization!r} is not deterministic; leave one out"
            )
        if self.deterministic and self.num_ranks > 1:
            raise ValueError(
                "deterministic: ranks add up in an order of their own; use one "
                f"(got tensor_parallel_size={self.tensor_parallel_size})"
            )
        for name in ("cuda_graph_sizes", "cuda_graph_max_tokens"):
            if self.enforce_eager and getattr(self, name):
                raise ValueError(f"{name}: enforce_eager means no graphs; leave one out")
        return self

    @model_validator(mode="after")
    def _budget_covers_rows(self) -> "EngineConfig":
        size = self.step_size
        if size.tokens < size.rows:
            raise ValueError(
                f"max_num_batched_tokens ({size.tokens}) must be at least max_num_seqs "
                f"({size.rows}), so that every running request gets a token in every step; "
                "raise the first or lower the second"
            )
        return self

    def check_device(self, device_type: str) -> None:
        """Raises ValueError for settings that mean nothing on the device found: cpu or cuda."""
        foreign: dict[str, bool] = {"quantization": self.quantization == "w8a8"}
        if device_type == "cpu":
            foreign = {
                "quantization": self.quantization == "fp8",
                "gpu_memory_utilization": self.gpu_memory_utilization is not None,
                "deterministic": self.deterministic,
            }
        other = "GPU" if device_type == "cpu" else "CPU"
        for name in (name for name, is_given in foreign.items() if is_given):
            raise ValueError(f"{name}: {getattr(self, name)!r} is for {other}s only; leave it out")

    def on_device(self, device_type: str, memory: int) -> Self:
        """With what was left open decided for this device: cpu or cuda, of so many bytes.

        Raises ValueError for settings that mean nothing there.
        """
        self.check_device(device_type)
        default = _ON_A_LARGE_GPU if memory >= _LARGE_GPU_BYTES else _ON_A_GPU
        rows, tokens = self._step_size(_ON_A_CPU if device_type == "cpu" else default)
        decided = {"max_num_seqs": rows, "max_num_batched_tokens": tokens}
        if device_type == "cuda" and self.cuda_graph_max_tokens is None:
            decided["cuda_graph_max_tokens"] = _GRAPH_TOKENS
        return self.model_copy(update=decided)
