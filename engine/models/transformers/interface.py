"""transformers' attention interface, answered by whoever computes the model at the moment."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "manta"
MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # of batch, head, query, key


class Attends(Protocol):
    def attend(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        **options: Any,
    ) -> Tensor:
        """[1, T, H, Dv] for q [1, H, T, D], k [1, K, T, D] and v [1, K, T, Dv]."""

    def mask(self, function: MaskFunction, device: torch.device) -> Tensor:
        """What layers of one kind are given as their mask."""


class _Now(threading.local):
    attends: Attends | None = None  # while this thread computes a model


_now = _Now()


@contextmanager
def attention_by(attends: Attends) -> Iterator[None]:
    """Within it, models of this implementation are answered by this object."""
    before, _now.attends = _now.attends, attends
    try:
        yield
    finally:
        _now.attends = before


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """As transformers' attention functions: [1, T, H, Dv], and no weights."""
    assert _now.attends is not None
    return _now.attends.attend(module, query, key, value, attention_mask, **options), None


def _mask(*, mask_function: MaskFunction, device: torch.device, **_: Any) -> Tensor:
    assert _now.attends is not None
    return _now.attends.mask(mask_function, device)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, _mask)
