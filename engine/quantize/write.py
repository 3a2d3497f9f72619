"""A checkpoint with weights of fewer bits, in the format of compressed-tensors."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from engine.checkpoint.files import CheckpointError, read_json
from engine.models.hf_config import read_hf_config
from engine.models.reader import SafetensorsReader
from kernels.quantization import quantize_int4, quantize_int8

_FILE_BYTES = 4 << 30


def quantize(directory: Path, target: Path, scheme: str, group: int) -> None:
    """Raises CheckpointError for what cannot be quantized; the target must not exist."""
    hf = read_json(directory, "config.json")
    if "quantization_config" in hf:
        raise CheckpointError(f"{directory} has weights of fewer bits already")
    with SafetensorsReader(directory) as tensors:
        maps = _linear_maps(read_hf_config(directory))
        if missing := {f"{name}.weight" for name in maps} - tensors.names:
            raise CheckpointError(f"{directory} stores some maps otherwise: {sorted(missing)[:3]}")
        target.mkdir(parents=True)
        for path in directory.iterdir():
            if path.is_file() and not path.name.endswith((".safetensors", ".index.json")):
                shutil.copy(path, target)
        config = hf | {"quantization_config": _config(scheme, group)}
        (target / "config.json").write_text(json.dumps(config, indent=2))
        _write(_stored(tensors, maps, scheme, group), target)


def _config(scheme: str, group: int) -> dict[str, Any]:
    """As the library has it."""
    weights: dict[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True}
    activations = weights | {"strategy": "token", "dynamic": True} if scheme == "W8A8" else None
    if scheme == "W8A8":
        weights["strategy"] = "channel"
    else:
        weights |= {"num_bits": 4, "strategy": "group", "group_size": group, "symmetric": False}
    of_linear = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": "int-quantized" if scheme == "W8A8" else "pack-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": of_linear},
    }


def _linear_maps(hf: PreTrainedConfig) -> set[str]:
    """Paths of a model's linear maps, without its head."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(hf)
    head = model.get_output_embeddings()
    return {
        path
        for path, module in model.named_modules()
        if type(module) is nn.Linear and module is not head
    }


def _stored(
    tensors: SafetensorsReader, maps: set[str], scheme: str, group: int
) -> Iterator[tuple[str, Tensor]]:
    for name in sorted(tensors.names):
        values, path = tensors.values(name), name.removesuffix(".weight")
        if path not in maps or path == name:
            yield name, values
        elif scheme == "W8A8":
            levels, scales = quantize_int8(values)
            yield name, levels
            yield f"{name}_scale", scales[:, None].to(values.dtype)
        else:
            if values.shape[1] % group:
                raise CheckpointError(
                    f"--group: {name} has {values.shape[1]} inputs, not groups of {group}"
                )
            rounded = quantize_int4(values, group)
            assert rounded.zeros is not None
            yield f"{name}_packed", _packed(rounded.levels)
            yield f"{name}_scale", rounded.scales.to(values.dtype)
            yield f"{name}_zero_point", _packed(rounded.zeros.T.contiguous()).T
            yield f"{name}_shape", torch.tensor(values.shape)


def _packed(levels: Tensor) -> Tensor:
    """uint8 0 .. 15 [out, in] as int32 [out, in / 8], the first in the lowest bits."""
    levels = F.pad(levels, (0, -levels.shape[1] % 8))
    pairs = levels.unflatten(1, (-1, 2))
    return (pairs[..., 0] | pairs[..., 1] << 4).contiguous().view(torch.int32)


def _write(tensors: Iterator[tuple[str, Tensor]], target: Path) -> None:
    """As files of some GiB, and their index."""
    names: dict[str, str] = {}
    part: dict[str, Tensor] = {}

    def save() -> None:
        file = f"model-{len(set(names.values())) + 1:05}.safetensors"
        save_file(part, target / file, {"format": "pt"})
        names.update(dict.fromkeys(part, file))
        part.clear()

    for name, tensor in tensors:
        part[name] = tensor.contiguous()
        if sum(each.nbytes for each in part.values()) > _FILE_BYTES:
            save()
    save()
    index = {"metadata": {}, "weight_map": names}
    (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
