"""How Python calls the compiled functions: pointers, sizes and a number for the dtype."""

import ctypes
from typing import Any

import torch

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def declare(library: ctypes.CDLL, signatures: dict[str, list[Any]]) -> None:
    """Tell ctypes the arguments of the library's functions, none of which returns anything."""
    for name, argument_types in signatures.items():
        function = getattr(library, f"manta_{name}")
        function.argtypes = argument_types
        function.restype = None
