"""A library of kernels for another architecture, called through an emulator of its processors.

With each call the memory around the addresses among its arguments goes to the emulator, and comes
back: see call_server.cpp.
"""

import ctypes
import struct
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from ctypes import c_float, c_void_p
from typing import Any
from weakref import WeakValueDictionary

import torch

# What has been asked for its address; kernels get no others.
_tensors: "WeakValueDictionary[int, torch.Tensor]" = WeakValueDictionary()


@contextmanager
def emulated_library(command: list[str]) -> Iterator["EmulatedLibrary"]:
    """command: starts the call server with a library."""
    data_ptr = torch.Tensor.data_ptr

    def noted(tensor: torch.Tensor) -> int:
        address = data_ptr(tensor)
        _tensors[address] = tensor
        return address

    torch.Tensor.data_ptr = noted  # type: ignore[method-assign]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        yield EmulatedLibrary(server)
    finally:
        torch.Tensor.data_ptr = data_ptr  # type: ignore[method-assign]
        server.kill()
        server.communicate()


class EmulatedLibrary:
    """What the ops take for a `ctypes.CDLL`."""

    def __init__(self, server: "subprocess.Popen[bytes]") -> None:
        self._server = server

    def __getattr__(self, name: str) -> "_Function":
        function = _Function(self, name)
        setattr(self, name, function)
        return function

    def call(self, name: str, values: list[tuple[Any, Any]]) -> int:
        """values: (argument, type) of each, where the type may be unknown (None)."""
        buffers: dict[int, int] = {}  # sizes, by their addresses
        integers, of_buffer, floats = [], [], []
        for value, kind in values:
            if kind is c_float:
                floats.append(value)
                continue
            integers.append(int(value or 0))
            of_buffer.append(-1)
            if kind is c_void_p and value:
                storage = _tensors[value].untyped_storage()
                start = storage.data_ptr()
                buffers[start] = storage.nbytes()
                integers[-1] = value - start
                of_buffer[-1] = list(buffers).index(start)
        stdin, stdout = self._server.stdin, self._server.stdout
        assert stdin is not None and stdout is not None
        encoded = name.encode()
        stdin.write(struct.pack("<Q", len(encoded)) + encoded + _pack("Q", buffers.values()))
        for address, size in buffers.items():
            stdin.write(ctypes.string_at(address, size))
        stdin.write(_pack("q", integers) + _pack("q", of_buffer) + _pack("f", floats))
        stdin.flush()
        (result,) = struct.unpack("<q", stdout.read(8))
        for address, size in buffers.items():
            ctypes.memmove(address, stdout.read(size), size)
        return result


class _Function:
    def __init__(self, library: EmulatedLibrary, name: str) -> None:
        self._library, self._name = library, name
        self.argtypes: list[Any] = []
        self.restype: Any = None

    def __call__(self, *arguments: Any) -> int:
        kinds = self.argtypes or [None] * len(arguments)
        return self._library.call(self._name, list(zip(arguments, kinds, strict=True)))


def _pack(kind: str, values: Iterable[Any]) -> bytes:
    values = list(values)
    return struct.pack(f"<Q{len(values)}{kind}", len(values), *values)
