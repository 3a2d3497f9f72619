"""A model with its weights from safetensors files, each rank reading only its slices."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from engine.checkpoint import CheckpointError, read_json
from engine.config import EngineConfig
from engine.models.blocks.linear import BuildContext, ShardedModule, Source
from engine.models.config import ModelConfig
from engine.models.decoder import CausalLM
from engine.models.weights import weight_format
from engine.progress import Progress
from engine.ranks.rank_group import RankGroup
from kernels import Ops

# In old checkpoints, though recomputed by every loader.
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_ROWS = 4096


class SafetensorsReader:
    """Slices of a checkpoint's tensors.

    They are in model.safetensors, as for transformers; else each is in the file that the index
    says; else in any *.safetensors.
    """

    def __init__(self, directory: Path) -> None:
        index = directory / "model.safetensors.index.json"
        whole = directory / "model.safetensors"
        file_names: dict[str, str] | None = None
        if whole.exists():
            paths = [whole]
        elif index.exists():
            try:
                file_names = dict(json.loads(index.read_text())["weight_map"])
                paths = [directory / name for name in sorted(set(file_names.values()))]
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{index} cannot be read: {error!r}") from error
        else:
            paths = sorted(directory.glob("*.safetensors"))
        if not paths:
            raise CheckpointError(
                f"{directory} has no *.safetensors files; other formats are not read. Convert with "
                "transformers: AutoModelForCausalLM.from_pretrained(…).save_pretrained(…)"
            )
        self._files = []
        self._file_of = {}
        for path in paths:
            try:
                file = safe_open(path, framework="pt").__enter__()
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}") from error
            self._files.append(file)
            for name in set(file.keys()):
                if file_names is None or path == directory / file_names.get(name, ""):
                    self._file_of[name] = file

    @property
    def names(self) -> set[str]:
        return set(self._file_of)

    def read(self, source: Source) -> Tensor:
        """The slice, from disk; raises CheckpointError when the tensor is missing or misshapen."""
        if source.name not in self._file_of:
            raise CheckpointError(f"the checkpoint has no tensor {source.name!r}")
        tensor = self._file_of[source.name].get_slice(source.name)
        shape = tuple(tensor.get_shape())
        if shape != source.shape:
            raise CheckpointError(
                f"the checkpoint's {source.name} has shape {shape}, its config says {source.shape}"
            )
        cut = slice(source.start, source.end)
        values: Tensor = tensor[cut] if source.dim == 0 else tensor[:, cut]
        wanted = source.dtype
        if wanted != values.dtype if wanted is not None else not values.is_floating_point():
            raise CheckpointError(
                f"the checkpoint's {source.name} is {values.dtype}, not "
                f"{wanted or 'of a floating-point type'}"
            )
        return values

    def equal(self, name: str, other: str) -> bool:
        """Whether two tensors are the same, compared a few rows at a time."""
        left, right = (self._file_of[n].get_slice(n) for n in (name, other))
        num_rows = left.get_shape()[0]
        return left.get_shape() == right.get_shape() and all(
            torch.equal(left[i : i + _ROWS], right[i : i + _ROWS])
            for i in range(0, num_rows, _ROWS)
        )

    def __enter__(self) -> "SafetensorsReader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._files:
            file.__exit__(kind, error, trace)


def _sharded_modules(model: nn.Module) -> Iterator[tuple[str, ShardedModule]]:
    """With their paths; shared ones come once."""
    for path, module in model.named_modules():
        if isinstance(module, ShardedModule):
            yield path, module


def load_model(
    config: EngineConfig,
    model_config: ModelConfig,
    directory: Path,
    max_len: int,
    dtype: torch.dtype,
    device: torch.device,
    ops: Ops,
    parallel: RankGroup,
    show_progress: bool = False,
) -> CausalLM:
    """One rank's model with its weights, in the layout of the device's ops."""
    if model_config.tied_embeddings and config.load_format != "dummy":
        model_config = replace(model_config, tied_embeddings=not _has_own_head(directory))
    weights = weight_format(read_json(directory, "config.json"), config.quantization)
    context = BuildContext(model_config.hidden_size, model_config.rms_eps, ops, parallel, weights)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = CausalLM(model_config, max_len, context)
    finally:
        torch.set_default_dtype(previous)

    def pack(module: ShardedModule) -> None:
        module.pack(ops)

    if config.load_format == "dummy":
        load_dummy_weights(model, config.seed, pack)
    else:
        load_weights(model, directory, show_progress, pack)
    model.pack_head(ops, config.quantization)
    return model


def _has_own_head(directory: Path) -> bool:
    """Whether there is a head other than the embedding: it counts, whatever the config says."""
    with SafetensorsReader(directory) as reader:
        return {_HEAD, _EMBEDDING} <= reader.names and not reader.equal(_HEAD, _EMBEDDING)


def _do_nothing(_: ShardedModule) -> None: ...


@torch.no_grad()
def load_weights(
    model: CausalLM,
    directory: Path,
    show_progress: bool = True,
    filled: Callable[[ShardedModule], None] = _do_nothing,
) -> None:
    """Fill every parameter; a tensor missing, left over or of the wrong shape is an error.

    Files are mapped, and the memory of a parameter is only taken when it is filled (on a CPU). So
    with `filled`, called with each module once it is, never more than one exists in two layouts.
    """
    modules = list(_sharded_modules(model))
    used: set[str] = set()
    with (
        SafetensorsReader(directory) as reader,
        Progress(
            total=sum(p.nbytes for _, module in modules for p in module.parameters(recurse=False)),
            desc="Loading weights",
            unit="B",
            unit_scale=True,
            disable=not show_progress,
        ) as progress,
    ):
        for path, module in modules:
            for name, parts in module.sources.items():
                parameter = module.get_parameter(name)
                sources = [replace(part, name=part.full_name(path)) for part in parts]
                _fill(parameter, sources, reader)
                used.update(source.name for source in sources)
                progress.update(parameter.nbytes)
            filled(module)
        leftover = {n for n in reader.names - used if not n.endswith(_IGNORED_SUFFIXES)}
        # Files of tied models may repeat the embedding under the head's name.
        if model.is_tied:
            leftover.discard(_HEAD)
    if leftover:
        names = ", ".join(sorted(leftover)[:5])
        raise CheckpointError(f"the checkpoint has tensors this model has no place for: {names}")


def _fill(parameter: Tensor, sources: list[Source], reader: SafetensorsReader) -> None:
    offset, into = 0, sources[0].into_dim
    for source in sources:
        tensor = reader.read(source)
        size = tensor.shape[into]
        parameter.narrow(into, offset, size).copy_(tensor)
        offset += size
    parameter.narrow(into, offset, parameter.shape[into] - offset).zero_()  # pads a vocabulary


@torch.no_grad()
def load_dummy_weights(
    model: nn.Module, seed: int, filled: Callable[[ShardedModule], None] = _do_nothing
) -> None:
    """Random weights of a trained model's size, so that activations stay finite."""
    generator = torch.Generator(device=next(model.parameters()).device).manual_seed(seed)
    for _, module in _sharded_modules(model):
        for name in module.sources:
            parameter = module.get_parameter(name)
            if parameter.dim() == 1 and name == "weight":
                parameter.fill_(1.0)
            elif not parameter.is_floating_point():
                parameter.random_(generator=generator)
            else:
                parameter.normal_(0.0, 0.02, generator=generator)
        filled(module)
