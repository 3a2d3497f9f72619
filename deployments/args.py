"""What users tell a deployment: `serve run deployments:app key=value …`, or `args:` in YAML."""

from typing import Annotated, Any, Literal

import click
from pydantic import Field, ValidationError, field_validator, model_validator

from deployments.parsing.formats import ToolParserName
from deployments.parsing.reasoning import ReasoningParserName
from engine.config import EngineConfig
from engine.strict import StrictModel, explain

# What Serve calls it where nobody says otherwise.
APPLICATION = "manta"
Origin = Annotated[str, Field(pattern=r"^(\*|[a-z][a-z0-9+.-]*://[^/\s]+)$")]


class DeploymentArgs(EngineConfig):
    """The engine's configuration and how Ray runs it, for the server and for offline batches."""

    served_model_name: str | None = Field(
        None, description="The name clients use; default: the value of model."
    )
    tool_parser: ToolParserName = Field(
        "auto",
        description="How the model writes tool calls; auto: as its chat template says, if it does.",
    )
    reasoning_parser: ReasoningParserName = Field(
        "auto",
        description="How the model marks what it thinks, which becomes reasoning_content; auto: as "
        "its chat template does, if it does; none: it stays in the content.",
    )
    pooling: Literal["auto", "last", "mean", "cls"] = Field(
        "auto",
        description="Which hidden states are a text's embedding; auto: as the checkpoint's config "
        "of sentence-transformers says, and none without one.",
    )
    reranker: Literal["none", "qwen3"] = Field(
        "none",
        description="qwen3: scores are the probability that the model says yes, not no, when asked "
        "in the words of Qwen's rerankers; none: the angle between embeddings.",
    )
    num_cpus_per_shard: float = Field(
        1, gt=0, description="CPUs that Ray reserves for an engine on a CPU."
    )
    heartbeat_timeout_s: float | None = Field(
        None,
        gt=0,
        description="An engine silent for so long is dead; must exceed the longest step. Default: "
        "20 times that of the steps so far, between 30 and 120 seconds.",
    )
    keep_weights_s: float = Field(
        0,
        ge=0,
        description="How long a node keeps the weights of our own blocks in host memory, as they "
        "are packed, when no engine uses them any more: the next one need not read the disk. 0: "
        "not at all. On a CPU engines use what is kept; on a GPU it takes host memory besides.",
    )
    startup_timeout_s: float = Field(
        1800, gt=0, description="An engine that takes longer to load is started anew."
    )
    max_restarts: int = Field(
        10, ge=0, description="Engine restarts within 10 minutes before the replica gives up."
    )

    @property
    def model_name(self) -> str:
        return self.served_model_name or self.model

    @property
    def engine_config(self) -> EngineConfig:
        config = EngineConfig.model_construct(
            **{name: getattr(self, name) for name in EngineConfig.model_fields}
        )
        config._block_key = self._block_key
        return config


class ServiceArgs(StrictModel):
    """What the HTTP interface lets in, and what it tells."""

    max_queued_requests: int | None = Field(
        2048, ge=1, description="Requests without a first token; more are refused with 429."
    )
    max_queued_tokens: int | None = Field(
        None, ge=1, description="Tokens of those requests' prompts; more are refused with 429."
    )
    request_timeout_s: float | None = Field(
        None, gt=0, description="A request that takes longer is ended with an error (408)."
    )
    max_request_bytes: int = Field(
        16 * 2**20, ge=1024, description="Largest request body; more is refused with 413."
    )
    files_directory: str | None = Field(
        None,
        min_length=1,
        description="Where files and batches are kept: a directory, or a URI such as s3://… that "
        "all replicas share. Without it there are none.",
    )
    max_file_bytes: int = Field(
        200 * 2**20, ge=1024, description="Largest file; more is refused with 413."
    )
    max_messages: int = Field(4096, ge=1, description="Longest conversation, in messages.")
    allowed_origins: list[Origin] = Field(
        default_factory=list,
        description="Web pages that may use the server from a browser, as https://example.com; * "
        "allows all. The server's own page needs no mention but where there are no keys and the "
        "server has a public name.",
    )
    api_keys_file: str | None = Field(
        None,
        description="A file on the replicas' nodes with an API key on each line, as KEY or "
        "NAME:KEY; the environment variable MANTA_API_KEYS holds them separated by commas.",
    )
    require_api_key: bool = Field(
        False, description="Do not start without API keys. Set by serve run where it finds some."
    )
    isolate_cache_by_key: bool | None = Field(
        None,
        description="Requests share cached prefixes only with those of the same key (by name), so "
        "that none can learn from token counts and response times what others have asked; default: "
        "when the keys have several names.",
    )
    enable_weight_updates: bool = Field(
        False,
        description="POST /update_weights_from_disk has all replicas compute with the weights of "
        "another checkpoint of the same model, from any path that they can read.",
    )
    request_log: Literal["off", "on", "body"] = Field(
        "on", description="A JSON line per request: ids, counts, times; body adds what was sent."
    )

    @field_validator("allowed_origins", mode="before")
    @classmethod
    def _split_at_commas(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",")] if isinstance(value, str) else value

    @classmethod
    def unlimited(cls) -> "ServiceArgs":
        return cls(max_queued_requests=None, max_messages=2**31)


class AppArgs(DeploymentArgs, ServiceArgs):
    """The arguments of the Serve application."""

    model: str = Field(
        "manta-demo", min_length=1, description="Checkpoint directory or Hugging Face hub id."
    )
    num_replicas: int = Field(
        1,
        ge=0,
        description="Engines; with max_replicas, the fewest: with 0, the first request starts one, "
        "and waits for it.",
    )
    max_replicas: int | None = Field(
        None, ge=1, description="Scale with the engines' load between num_replicas and this."
    )
    upscale_delay_s: float = Field(5, ge=0, description="How long load must call for a replica.")
    downscale_delay_s: float = Field(
        300, ge=0, description="How long a replica must be superfluous before it goes."
    )
    graceful_shutdown_timeout_s: float = Field(
        120, ge=0, description="How long a replica that is to stop may finish its streams."
    )
    max_ongoing_requests: int = Field(
        4096, ge=1, description="Requests a replica takes on at once, running and waiting."
    )

    @property
    def may_have_several_replicas(self) -> bool:
        return self.num_replicas > 1 or self.max_replicas is not None

    @model_validator(mode="after")
    def _bounds_in_order(self) -> "AppArgs":
        if self.max_replicas is not None and self.max_replicas < self.num_replicas:
            raise ValueError(
                f"max_replicas ({self.max_replicas}) must be at least num_replicas "
                f"({self.num_replicas})"
            )
        if self.num_replicas == 0 and self.max_replicas is None:
            raise ValueError("num_replicas: 0 needs max_replicas")
        return self

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> "AppArgs":
        """As pydantic's, but with an error that a shell shows in one line per fault."""
        try:
            return super().model_validate(obj, **options)
        except ValidationError as error:
            faults = [f"{field}: {message}" for field, message in explain(error.errors())]
            raise click.ClickException("bad arguments\n  " + "\n  ".join(faults)) from None
