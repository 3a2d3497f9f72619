"""Tensors of a checkpoint's safetensors files, by the names that the model has for them."""

import json
import math
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.checkpoint.files import CheckpointError, read_json
from engine.models.blocks.linear import Source
from engine.models.weights.stored import StoredFormat, stored_format
from kernels.grouped import StoredWeight

_ROWS = 4096
_PREFIX, _EMBEDDING = "model.", "embed_tokens.weight"


class TensorReader(Protocol):
    """Tensors of a checkpoint by the names that our blocks have for them, until it is left."""

    num_values: int  # of all tensors
    narrow: set[str]  # those of fewer than 16 bits a value

    @property
    def names(self) -> set[str]: ...

    def check(self, source: Source) -> None:
        """Raises CheckpointError when the tensor is missing or misshapen. Nothing is read."""

    def read(self, source: Source) -> Tensor:
        """The slice, from disk; raises CheckpointError when there is no such tensor."""

    def stored(self, source: Source) -> StoredWeight | None:
        """The slice with the bits that it has on disk; None where no kernel multiplies those."""

    def values(self, name: str) -> Tensor:
        """The whole tensor."""

    def equal(self, name: str, other: str) -> bool:
        """Whether two tensors are the same."""

    def __enter__(self) -> "TensorReader": ...

    def __exit__(self, *_: Any) -> None: ...


def open_tensors(directory: Path) -> TensorReader:
    if files := sorted(directory.glob("*.gguf")):
        from engine.models.gguf.reader import GgufReader  # few checkpoints need its library

        return GgufReader(files)
    tensors = SafetensorsReader(directory)
    format = stored_format(read_json(directory, "config.json").get("quantization_config") or {})
    return tensors if format is None else DequantizedReader(tensors, format)


class SafetensorsReader:
    """Slices of a checkpoint's tensors.

    They are in model.safetensors, as for transformers; else each is in the file that the index
    says; else in any *.safetensors. Where a model was saved without its head, its tensors' names
    begin with no "model.": here they do.
    """

    def __init__(self, directory: Path) -> None:
        self.narrow: set[str] = set()
        paths, file_names = _files(directory)
        self._files = []
        self._stored = {}  # (file, name in it) by name
        for path in paths:
            try:
                file = safe_open(path, framework="pt").__enter__()
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}") from error
            self._files.append(file)
            for name in set(file.keys()):
                if file_names is None or path == directory / file_names.get(name, ""):
                    self._stored[name] = (file, name)
        if _EMBEDDING in self._stored:
            self._stored = {_PREFIX + name: stored for name, stored in self._stored.items()}
        shapes = (self._slice(name).get_shape() for name in self._stored)
        self.num_values = sum(math.prod(shape) for shape in shapes)

    @property
    def names(self) -> set[str]:
        return set(self._stored)

    def _slice(self, name: str):  # type: ignore[no-untyped-def]  # safetensors has no types
        file, stored = self._stored[name]
        return file.get_slice(stored)

    def check(self, source: Source) -> None:
        if source.name not in self._stored:
            raise CheckpointError(f"the checkpoint has no tensor {source.name!r}")
        shape = tuple(self._slice(source.name).get_shape())
        if shape != source.shape:
            raise CheckpointError(
                f"the checkpoint's {source.name} has shape {shape}, its config says {source.shape}"
            )

    def read(self, source: Source) -> Tensor:
        self.check(source)
        cut = slice(source.start, source.end)
        tensor = self._slice(source.name)
        values: Tensor = tensor[cut] if source.dim == 0 else tensor[:, cut]
        wanted = source.dtype
        if wanted != values.dtype if wanted is not None else not values.is_floating_point():
            raise CheckpointError(
                f"the checkpoint's {source.name} is {values.dtype}, not "
                f"{wanted or 'of a floating-point type'}"
            )
        if values.is_floating_point() and not values.sum(dtype=torch.float32).isfinite():
            raise CheckpointError(f"the checkpoint's {source.name} has values that are no numbers")
        return values

    def stored(self, source: Source) -> StoredWeight | None:
        return None

    def values(self, name: str) -> Tensor:
        whole: Tensor = self._slice(name)[...]
        return whole

    def equal(self, name: str, other: str) -> bool:
        """Compares a few rows at a time."""
        left, right = self._slice(name), self._slice(other)
        num_rows = left.get_shape()[0]
        return left.get_shape() == right.get_shape() and all(
            torch.equal(left[i : i + _ROWS], right[i : i + _ROWS])
            for i in range(0, num_rows, _ROWS)
        )

    def __enter__(self) -> "SafetensorsReader":
        return self

    def __exit__(self, *_: Any) -> None:
        for file in self._files:
            file.__exit__(None, None, None)


# What formats of fewer bits call the tensors that make up a linear map's weight.
_MAIN = ("qweight", "weight_packed", "weight")
_BESIDE = frozenset(
    (
        *("qzeros", "scales", "g_idx", "weight_scale", "weight_scale_inv", "weight_zero_point"),
        *("weight_shape", "weight_g_idx", "weight_global_scale"),
        *("SCB", "weight_format", "weight.absmax", "weight.quant_map"),
        *("weight.nested_absmax", "weight.nested_quant_map"),
        *("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4"),
    )
)
# Of activations, which are computed as they are.
_OF_ACTIVATIONS = (
    "input_scale",
    "input_zero_point",
    "input_global_scale",
    "activation_scale",
    ".k_scale",
    ".v_scale",
)


class DequantizedReader:
    """Implements `TensorReader` over files with weights of fewer bits, which it gives as floats."""

    def __init__(self, stored: SafetensorsReader, format: StoredFormat) -> None:
        self._stored = stored
        self._format = format
        self._parts: dict[str, dict[str, str]] = {}  # names by what follows the map's, by map
        for name in stored.names:
            for what in (what for what in _BESIDE if name.endswith(f".{what}")):
                self._parts.setdefault(name.removesuffix(f".{what}"), {})[what] = name
        for linear, parts in self._parts.items():
            parts |= {w: f"{linear}.{w}" for w in _MAIN if f"{linear}.{w}" in stored.names}
        self.num_values = stored.num_values
        self.narrow = {f"{linear}.weight" for linear in self._parts}

    @property
    def names(self) -> set[str]:
        parts = {name for parts in self._parts.values() for name in parts.values()}
        plain = {n for n in self._stored.names - parts if not n.endswith(_OF_ACTIVATIONS)}
        return plain | self.narrow

    def check(self, source: Source) -> None:
        if source.name.removesuffix(".weight") not in self._parts:
            self._stored.check(source)

    def read(self, source: Source) -> Tensor:
        if source.name.removesuffix(".weight") not in self._parts:
            return self._stored.read(source)
        values = self.values(source.name)
        if values.shape != source.shape:
            raise CheckpointError(
                f"the checkpoint's {source.name} has shape {tuple(values.shape)}, its config says "
                f"{source.shape}"
            )
        return values.narrow(source.dim, source.start, source.end - source.start)

    def values(self, name: str) -> Tensor:
        parts = self._parts.get(name.removesuffix(".weight"))
        if parts is None:
            return self._stored.values(name)
        return self._format.values(self._read(parts))

    def stored(self, source: Source) -> StoredWeight | None:
        parts = self._parts.get(source.name.removesuffix(".weight"))
        whole = None if parts is None else self._format.grouped(self._read(parts))
        if whole is None or whole.shape != source.shape:
            return None
        return whole.narrow(source.dim, source.start, source.end)

    def _read(self, parts: dict[str, str]) -> dict[str, Tensor]:
        return {what: self._stored.values(name) for what, name in parts.items()}

    def equal(self, name: str, other: str) -> bool:
        return torch.equal(self.values(name), self.values(other))

    def __enter__(self) -> "DequantizedReader":
        return self

    def __exit__(self, *_: Any) -> None:
        self._stored.__exit__()


def _files(directory: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The files, and which one each tensor is in, where that is said."""
    index, whole = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if whole.exists():
        return [whole], None
    if index.exists():
        try:
            file_names = dict(json.loads(index.read_text())["weight_map"])
            paths = [directory / name for name in sorted(set(file_names.values()))]
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} cannot be read: {error!r}") from error
        if strange := [name for name in file_names.values() if Path(name).name != name]:
            raise CheckpointError(f"{index} names a file that is not beside it: {strange[0]!r}")
    else:
        file_names, paths = None, sorted(directory.glob("*.safetensors"))
    if not paths:
        raise CheckpointError(
            f"{directory} has no *.safetensors files; other formats are not read. Convert with "
            "transformers: AutoModelForCausalLM.from_pretrained(…).save_pretrained(…)"
        )
    return paths, file_names
