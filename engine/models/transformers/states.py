"""States that layers keep of a text beside a paged cache: of convolutions, of linear attention.

transformers' modules ask a cache for them and go on from there, with one token or with several. A
step's texts are such a module's batch, or calls of its own, each with the states of its row. Some
take several tokens for a text's beginning: the check at load finds out, and they get the others one
by one.
"""

import inspect
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from kernels.types import StepInputs


class _Key(NamedTuple):
    layer: int
    kind: str
    number: int  # of several that a layer keeps


class _Part(NamedTuple):
    """Texts of a step that a module is given together: of one token each, or one of several."""

    tokens: slice
    rows: Tensor  # [B] int64
    is_new: Tensor  # [B] bool: of texts that begin here

    def batch(self, x: Tensor) -> Tensor:
        """[B, tokens of each, hidden] of all tokens' x [1, T, hidden]."""
        own = x[0, self.tokens]
        return own.unflatten(0, (len(self.rows), -1))


class States:
    """Those of all rows of one model, on its device.

    Args:
        mixers: paths of the modules that keep them.
    """

    def __init__(self, module: PreTrainedModel, mixers: frozenset[str], num_rows: int) -> None:
        self._num_rows = num_rows
        self._kept: dict[_Key, Tensor] = {}  # [rows, ...], from the first step on
        self._parts: list[_Part] = []
        self.go_on = True  # with several tokens at once; else one by one but for new texts
        for path in mixers:
            mixer = module.get_submodule(path)
            mixer.forward = self._in_parts(mixer.forward)

    def begin(self, step: StepInputs) -> None:
        """Let modules compute these tokens from now on."""
        rows, is_new = step.rows.rows.long(), step.rows.starts == 0
        alone = step.rows.decodes.rows
        self._parts = [_Part(slice(0, alone), rows[:alone], is_new[:alone])] if alone else []
        if alone < len(rows):
            begins, new = step.rows.query_starts.tolist(), is_new.tolist()
            for i in range(alone, len(rows)):
                cuts = range(begins[i], begins[i + 1] + 1)
                together = self.go_on or new[i]
                self._parts += [
                    _Part(slice(begin, end), rows[i : i + 1], is_new[i : i + 1])
                    for begin, end in pairwise((cuts[0], cuts[-1]) if together else cuts)
                ]

    def _in_parts(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(forward)

        def run(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs)
            first = next(iter(given.arguments))
            x, outputs, rest = given.arguments[first], [], ()
            for part in self._parts:
                states = _StatesOf(self._kept, part)
                given.arguments |= {first: part.batch(x), "cache": states, "attention_mask": None}
                output = forward(*given.args, **given.kwargs)
                states.put_back(self._num_rows)
                if isinstance(output, tuple):
                    output, *rest = output  # type: ignore[assignment]
                outputs.append(output.flatten(0, 1))
            mixed = torch.cat(outputs).unsqueeze(0)
            return (mixed, *rest) if rest else mixed

        return run


class _StatesOf:
    """What a part's texts have kept, as modules ask a cache for it."""

    def __init__(self, kept: dict[_Key, Tensor], part: _Part) -> None:
        self._kept = kept
        self._part = part
        self._taken: dict[_Key, Tensor] = {}

    def _take(self, key: _Key) -> Tensor | None:
        """[B, ...], for modules to write to; nothing but zeros of new texts."""
        if key not in self._taken and key in self._kept:
            state = self._kept[key].index_select(0, self._part.rows)
            is_new = self._part.is_new.view(-1, *[1] * (state.dim() - 1))
            self._taken[key] = state.masked_fill_(is_new, 0)
        return self._taken.get(key)

    def put_back(self, num_rows: int) -> None:
        for key, state in self._taken.items():
            if key not in self._kept:
                self._kept[key] = state.new_empty(num_rows, *state.shape[1:])
            self._kept[key].index_copy_(0, self._part.rows, state)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self._take(_Key(layer_idx, "conv", state_idx))

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self._take(_Key(layer_idx, "recurrent", state_idx))

    def update_conv_state(
        self,
        conv_states: Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **_: Any,
    ) -> Tensor:
        """The inputs kept and the new ones [B, channels, kept + T]; the last are kept."""
        key = _Key(layer_idx, "conv", state_idx)
        before = self._take(key)
        if before is None:
            size = conv_kernel_size or conv_states.shape[-1]
            before = conv_states.new_zeros(*conv_states.shape[:-1], size)
        seen = torch.cat((before, conv_states), -1)
        self._taken[key] = seen[..., -before.shape[-1] :]
        return seen

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any
    ) -> Tensor:
        self._taken[_Key(layer_idx, "recurrent", state_idx)] = recurrent_states
        return recurrent_states

    def has_previous_state(self, layer_idx: int = 0, state_idx: int | None = None) -> bool:
        return any(key.layer == layer_idx for key in self._kept)

    def is_recording_past(self, layer_idx: int) -> bool:
        return False


class StatesSpy(Cache):  # type: ignore[misc]
    """Keeps nothing, and notes which modules would have it keep states."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.modules: list[nn.Module] = []
        self.num_bytes = 0  # that a text's states take

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"it keeps states in a way of its own ({name})")

    def _note(self, state: Tensor | None = None, size: int | None = None) -> None:
        caller = sys._getframe(2).f_locals.get("self")
        if isinstance(caller, nn.Module) and caller not in self.modules:
            self.modules.append(caller)
        if state is not None:
            length = state.shape[-1]
            self.num_bytes += state.numel() // length * (size or length) * state.itemsize

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        return key_states, value_states

    def get_conv_state(self, *_: Any, **__: Any) -> None:
        self._note()

    def get_recurrent_state(self, *_: Any, **__: Any) -> None:
        self._note()

    def update_conv_state(
        self, conv_states: Tensor, *_: Any, conv_kernel_size: int | None = None, **__: Any
    ) -> Tensor:
        self._note(conv_states, conv_kernel_size)
        return conv_states

    def update_recurrent_state(self, recurrent_states: Tensor, *_: Any, **__: Any) -> Tensor:
        self._note(recurrent_states)
        return recurrent_states

    def is_recording_past(self, *_: Any) -> bool:
        return False
