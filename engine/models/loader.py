"""One rank's model with its weights: who computes it, and whether another process has it."""

import hashlib
from dataclasses import fields, replace
from pathlib import Path

import torch

import kernels
from engine import models
from engine.checkpoint.derived import states
from engine.models.blocks.linear import BuildContext, ShardedModule
from engine.models.config import ModelConfig
from engine.models.decoder import CausalLM
from engine.models.shape import LanguageModel, ModelSpec
from engine.models.shared import SharedFile, WeightFiles
from engine.models.weight_loader import has_own_head, load_dummy_weights, load_weights
from engine.models.weights import weight_format

# Smaller checkpoints are read as fast as they are found.
_WORTH_SHARING_BYTES = 64 << 20
_CODE = {".py", ".cpp", ".h"}  # kernels say how weights lie


def load_model(
    spec: ModelSpec, show_progress: bool = False, files: WeightFiles | None = None
) -> LanguageModel:
    """The rank's model with its weights, in the layout of the device's ops.

    Args:
        files: where models of our own blocks are shared with other processes, if they are.
    """
    if not isinstance(spec.shape, ModelConfig):
        from engine.models.transformers.load import load_module  # its modules take long

        return load_module(spec)
    shape, path = spec.shape, None
    if files is not None and _weighs(spec.directory) >= _WORTH_SHARING_BYTES:
        path = files(_name(spec))
    if path is None:
        return _load_blocks(spec, shape, show_progress)
    ops = spec.ops
    own = {f"ops.{f.name}": getattr(ops, f.name) for f in fields(ops)}
    known = {name: value for name, value in own.items() if callable(value)}
    known |= {"ops": ops, "parallel": spec.parallel}
    shared = SharedFile[CausalLM](path, known, spec.device)
    return shared.model(lambda: _load_blocks(spec, shape, show_progress))


def _weighs(directory: Path) -> int:
    files = (*directory.glob("*.safetensors"), *directory.glob("*.gguf"))
    return sum(file.stat().st_size for file in files)


def _name(spec: ModelSpec) -> str:
    """A name for all that the model is made of: the same name, the same model, to the bit."""
    rooms = (Path(room.__path__[0]) for room in (kernels, models))
    code = [path for room in rooms for path in room.rglob("*") if path.suffix in _CODE]
    options = {"quantization", "load_format", "seed", "deterministic"}
    made_of = (
        *(states(sorted(spec.directory.iterdir())), states(sorted(code)), torch.__version__),
        spec.config.model_dump(include=options),
        *(spec.max_len, spec.dtype, spec.device.type, spec.ops.name),
        *(spec.parallel.rank, spec.parallel.size),
    )
    return hashlib.sha256(repr(made_of).encode()).hexdigest()[:24]


def _load_blocks(spec: ModelSpec, shape: ModelConfig, show_progress: bool) -> CausalLM:
    ops = spec.ops
    if shape.tied_embeddings and spec.config.load_format != "dummy":
        shape = replace(shape, tied_embeddings=not has_own_head(shape, spec.directory))
    weights = weight_format(spec.directory, spec.config.quantization)
    context = BuildContext(shape.hidden_size, shape.rms_eps, ops, spec.parallel, weights)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(spec.dtype)
    try:
        with spec.device:
            model = CausalLM(shape, spec.max_len, context)
    finally:
        torch.set_default_dtype(previous)

    def pack(module: ShardedModule) -> None:
        module.pack(ops)

    if spec.config.load_format == "dummy":
        load_dummy_weights(model, spec.config.seed, pack)
    else:
        stored_for = None if spec.config.quantization or spec.dtype == torch.float32 else ops
        load_weights(
            model, spec.directory, show_progress, pack, shape.rewrites, stored_for=stored_for
        )
    model.pack_head(ops, spec.config.quantization)
    return model
