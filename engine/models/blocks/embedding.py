"""Token embedding and language-model head over a vocabulary spread over the ranks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.models.blocks.linear import BuildContext, ShardedModule, Source, pack_stored
from kernels import Ops
from kernels.grouped import StoredWeight
from kernels.quantization import Quantization
from kernels.types import Linear, Table


class VocabEmbedding(ShardedModule):
    def __init__(self, context: BuildContext, vocab_size: int) -> None:
        super().__init__()
        self._ops = context.ops
        self._dtype = torch.get_default_dtype()  # the model's
        self._linear: Linear | None = None
        self._vocab_size = vocab_size
        self._parallel = context.parallel
        self._start, self._end = context.parallel.share(vocab_size)
        # The same size on every rank, for all_gather; the last may have rows to spare.
        shape = -(-vocab_size // context.parallel.size), context.hidden_size
        whole = vocab_size, context.hidden_size
        self.add_parameter("weight", shape, [Source(".weight", whole, 0, self._start, self._end)])

    def embed(self, token_ids: Tensor) -> Tensor:
        """[T] int64 -> [T, hidden]."""
        if self._parallel.size == 1:
            return self._rows(token_ids)
        local = token_ids - self._start
        elsewhere = (token_ids < self._start) | (token_ids >= self._end)
        embedded = self._rows(local.masked_fill(elsewhere, 0))
        return self._parallel.all_reduce(embedded.masked_fill(elsewhere.unsqueeze(1), 0))

    def _rows(self, ids: Tensor) -> Tensor:
        if isinstance(self._linear, Table):
            return self._linear.rows(ids, self._dtype)
        return self._ops.embed(ids, self.weight)

    def pack_stored(self, ops: Ops, parts: Sequence[Tensor | StoredWeight]) -> bool:
        is_whole = parts[0].shape[0] == len(self.weight)  # not filled up on the last rank
        packed = pack_stored(ops, parts, None) if is_whole else None
        if not isinstance(packed, Table):
            return False
        self._linear = packed
        del self.weight
        return True

    def pack_head(self, ops: Ops, quantization: Quantization | None, tied: bool) -> None:
        """Once it is loaded, be ready for `logits`; a tied weight that is no table stays."""
        if self._linear is None:
            self._linear = ops.pack_linear(self.weight.data, None, quantization)
            if not tied or isinstance(self._linear, Table):
                del self.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, hidden] -> [N, vocab]."""
        assert self._linear is not None
        gathered = self._parallel.all_gather(self._linear(hidden))
        return gathered[:, : self._vocab_size]
