"""A paged-attention engine: requests, blocks, batches, models. No Ray, no HTTP.

Names are imported on first use: the serving front needs the configuration classes, not torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from engine.device.threads import spin_briefly

if TYPE_CHECKING:
    from engine.config import EngineConfig
    from engine.llm import LLM
    from engine.outputs import CompletionOutput, RequestOutput
    from engine.sampling_params import SamplingParams
    from engine.structured_outputs import StructuredOutputs

__all__ = [
    "LLM",
    "CompletionOutput",
    "EngineConfig",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputs",
]

_HOME = {
    "LLM": "engine.llm",
    "CompletionOutput": "engine.outputs",
    "EngineConfig": "engine.config",
    "RequestOutput": "engine.outputs",
    "SamplingParams": "engine.sampling_params",
    "StructuredOutputs": "engine.structured_outputs",
}


spin_briefly()  # before anything here imports torch


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
