"""Sampling by the C++ kernels."""

import ctypes
from ctypes import c_int, c_int64, c_void_p

import torch
from torch import Tensor

from kernels import reference
from kernels.cpu.library import DTYPES, declare
from kernels.cpu.recorder import empty
from kernels.types import SamplingTable

_SIGNATURES = {
    "sample": [c_int, c_void_p, *[c_int64] * 3, *[c_void_p] * 8],
    "apply_bitmask": [c_void_p, *[c_int64] * 3, c_void_p],
    "top_logprobs": [c_int, c_void_p, *[c_int64] * 4, *[c_void_p] * 4],
}


class CpuSampling:
    """Implements `kernels.ops.Sampling`."""

    penalize = staticmethod(reference.penalize)

    def __init__(self, library: ctypes.CDLL) -> None:
        declare(library, _SIGNATURES)
        self._sample = library.manta_sample
        self._apply_bitmask = library.manta_apply_bitmask
        self._top_logprobs = library.manta_top_logprobs

    def sample(
        self, logits: Tensor, table: SamplingTable, rows: Tensor, positions: Tensor
    ) -> Tensor:
        num_rows, vocab = logits.shape
        tokens = empty((num_rows,), torch.int64)
        self._sample(
            DTYPES[logits.dtype],
            logits.data_ptr(),
            num_rows,
            vocab,
            logits.stride(0),
            *(column.data_ptr() for column in table),
            rows.data_ptr(),
            positions.data_ptr(),
            tokens.data_ptr(),
        )
        return tokens

    def apply_bitmask(self, logits: Tensor, bitmask: Tensor) -> None:
        assert logits.dtype == torch.float32 and logits.stride(1) == 1
        bitmask = bitmask.contiguous()
        rows, vocab = logits.shape
        self._apply_bitmask(logits.data_ptr(), rows, vocab, logits.stride(0), bitmask.data_ptr())

    def top_logprobs(
        self, logits: Tensor, token_ids: Tensor, count: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, vocab = logits.shape
        ids = empty((rows, 1 + count), torch.int64)
        logprobs = empty((rows, 1 + count), torch.float32)
        ranks = empty((rows,), torch.int64)
        self._top_logprobs(
            DTYPES[logits.dtype],
            logits.data_ptr(),
            rows,
            vocab,
            logits.stride(0),
            count,
            token_ids.data_ptr(),
            ids.data_ptr(),
            logprobs.data_ptr(),
            ranks.data_ptr(),
        )
        return ids, logprobs, ranks
