"""Modules that know which slice of which checkpoint tensors they hold on this rank."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from engine.models.weights.format import StoredTensor, WeightFormat
from engine.ranks.rank_group import RankGroup
from kernels import Ops
from kernels.grouped import StoredWeight
from kernels.types import Linear, Rounded


@dataclass(frozen=True)
class BuildContext:
    """What blocks are built with, beside their own configuration."""

    hidden_size: int
    rms_eps: float
    ops: Ops
    parallel: RankGroup
    weights: WeightFormat


@dataclass(frozen=True)
class Source:
    """Part of a parameter: [start, end) along `dim` of the checkpoint's tensor `name` of `shape`.

    A name that begins with a dot follows the module's own path, others that of its parent: so a
    model's attributes are called as the checkpoint calls them. A parameter with several sources
    holds them one after another along `into_dim`.
    """

    name: str
    shape: tuple[int, ...]
    dim: int
    start: int
    end: int
    into_dim: int = 0
    dtype: torch.dtype | None = None  # that the checkpoint's must have; None: any floating point

    @property
    def cut_shape(self) -> tuple[int, ...]:
        size = self.end - self.start
        return tuple(size if i == self.dim else n for i, n in enumerate(self.shape))

    def full_name(self, path: str) -> str:
        """In the checkpoint, for a module at this path of the model."""
        if self.name.startswith("."):
            return path + self.name
        parent = path.rpartition(".")[0]
        return f"{parent}.{self.name}" if parent else self.name


class ShardedModule(nn.Module):
    """A module that says, per parameter, where its values are in the checkpoint."""

    weight: nn.Parameter

    def __init__(self) -> None:
        super().__init__()
        self.sources: dict[str, list[Source]] = {}

    def add_parameter(
        self,
        name: str,
        shape: Sequence[int],
        sources: list[Source],
        dtype: torch.dtype | None = None,
    ) -> None:
        """A parameter, by default of the default dtype, on the default device.

        It takes no memory until `reserve`: it may be packed as it is read instead.
        """
        values = torch.empty(tuple(shape), dtype=dtype)
        values.untyped_storage().resize_(0)
        self.register_parameter(name, nn.Parameter(values, requires_grad=False))
        self.sources[name] = sources

    def reserve(self, name: str) -> nn.Parameter:
        """The parameter of this name, ready to be filled."""
        parameter = self.get_parameter(name)
        parameter.untyped_storage().resize_(parameter.nbytes)
        return parameter

    def pack(self, ops: Ops) -> None:
        """Its parameters are loaded: bring them into the device's layout, where that is another."""

    def pack_stored(self, ops: Ops, parts: Sequence[Tensor | StoredWeight]) -> bool:
        """Instead of loading `weight`: pack it with the bits that are stored, if that can be done.

        Args:
            parts: of its sources, in order.
        """
        return False


def pack_stored(
    ops: Ops, parts: Sequence[Tensor | StoredWeight], bias: Tensor | None
) -> Linear | None:
    """By the device's kernels, for inputs in the order that all of the parts have them in."""
    packed = ops.pack_stored(parts, bias) if ops.pack_stored else None
    order = parts[0].order if isinstance(parts[0], StoredWeight) else None
    if packed is None or order is None:
        return packed
    return partial(_of_ordered, linear=packed, order=order)


def _of_ordered(x: Tensor, linear: Linear, order: Tensor) -> Tensor:
    return linear(x.index_select(1, order))


class ShardedLinear(ShardedModule):
    """A rank's part of linear maps: as the checkpoint has them, and once packed as the device."""

    def __init__(self, weights: WeightFormat) -> None:
        super().__init__()
        self._weights = weights
        self._dtype = torch.get_default_dtype()  # the model's
        self._tensors: list[str] = []
        self._linear: Callable[[Any], Tensor]
        self.bias: nn.Parameter | None = None

    def add_weights(self, sources: Mapping[str, list[Source]]) -> None:
        """Parameters that hold these parts of the tensors of a format."""
        for name, parts in sources.items():
            shape, into = list(parts[0].cut_shape), parts[0].into_dim
            shape[into] = sum(part.cut_shape[into] for part in parts)
            self.add_parameter(name, shape, parts, parts[0].dtype)
            self._tensors.append(name)

    def add_bias(self, sources: list[Source]) -> None:
        del self.bias
        self.add_parameter("bias", [sum(part.end - part.start for part in sources)], sources)

    def pack(self, ops: Ops) -> None:
        tensors = {name: self.get_parameter(name).data for name in self._tensors}
        self._linear = self._weights.pack(ops, tensors, self._packed_bias(), self._dtype)
        for name in self._tensors:
            delattr(self, name)

    def pack_stored(self, ops: Ops, parts: Sequence[Tensor | StoredWeight]) -> bool:
        packed = pack_stored(ops, parts, self._packed_bias())
        if packed is None:
            return False
        self._linear = packed
        for name in self._tensors:
            delattr(self, name)
        return True

    def _packed_bias(self) -> Tensor | None:
        return self.bias

    @property
    def takes_rounded(self) -> bool:
        """Whether it would round its inputs itself; see `kernels.ops.Rounding`."""
        return getattr(self._linear, "takes_rounded", False)

    def forward(self, x: Tensor | Rounded) -> Tensor:
        return self._linear(x)


class ColumnLinear(ShardedLinear):
    """Linear maps of one input, fused; each rank computes its share of every output.

    Args:
        outputs: output features of each map, by its name beside this module.
        shards: into how many parts the outputs of a map are cut, where it is not one per rank.
    """

    def __init__(
        self,
        context: BuildContext,
        outputs: Mapping[str, int],
        in_features: int,
        bias: bool = False,
        shards: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(context.weights)
        sources: dict[str, list[Source]] = {}
        of_bias = []
        for name, size in outputs.items():
            start, end = context.parallel.share(size, (shards or {}).get(name))
            for tensor in context.weights.tensors(size, in_features):
                part = _part(tensor, name, tensor.out_dim, tensor.outs_per_entry, start, end)
                sources.setdefault(tensor.name, []).append(part)
            of_bias.append(Source(f"{name}.bias", (size,), 0, start, end))
        self.add_weights(sources)
        if bias:
            self.add_bias(of_bias)


class RowLinear(ShardedLinear):
    """A linear map whose input is spread over the ranks; the outputs are summed over them."""

    def __init__(
        self, context: BuildContext, in_features: int, out_features: int, bias: bool = False
    ) -> None:
        super().__init__(context.weights)
        self._parallel = context.parallel
        start, end = context.parallel.share(in_features)
        self.add_weights(
            {
                tensor.name: [_part(tensor, "", tensor.in_dim, tensor.ins_per_entry, start, end)]
                for tensor in context.weights.tensors(out_features, in_features)
            }
        )
        if bias:
            self.add_bias([Source(".bias", (out_features,), 0, 0, out_features)])

    def _packed_bias(self) -> Tensor | None:
        return self.bias if self._parallel.rank == 0 else None  # added once, not by every rank

    def forward(self, x: Tensor | Rounded) -> Tensor:
        return self._parallel.all_reduce(self._linear(x))


def _part(
    tensor: StoredTensor, name: str, dim: int | None, per_entry: int, start: int, end: int
) -> Source:
    """Of one tensor of a map of this name ("": the module's own) what [start, end) of it needs."""
    cut = (0, tensor.shape[0]) if dim is None else (start // per_entry, -(-end // per_entry))
    into_dim = tensor.out_dim or 0
    return Source(f"{name}.{tensor.name}", tensor.shape, dim or 0, *cut, into_dim, tensor.dtype)
