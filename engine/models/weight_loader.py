"""The weights of a model of our blocks from a checkpoint, each rank reading only its slices."""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.checkpoint.files import CheckpointError
from engine.models.blocks.linear import ShardedModule, Source
from engine.models.config import ModelConfig
from engine.models.decoder import CausalLM
from engine.models.reader import TensorReader, open_tensors
from engine.models.rewrite import UNCHANGED, Rewrites, RewrittenReader
from engine.progress import Progress
from kernels import Ops
from kernels.grouped import StoredWeight, have_one_order

# In old checkpoints, though recomputed by every loader.
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)
_logger = logging.getLogger(__name__)
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def _sharded_modules(model: nn.Module) -> Iterator[tuple[str, ShardedModule]]:
    """With their paths; shared ones come once."""
    for path, module in model.named_modules():
        if isinstance(module, ShardedModule):
            yield path, module


def has_own_head(config: ModelConfig, directory: Path) -> bool:
    """Whether there is a head other than the embedding: it counts, whatever the config says."""
    with RewrittenReader(open_tensors(directory), config.rewrites) as reader:
        return {_HEAD, _EMBEDDING} <= reader.names and not reader.equal(_HEAD, _EMBEDDING)


def _do_nothing(_: ShardedModule) -> None: ...


@torch.no_grad()
def load_weights(
    model: CausalLM,
    directory: Path,
    show_progress: bool = True,
    filled: Callable[[ShardedModule], None] = _do_nothing,
    rewrites: Rewrites = UNCHANGED,
    stored_for: Ops | None = None,
) -> None:
    """Fill every parameter; a tensor missing, left over or of the wrong shape is an error.

    Files are mapped, and the memory of a parameter is only taken when it is filled. So
    with `filled`, called with each module once it is, never more than one exists in two layouts.

    Args:
        stored_for: whose kernels multiply weights with the bits that they are stored with.
    """
    modules = list(_sharded_modules(model))
    with (
        RewrittenReader(open_tensors(directory), rewrites) as reader,
        Progress(
            total=sum(p.nbytes for _, module in modules for p in module.parameters(recurse=False)),
            desc="Loading weights",
            unit="B",
            unit_scale=True,
            disable=not show_progress,
        ) as progress,
    ):
        wanted = {
            (module, name): [replace(part, name=part.full_name(path)) for part in parts]
            for path, module in modules
            for name, parts in module.sources.items()
        }
        _check(wanted.values(), reader, model.is_tied)
        widened: list[Tensor] = []
        for _, module in modules:
            is_packed = False
            for name in sorted(module.sources):  # a bias before the weight that is packed with it
                parameter, sources = module.get_parameter(name), wanted[module, name]
                progress.update(parameter.nbytes)
                if stored_for and name == "weight":
                    parts = _stored(sources, reader, parameter)
                    is_packed = bool(parts) and module.pack_stored(stored_for, parts)
                    if is_packed:
                        continue
                    if reader.narrow.intersection(source.name for source in sources):
                        widened.append(parameter)
                _fill(module.reserve(name), sources, reader)
            if not is_packed:
                filled(module)
        if widened:
            size = sum(parameter.nbytes for parameter in widened) / 2**20
            _logger.warning(
                "%d of the weights are stored with bits that no kernel multiplies here; as %s they "
                "take %.1f MiB",
                len(widened),
                widened[0].dtype,
                size,
            )


def _stored(
    sources: list[Source], reader: TensorReader, parameter: Tensor
) -> list[Tensor | StoredWeight]:
    """Of a weight what is stored of it, and what is as values; nothing where all of it is.

    Values are of the parameter's type, and all will be where it is.
    """
    if not reader.narrow.intersection(source.name for source in sources):
        return []
    parts: list[Tensor | StoredWeight] = []
    for source in sources:
        stored = reader.stored(source) if source.name in reader.narrow else None
        if stored is None:
            parts.append(reader.read(source).to(parameter))
        else:
            parts.append(stored.to(parameter.device))
    is_stored = any(isinstance(part, StoredWeight) for part in parts)
    return parts if is_stored and have_one_order(parts) else []


def _check(wanted: Iterable[list[Source]], reader: TensorReader, is_tied: bool) -> None:
    """Raises CheckpointError for what is missing, misshapen or left over, before any is read."""
    names = reader.names
    used = {_HEAD} if is_tied else set()  # files of tied models may repeat the embedding
    for source in (source for sources in wanted for source in sources):
        used.add(source.name)
        if not _is_no_bias(source, names):
            reader.check(source)
    leftover = {name for name in names - used if not name.endswith(_IGNORED_SUFFIXES)}
    if leftover:
        listed = ", ".join(sorted(leftover)[:5])
        raise CheckpointError(f"the checkpoint has tensors this model has no place for: {listed}")


def _is_no_bias(source: Source, names: set[str]) -> bool:
    """Whether it is a bias that the checkpoint does not have: zeros, also for transformers."""
    return source.name.endswith(".bias") and source.name not in names


def _fill(parameter: Tensor, sources: list[Source], reader: TensorReader) -> None:
    offset, into = 0, sources[0].into_dim
    for source in sources:
        size = source.cut_shape[into]
        if _is_no_bias(source, reader.names):
            parameter.narrow(into, offset, size).zero_()
        else:
            parameter.narrow(into, offset, size).copy_(reader.read(source))
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
            parameter = module.reserve(name)
            if parameter.dim() == 1 and name == "weight":
                parameter.fill_(1.0)
            elif not parameter.is_floating_point():
                parameter.random_(generator=generator)
            else:
                parameter.normal_(0.0, 0.02, generator=generator)
        filled(module)
