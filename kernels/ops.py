"""The op interface: the functions a model is made of, as one table per device."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import reference


@dataclass(frozen=True)
class Ops:
    """The functions of `kernels.reference`, which documents them, for one device.

    A faster implementation replaces entries of the table with `dataclasses.replace`. The three
    cache functions go together: whoever allocates the cache owns its layout.
    """

    name: str
    new_kv_cache: Callable[..., reference.KVCache] = reference.new_kv_cache
    store_kv: Callable[[Tensor, Tensor, reference.KVCache, Tensor], None] = reference.store_kv
    paged_attention: Callable[..., Tensor] = reference.paged_attention
    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = reference.rms_norm
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]] = (
        reference.add_rms_norm
    )
    rotary: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = reference.rotary
    silu_and_mul: Callable[[Tensor], Tensor] = reference.silu_and_mul
    sample: Callable[..., Tensor] = reference.sample


REFERENCE = Ops("reference")


def select_ops(device: torch.device) -> Ops:
    """The fastest ops this installation has for the device."""
    return REFERENCE
