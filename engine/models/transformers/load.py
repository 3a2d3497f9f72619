"""A module of transformers with its weights, checked against itself before it serves."""

import ctypes
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from engine.checkpoint.files import CheckpointError
from engine.models.reader import SafetensorsReader, open_tensors
from engine.models.shape import ModelSpec
from engine.models.transformers.check import expected_logits, refuse_if_wrong
from engine.models.transformers.config import TransformersShape
from engine.models.transformers.model import TransformersModel
from engine.models.transformers.pack import pack
from engine.models.transformers.parallel import shard
from engine.models.transformers.probe import let_us_attend, model_class
from engine.models.transformers.states import States
from engine.models.weights import weight_format
from engine.models.weights.plain import PlainWeights


@torch.inference_mode()
def load_module(spec: ModelSpec) -> TransformersModel:
    """One rank's model. Raises CheckpointError when it does not compute what transformers does.

    Files are mapped: a rank takes memory for its parts only, in the layout of the device.
    """
    config, shape, directory, parallel = spec.config, spec.shape, spec.directory, spec.parallel
    dtype, device, ops = spec.dtype, spec.device, spec.ops
    assert isinstance(shape, TransformersShape)
    if not isinstance(weight_format(directory, config.quantization), PlainWeights):
        raise CheckpointError(f"{directory}: only our own blocks compute weights of this format")
    probed = shape.probed(parallel.size)
    if probed.has_slopes and config.kv_cache_dtype == "fp8":
        raise CheckpointError("kv_cache_dtype: positions would be rounded, which ALiBi keeps there")
    if config.load_format == "dummy":
        module = _random_module(shape, dtype, config.seed)
    else:
        module = _read_module(shape, directory, dtype)
    expected = expected_logits(module, shape.vocab_size)
    shard(module, parallel)
    pack(module, probed.read_weights, ops, config.quantization, device)
    if device.type == "cpu":
        with suppress(AttributeError):  # of another C library than glibc, which keeps what is freed
            ctypes.CDLL(None).malloc_trim(0)
    let_us_attend(module)
    groups = {i: g for g, layers in enumerate(shape.cache_groups(parallel.size)) for i in layers}
    windows = [cache.window for cache in probed.caches]
    if device.type == "cuda":  # no step may wait for what experts were chosen
        has_experts = any("experts" in path for path, _ in module.named_modules())
        is_recordable = module._can_compile_fullgraph and not (has_experts or probed.mixers)
    else:  # which is tried
        is_recordable = parallel.size == 1 and ops.new_recorder is not None
    num_rows = max(config.step_size.rows, len(expected))  # of these too
    states = States(module, probed.mixers, num_rows) if probed.mixers else None
    ordered = [groups[i] for i in range(len(groups))]
    model = TransformersModel(module, windows, ordered, ops, dtype, is_recordable, states)
    refuse_if_wrong(model, expected, shape, parallel.size, ops, device, dtype, config.quantization)
    return model


def _read_module(shape: TransformersShape, directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    loader: Any = AutoModelForCausalLM
    source: dict[str, Any] = {"pretrained_model_name_or_path": directory, "use_safetensors": True}
    with open_tensors(directory) as tensors:
        if not isinstance(tensors, SafetensorsReader):  # values that transformers has not read
            values = {name: tensors.values(name).to(dtype) for name in tensors.names}
            source = {"pretrained_model_name_or_path": None, "state_dict": values}
            loader = model_class(shape.hf)
    try:
        module, info = loader.from_pretrained(
            **source,
            config=shape.hf,
            dtype=dtype,
            attn_implementation="eager",
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # of whatever kind transformers' are
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{directory}: transformers cannot load it: {reason}") from error
    missing = {name for name in info["missing_keys"] if not name.endswith(".bias")}
    for what, names in (
        ("lacks tensors", missing),
        ("has tensors this model has no place for", info["unexpected_keys"]),
        ("has tensors of other shapes than its config says", info["mismatched_keys"]),
    ):
        if names:
            raise CheckpointError(
                f"the checkpoint {what}: {', '.join(map(str, sorted(names)[:5]))}"
            )
    return module


def _random_module(shape: TransformersShape, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    module: Any = AutoModelForCausalLM.from_config(
        shape.hf, dtype=dtype, attn_implementation="eager"
    )
    return module.eval()
