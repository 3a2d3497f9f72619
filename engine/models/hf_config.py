"""config.json, read as transformers reads it: its defaults, its old spellings, its checks."""

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import CONFIG_MAPPING, PreTrainedConfig

from engine.checkpoint.files import CheckpointError, read_json

# What families call the longest text; those without learned positions need none.
_NO_WINDOW = 1 << 15  # of layers that only keep states; max_position_embeddings says another
_WINDOWS = ("max_position_embeddings", "max_seq_len", "seq_length")


def read_hf_config(directory: Path, max_model_len: int | None = None) -> PreTrainedConfig:
    """The configuration of a text model, of which the checkpoint's own code is never run.

    Where rotary frequencies depend on how long the text is, they are fixed to those of
    `max_model_len`, by default of the longest window: a token's keys are computed once.
    Raises CheckpointError naming what is wrong.
    """
    content = read_json(directory, "config.json")
    if not content:
        adapter = (directory / "adapter_config.json").exists()
        what = "it is an adapter (LoRA); merge it into its model" if adapter else "is it a model?"
        raise CheckpointError(f"{directory} has no config.json: {what}")
    content, _ = PreTrainedConfig.get_config_dict(directory, local_files_only=True)
    hf = parse_config(content, directory / "config.json")
    text = hf.get_text_config()
    if not getattr(text, "is_causal", True):
        raise CheckpointError(
            "config.json: is_causal=False: where tokens see later ones, none can be generated"
        )
    if hf.is_encoder_decoder:
        raise CheckpointError("config.json: is_encoder_decoder: only decoders are served")
    _fix_long_rope(text, max_model_len)
    if _first_scaled(text):
        text.attn_temperature_tuning = False  # texts end before it begins
    if hf.dtype is None:
        hf.dtype = stored_dtype(directory)
    return hf


def parse_config(content: dict[str, Any], source: Path) -> PreTrainedConfig:
    """The configuration that these values mean. Raises CheckpointError; `source` is for it."""
    kind = content.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise CheckpointError(
            f"{source}: model_type={kind!r} (architectures={content.get('architectures')!r}) is "
            "not among those that transformers knows"
        )
    content = {k: v for k, v in content.items() if k != "quantization_config"}  # read elsewhere
    for name in ("dtype", "torch_dtype"):
        if isinstance(dtype := content.get(name), str):
            content[name] = dtype.removeprefix("torch.") if dtype != "auto" else None
            if not isinstance(getattr(torch, content[name] or "float32", None), torch.dtype):
                raise CheckpointError(f"{source}: {name}={dtype!r} is no type of torch")
    try:
        hf = CONFIG_MAPPING[kind].from_dict(content)
        if getattr(hf, "rope_parameters", None):
            hf.standardize_rope_params()
            hf.validate_rope()
    except Exception as error:  # of whatever kind transformers' checks are
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{source}: transformers refuses it: {reason}") from error
    return hf


def _fix_long_rope(text: PreTrainedConfig, max_model_len: int | None) -> None:
    """LongRoPE has factors for short texts and for long ones, and changes them as a text grows."""
    window = max_model_len or getattr(text, "max_position_embeddings", 0)
    parameters = getattr(text, "rope_parameters", None) or {}
    for rope in [parameters, *(p for p in parameters.values() if isinstance(p, dict))]:
        if rope.get("rope_type") == "longrope":
            is_long = window > rope["original_max_position_embeddings"]
            kept, replaced = ("long", "short") if is_long else ("short", "long")
            for name in ("factor", "mscale"):
                if f"{kept}_{name}" in rope:
                    rope[f"{replaced}_{name}"] = rope[f"{kept}_{name}"]


def stored_dtype(directory: Path) -> torch.dtype:
    """What the first weight in floating point is stored in."""
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118, it is no dict
                dtype = file.get_slice(name)[:0].dtype
                if dtype in (torch.float32, torch.float16, torch.bfloat16):
                    return dtype
    return torch.float32


def is_classifier(hf: PreTrainedConfig) -> bool:
    """Whether its head is for the labels of whole texts, as reward models have it."""
    return any(name.endswith("ForSequenceClassification") for name in hf.architectures or ())


def longest_text(hf: PreTrainedConfig) -> int:
    """The window in tokens. Raises CheckpointError when the configuration names none."""
    text = hf.get_text_config()
    given = [getattr(text, name, None) for name in _WINDOWS]
    window = next((value for value in given if value is not None), None)
    if window is None and set(getattr(text, "layer_types", None) or ()) == {"linear_attention"}:
        window = _NO_WINDOW
    if not isinstance(window, int) or window < 1:
        raise CheckpointError(
            f"config.json: max_position_embeddings={window!r} is no window; name one by "
            "hf_overrides"
        )
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") == "yarn" and rope.get("factor"):
        window = max(window, int(rope["factor"] * rope["original_max_position_embeddings"]))
    return min(window, _end_of_plain_attention(text))


def _first_scaled(text: PreTrainedConfig) -> int | None:
    """The position from which on Llama 4 scales queries, by counting a step's tokens."""
    scale: float | None = getattr(text, "floor_scale", None)
    return None if scale is None else int(scale) - 1


def _end_of_plain_attention(text: PreTrainedConfig) -> int:
    """Up to how many tokens all of them see all before: selection and chunks begin there."""
    kinds = getattr(text, "layer_types", None) or ()
    ends = [
        text.attention_chunk_size if "chunked_attention" in kinds else None,
        text.index_topk if "indexed_attention" in kinds else None,
        _first_scaled(text),
    ]
    return min((end for end in ends if end), default=sys.maxsize)
