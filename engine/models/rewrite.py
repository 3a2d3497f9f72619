"""Tensors of a checkpoint, read as our blocks want them.

What a family stores as one map, in another order or times a number is settled when it is loaded,
and no step pays for it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from engine.models.blocks.linear import Source
from engine.models.reader import TensorReader
from kernels.grouped import StoredWeight


@dataclass(frozen=True)
class Rewrite:
    """How the tensors of one of our modules come of the checkpoint's: (stored + plus) * times.

    And without their mean over the outputs or, of an embedding, over a token's values.
    """

    stored: str | None = None  # the module's name in the checkpoint, where it is another
    first_row: int = 0  # of the stored tensor's `rows`, which hold those of several modules
    rows: int | None = None
    order: tuple[int, ...] = ()  # where each of a head's rows is stored
    plus: float = 0.0
    times: float = 1.0
    without_mean_of: int | None = None  # a dimension


@dataclass(frozen=True)
class Rewrites:
    modules: Mapping[str, Rewrite] = field(default_factory=dict)  # by the last part of their path
    names: tuple[tuple[str, str], ...] = ()  # parts of all names: as stored, and ours
    head_is_embedding: bool = False  # as it is stored, where ours is another

    def ordered(self, order: tuple[int, ...]) -> "Rewrites":
        """With the rows of each head of queries and keys in another order."""
        modules = dict(self.modules)
        for name in ("q_proj", "k_proj", "q_norm", "k_norm"):
            modules[name] = replace(modules.get(name, Rewrite()), order=order)
        return replace(self, modules=modules)


UNCHANGED = Rewrites()


def parts(stored: str, sizes: Mapping[str, int]) -> dict[str, Rewrite]:
    """Of linear maps that are stored as one: their outputs by name, in order."""
    ends = [sum(list(sizes.values())[: i + 1]) for i in range(len(sizes))]
    return {
        name: Rewrite(stored, end - size, ends[-1])
        for (name, size), end in zip(sizes.items(), ends, strict=True)
    }


def rotary_order(head_dim: int, rotary_dim: int, interleaved: bool = False) -> tuple[int, ...]:
    """Rows of a head of which the first `rotary_dim` are rotated, in pairs.

    Our kernels rotate all of a head's halves, of which the last may stand still. The scores of
    queries and keys that are both ordered so are the same.
    """
    half, still = rotary_dim // 2, (head_dim + rotary_dim) // 2
    first, second = range(half), range(half, rotary_dim)
    if interleaved:
        first, second = range(0, rotary_dim, 2), range(1, rotary_dim, 2)
    return (*first, *range(rotary_dim, still), *second, *range(still, head_dim))


class RewrittenReader:
    """Implements `TensorReader` over another, by our names."""

    def __init__(self, reader: TensorReader, rewrites: Rewrites) -> None:
        self._reader = reader
        self._stored: dict[str, tuple[str, Rewrite]] = {}  # by our name
        by_stored: dict[str, list[str]] = {}
        for module, rewrite in rewrites.modules.items():
            by_stored.setdefault(rewrite.stored or module, []).append(module)
        for name in reader.names:
            own = name
            for theirs, ours in rewrites.names:
                own = own.replace(theirs, ours)
            path, _, what = own.rpartition(".")
            parent, dot, module = path.rpartition(".")
            for renamed in by_stored.get(module, [module]):
                rewrite = rewrites.modules.get(renamed, Rewrite())
                self._stored[f"{parent}{dot}{renamed}.{what}"] = name, rewrite
        if rewrites.head_is_embedding and "model.embed_tokens.weight" in self._stored:
            stored, _ = self._stored["model.embed_tokens.weight"]
            self._stored.setdefault("lm_head.weight", (stored, Rewrite()))
        self.num_values = reader.num_values
        self.narrow = {ours for ours, (name, _) in self._stored.items() if name in reader.narrow}

    @property
    def names(self) -> set[str]:
        return set(self._stored)

    def _source(self, source: Source) -> Source:
        """What is to be read of the checkpoint."""
        name, rewrite = self._stored.get(source.name, (source.name, Rewrite()))
        shape, first = source.shape, rewrite.first_row
        if rewrite.rows is not None:
            shape = (rewrite.rows, *shape[1:])
        return replace(
            source, name=name, shape=shape, start=source.start + first, end=source.end + first
        )

    def check(self, source: Source) -> None:
        self._reader.check(self._source(source))

    def read(self, source: Source) -> Tensor:
        values = self._reader.read(self._source(source))
        rewrite = self._stored[source.name][1]
        if order := list(rewrite.order):
            values = values.unflatten(0, (-1, len(order)))[:, order].flatten(0, 1)
        if rewrite.plus:
            values = values.float() + rewrite.plus
        if (dim := rewrite.without_mean_of) is not None:
            values = values.float() - values.float().mean(dim, keepdim=True)
        return values if rewrite.times == 1 else values * rewrite.times

    def stored(self, source: Source) -> StoredWeight | None:
        rewrite = self._stored[source.name][1]
        if rewrite.plus or rewrite.without_mean_of is not None:
            return None
        weight = self._reader.stored(self._source(source))
        if weight is not None and rewrite.order:
            rows = torch.arange(weight.shape[0]).unflatten(0, (-1, len(rewrite.order)))
            weight = weight.ordered(rows[:, list(rewrite.order)].flatten())
        return weight if weight is None or rewrite.times == 1 else weight.times(rewrite.times)

    def values(self, name: str) -> Tensor:
        return self._reader.values(self._stored[name][0])

    def equal(self, name: str, other: str) -> bool:
        return self._reader.equal(self._stored[name][0], self._stored[other][0])

    def __enter__(self) -> "RewrittenReader":
        return self

    def __exit__(self, *_: Any) -> None:
        self._reader.__exit__()
