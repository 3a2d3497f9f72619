"""Layers that know which slice of which checkpoint tensors they hold on this rank."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.parallel import TensorParallel
from kernels import Ops
from kernels.quantization import Quantization
from kernels.types import Linear


@dataclass(frozen=True)
class Source:
    """Part of a parameter: [start, end) along `dim` of the checkpoint's tensor `name` of `shape`.

    A parameter with several sources holds them one after another along dimension 0.
    """

    name: str
    shape: tuple[int, ...]
    dim: int
    start: int
    end: int


def _whole(name: str, size: int) -> Source:
    return Source(name, (size,), 0, 0, size)


class ShardedModule(nn.Module):
    """A module that says, per parameter, where its values are in the checkpoint."""

    weight: nn.Parameter

    def __init__(self) -> None:
        super().__init__()
        self.sources: dict[str, list[Source]] = {}

    def add_parameter(self, name: str, shape: tuple[int, ...], sources: list[Source]) -> None:
        """An uninitialized parameter of the default dtype on the default device."""
        self.register_parameter(name, nn.Parameter(torch.empty(shape), requires_grad=False))
        self.sources[name] = sources


class ColumnLinear(ShardedModule):
    """Linear maps of one input, fused; each rank computes its share of every output.

    Args:
        outputs: (checkpoint prefix, output features, shards) per fused map; `shards` is into how
            many parts the outputs are cut, None for one per rank.
    """

    def __init__(
        self,
        outputs: list[tuple[str, int, int | None]],
        in_features: int,
        bias: bool,
        parallel: TensorParallel,
    ) -> None:
        super().__init__()
        shares = [(prefix, size, *parallel.share(size, cut)) for prefix, size, cut in outputs]
        sizes = [end - start for _, _, start, end in shares]
        self.add_parameter(
            "weight",
            (sum(sizes), in_features),
            [
                Source(f"{prefix}.weight", (size, in_features), 0, start, end)
                for prefix, size, start, end in shares
            ],
        )
        self.bias: nn.Parameter | None
        if not bias:
            self.bias = None
        else:
            self.add_parameter(
                "bias",
                (sum(sizes),),
                [
                    Source(f"{prefix}.bias", (size,), 0, start, end)
                    for prefix, size, start, end in shares
                ],
            )

    def pack(self, ops: Ops, quantization: Quantization | None) -> None:
        """Once it is loaded, bring the weight into the device's layout."""
        self._linear: Linear = ops.pack_linear(self.weight.data, self.bias, quantization)
        del self.weight

    def forward(self, x: Tensor) -> Tensor:
        return self._linear(x)


class RowLinear(ShardedModule):
    """A linear map whose input is spread over the ranks; the outputs are summed over them."""

    def __init__(
        self, prefix: str, in_features: int, out_features: int, bias: bool, parallel: TensorParallel
    ) -> None:
        super().__init__()
        self._parallel = parallel
        start, end = parallel.share(in_features)
        self.add_parameter(
            "weight",
            (out_features, end - start),
            [Source(f"{prefix}.weight", (out_features, in_features), 1, start, end)],
        )
        self.bias: nn.Parameter | None
        if not bias:
            self.bias = None
        else:
            self.add_parameter("bias", (out_features,), [_whole(f"{prefix}.bias", out_features)])

    def pack(self, ops: Ops, quantization: Quantization | None) -> None:
        """As ColumnLinear's."""
        bias = self.bias if self._parallel.rank == 0 else None  # added once, not by every rank
        self._linear: Linear = ops.pack_linear(self.weight.data, bias, quantization)
        del self.weight

    def forward(self, x: Tensor) -> Tensor:
        return self._parallel.all_reduce(self._linear(x))


class Norm(ShardedModule):
    """The weight of an RMS norm, whole on every rank."""

    def __init__(self, prefix: str, size: int) -> None:
        super().__init__()
        self.add_parameter("weight", (size,), [_whole(f"{prefix}.weight", size)])


class VocabEmbedding(ShardedModule):
    """Token embedding and language-model head over a vocabulary spread over the ranks."""

    def __init__(
        self, prefix: str, vocab_size: int, hidden_size: int, parallel: TensorParallel
    ) -> None:
        super().__init__()
        self._vocab_size = vocab_size
        self._parallel = parallel
        self._start, self._end = parallel.share(vocab_size)
        # The same size on every rank, for all_gather; the last may have rows to spare.
        self.add_parameter(
            "weight",
            (-(-vocab_size // parallel.size), hidden_size),
            [Source(f"{prefix}.weight", (vocab_size, hidden_size), 0, self._start, self._end)],
        )

    def embed(self, ops: Ops, token_ids: Tensor) -> Tensor:
        """[T] int64 -> [T, hidden]."""
        if self._parallel.size == 1:
            return ops.embed(token_ids, self.weight)
        local = token_ids - self._start
        elsewhere = (token_ids < self._start) | (token_ids >= self._end)
        embedded = ops.embed(local.masked_fill(elsewhere, 0), self.weight)
        return self._parallel.all_reduce(embedded.masked_fill(elsewhere.unsqueeze(1), 0))

    def pack_head(self, ops: Ops, quantization: Quantization | None, tied: bool) -> None:
        """As ColumnLinear.pack, for `logits`; a tied weight stays, for `embed`."""
        self._linear: Linear = ops.pack_linear(self.weight.data, None, quantization)
        if not tied:
            del self.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, hidden] -> [N, vocab]."""
        gathered = self._parallel.all_gather(self._linear(hidden))
        return gathered[:, : self._vocab_size]
