"""A recorder of CUDA graphs without CUDA: it runs the same work on the same tensors again."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class _NoTalkToHost(TorchFunctionMode):
    """While a GPU records, the host can neither read a tensor nor send it numbers."""

    _FORBIDDEN = (
        torch.Tensor.item,
        torch.Tensor.tolist,
        torch.Tensor.__bool__,
        torch.Tensor.nonzero,
        torch.tensor,
    )

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert func not in self._FORBIDDEN, f"{func} cannot be recorded"
        return func(*args, **kwargs or {})


class FakeRecorder:
    """Counts what it records, and if it is strict forbids what CUDA would."""

    ahead = True

    def __init__(self, strict: bool = False) -> None:
        self.num_recorded = 0
        self._strict = strict

    def record(self, run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        self.num_recorded += 1
        with _NoTalkToHost() if self._strict else nullcontext():
            result = run()

        def replay() -> None:
            result.copy_(run())

        return result, replay
