"""What a GGUF file says of its model, as the files of a checkpoint: `… FILE… DIRECTORY`.

Done once per file, in a process of its own: whoever only tokenizes need not load torch.
"""

import json
import sys
from pathlib import Path
from typing import Any

from gguf.quants import dequantize
from transformers import PreTrainedTokenizerFast
from transformers.integrations import GGUF_CONFIG_MAPPING
from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

from engine.checkpoint.files import CheckpointError
from engine.models.gguf.file import GgufFile

# Architecture of the file -> model_type, of those whose tensors are known here.
_MODEL_TYPES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
}
_ALSO = {"attention.key_length": "head_dim"}
# Of these the file's frequencies are divided, in models that have them.
ROPE_FACTORS = "rope_freqs.weight"


def convert(paths: list[Path], directory: Path) -> None:
    """Write config.json, generation_config.json and the tokenizer's files, and link to the file."""
    files = [GgufFile(path) for path in paths]
    metadata = files[0].metadata
    _write(directory / "config.json", config(files))
    ends = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    tokens = sorted({token for token in ends if token is not None})
    _write(directory / "generation_config.json", {"eos_token_id": tokens})
    architecture, parts, settings = get_gguf_tokenizer(str(paths[0]))
    fast, _ = convert_gguf_tokenizer(architecture, parts)
    named = {name: text for name, text in settings.items() if name.endswith("_token")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, **named)
    tokenizer.chat_template = settings.get("chat_template")
    tokenizer.save_pretrained(directory)
    for path in paths:
        (directory / path.name).symlink_to(path.resolve())


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2))


def config(files: list[GgufFile]) -> dict[str, Any]:
    """config.json's content."""
    metadata = files[0].metadata
    architecture = metadata.get("general.architecture")
    if architecture not in _MODEL_TYPES:
        raise CheckpointError(
            f"its architecture {architecture!r} is not served from GGUF; those that are: "
            f"{', '.join(_MODEL_TYPES)}"
        )
    names = {name for file in files for name in file.tensors}
    kinds = {t.kind.name for file in files for t in file.tensors.values() if len(t.shape) > 1}
    found = {
        ours: metadata[f"{architecture}.{theirs}"]
        for theirs, ours in (GGUF_CONFIG_MAPPING[architecture] | _ALSO).items()
        if ours is not None and f"{architecture}.{theirs}" in metadata
    }
    return {
        "model_type": _MODEL_TYPES[architecture],
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": "output.weight" not in names,
        # Its own type, or bfloat16 where it has fewer bits.
        "dtype": {"F32": "float32", "F16": "float16"}.get("".join(kinds), "bfloat16"),
        **found,
        **_rope(files, architecture, found),
    }


def _rope(files: list[GgufFile], architecture: str, found: dict[str, Any]) -> dict[str, Any]:
    metadata, prefix = files[0].metadata, f"{architecture}.rope.scaling"
    window = metadata.get(f"{prefix}.original_context_length", found["max_position_embeddings"])
    rope: dict[str, Any] = {"rope_theta": found.get("rope_theta", 10000.0)}
    for file in files:
        if ROPE_FACTORS in file.tensors:  # Llama 3.1 and later: LongRoPE can say it
            stored = file.tensors[ROPE_FACTORS]
            factors = dequantize(stored.rows, stored.kind).tolist()
            rope |= {"rope_type": "longrope", "original_max_position_embeddings": window}
            rope |= {"short_factor": factors, "long_factor": factors, "attention_factor": 1.0}
            return {"rope_parameters": rope}
    kind = metadata.get(f"{prefix}.type")
    if kind in ("linear", "yarn"):
        rope |= {"rope_type": kind, "factor": metadata[f"{prefix}.factor"]}
        rope |= {"original_max_position_embeddings": window} if kind == "yarn" else {}
        return {"rope_parameters": rope}
    return {}


if __name__ == "__main__":
    *paths, target = map(Path, sys.argv[1:])
    convert(paths, target)
