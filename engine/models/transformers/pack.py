"""The linear maps and norms of a module, brought into the layout and the kernels of the device."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kernels import Ops
from kernels.quantization import Quantization
from kernels.types import Linear

# Linear maps of one input, by the names that modules have for them.
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# Ops of gated MLPs, and what they do to the gate.
_GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu_and_mul": F.silu,
    "gelu_and_mul": partial(F.gelu, approximate="tanh"),
}


def pack(
    model: PreTrainedModel,
    kept: frozenset[str],
    ops: Ops,
    quantization: Quantization | None,
    device: torch.device,
) -> None:
    """One module after the other, so that hardly any weight is there twice; the rest only moves.

    Args:
        kept: paths of linear maps that stay as they are.
        quantization: of linear maps; the head takes 8 bits where they take fewer.
    """
    head = model.get_output_embeddings()

    def is_packable(module: Any, path: str) -> bool:
        return (
            path not in kept
            and type(module) in (nn.Linear, Conv1D)
            and "weight" in module._parameters
        )

    for path, module in list(model.named_modules()):
        gate = _gate_of(module)
        for names in _SIBLINGS:
            maps: list[Any] = [getattr(module, name, None) for name in names]
            if all(is_packable(m, f"{path}.{n}") for m, n in zip(maps, names, strict=True)):
                sizes = [len(m.weight) for m in maps]
                fused = _Fused(_packed(maps, ops, quantization, device), sizes)
                for i, own in enumerate(maps):
                    own.forward = fused.part(i)
                if gate is not None:
                    module.forward = _GatedMlp(fused.linear, getattr(ops, gate), module.down_proj)
        if is_packable(module, path):
            bits: Quantization | None = "w8a8" if module is head and quantization else quantization
            module.forward = _packed([module], ops, bits, device)
        _take_norm(module, ops, device)
    model.to(device)


def _packed(
    maps: Sequence[Any], ops: Ops, quantization: Quantization | None, device: torch.device
) -> "_Packed":
    """Maps of one input as one. They have no weights any more."""
    weights = [m.weight.data.to(device) for m in maps]
    weights = [w.T if isinstance(m, Conv1D) else w for m, w in zip(maps, weights, strict=True)]
    bias = None
    if any(m.bias is not None for m in maps):
        biases = [
            w.new_zeros(len(w)) if m.bias is None else m.bias.data.to(device)
            for m, w in zip(maps, weights, strict=True)
        ]
        bias = torch.cat(biases)
    weight = torch.cat(weights) if len(weights) > 1 else weights[0]
    del weights
    for own in maps:
        del own.weight, own.bias
        own.weight = weight.new_empty(0)  # some ask for its type
    return _Packed(ops.pack_linear(weight, bias, quantization), len(weight), weight.dtype)


class _Packed:
    """The forward function of a linear map [..., in] -> [..., out]."""

    def __init__(self, linear: Linear, outputs: int, dtype: torch.dtype) -> None:
        self._linear = linear
        self._outputs = outputs
        self._dtype = dtype

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype != self._dtype:
            raise TypeError(f"a linear map of {self._dtype} is given {x.dtype}")
        shape = (*x.shape[:-1], self._outputs)
        if x.numel() == 0:
            return x.new_empty(shape)
        return self._linear(x.reshape(-1, x.shape[-1])).view(shape)


class _Fused:
    """Maps of one input: the first that is called computes them all, for the others to take."""

    def __init__(self, linear: _Packed, sizes: list[int]) -> None:
        self.linear = linear
        self._sizes = sizes
        self._input: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}

    def part(self, index: int) -> Callable[[Tensor], Tensor]:
        def take(x: Tensor) -> Tensor:
            if self._input is not x or index not in self._outputs:
                self._input = x
                self._outputs = dict(enumerate(self.linear(x).split(self._sizes, -1)))
            output = self._outputs.pop(index)
            if not self._outputs:
                self._input = None
            return output

        return take


def _gate_of(module: Any) -> str | None:
    """Our op for its gate, if it computes down(act(gate(x)) * up(x)): it proves it."""
    names = {name for name, _ in module.named_children()} - {"act_fn"}
    if names != {"gate_proj", "up_proj", "down_proj"} or not hasattr(module, "act_fn"):
        return None
    parts = [module.gate_proj, module.up_proj, module.down_proj]
    if not all(type(part) is nn.Linear for part in parts) or list(module.parameters(recurse=False)):
        return None
    gate, up, down = parts
    x, some = _sample(gate.weight, gate.in_features), torch.linspace(-6, 6, 200)
    try:
        for name, act in _GATES.items():
            product = act(gate(x)) * up(x)
            if torch.allclose(module.act_fn(some), act(some), atol=1e-5) and torch.allclose(
                module(x), down(product), rtol=1e-2, atol=1e-4
            ):
                return name
    except (AttributeError, TypeError, RuntimeError):  # it takes more than its input
        pass
    return None


class _GatedMlp:
    def __init__(
        self, gate_up: _Packed, act_and_mul: Callable[[Tensor], Tensor], down: nn.Module
    ) -> None:
        self._gate_up = gate_up
        self._act_and_mul = act_and_mul
        self._down = down

    def __call__(self, x: Tensor) -> Tensor:
        gate_up = self._gate_up(x)
        product = self._act_and_mul(gate_up.view(-1, gate_up.shape[-1]))
        output: Tensor = self._down(product.view(*x.shape[:-1], -1))
        return output


def _take_norm(module: Any, ops: Ops, device: torch.device) -> None:
    """Let our RMS norm compute a module that proves to be one."""
    weight = module._parameters.get("weight")
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if len(module._parameters) != 1 or weight is None or weight.dim() != 1 or eps is None:
        return
    module.to(device)
    x, theirs = _sample(module.weight, len(weight)), module.forward
    try:
        expected = theirs(x)
    except (AttributeError, TypeError, RuntimeError):  # it takes more than its input
        return
    for scale in (module.weight.data, module.weight.data + 1):
        if torch.allclose(ops.rms_norm(x, scale, eps), expected, rtol=1e-2, atol=1e-4):
            module.forward = _RmsNorm(ops, scale, eps, theirs)
            return


class _RmsNorm:
    def __init__(self, ops: Ops, scale: Tensor, eps: float, otherwise: Callable[..., Any]) -> None:
        self._ops = ops
        self._scale = scale
        self._eps = eps
        self._otherwise = otherwise

    def __call__(self, x: Tensor, *more: Any, **named: Any) -> Any:
        if more or named or x.dtype != self._scale.dtype:
            return self._otherwise(x, *more, **named)
        return self._ops.rms_norm(x, self._scale, self._eps)


def _sample(like: Tensor, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, size, generator=generator) + 1  # else a mean would not be noticed
    return values.to(like)
