"""Small arrays between host and device, without the one ever waiting for the other.

On a GPU a copy from or to ordinary memory makes the host wait until all work before it is done.
Through pinned memory it takes its place in the stream instead. (torch keeps a pinned block until
the copy is done.) On a CPU all of this costs nothing.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_NUMPY = {torch.int32: np.int32, torch.int64: np.int64, torch.float32: np.float32}


def to_device(
    values: Sequence[object] | np.ndarray, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A tensor of these numbers, there for whatever the stream runs next."""
    # By numpy, which takes a quarter of the time that `torch.tensor` takes. Always a copy.
    host = torch.from_numpy(np.array(values, _NUMPY[dtype], order="C"))
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


class ToHost:
    """A tensor on its way to the host, which nobody writes to any more."""

    def __init__(self, tensor: Tensor) -> None:
        self._host, self._arrived = tensor, None
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def wait(self) -> Tensor:
        """On the host, once the stream has come so far."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host
