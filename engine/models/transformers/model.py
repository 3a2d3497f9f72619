"""A module of transformers over the paged KV cache: its own layers, our attention."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine.models.transformers.distances import with_positions
from engine.models.transformers.interface import MaskFunction, attention_by
from engine.models.transformers.probe import decoder_name
from engine.models.transformers.states import States
from kernels import Ops
from kernels.types import KVCache, StepInputs


class TransformersModel:
    """Implements `LanguageModel`.

    The tokens of a step are one sequence to the module, each with its own position: everything but
    attention looks at tokens one by one.

    Args:
        windows: of each time that the model attends.
        groups: which of a step's block tables each of these times uses.
        states: of modules that keep some; None where there are none.
    """

    is_all_ops = False

    def __init__(
        self,
        module: PreTrainedModel,
        windows: Sequence[int | None],
        groups: Sequence[int],
        ops: Ops,
        dtype: torch.dtype,
        is_recordable: bool,
        states: States | None = None,
    ) -> None:
        self.is_recordable = is_recordable
        name = str(decoder_name(module))
        self._base: nn.Module = getattr(module, name)
        self._head = module
        self._hidden = _Given(self._base)
        setattr(module, name, self._hidden)  # what follows it is in `logits`
        self._windows = windows
        self._groups = groups
        self._ops = ops
        self._dtype = dtype
        self.states = states

    def __call__(self, step: StepInputs, kv_caches: list[KVCache]) -> Tensor:
        attention = _PagedAttention(self, step, kv_caches)
        ids = step.token_ids.unsqueeze(0)
        padding = torch.ones_like(ids)
        if self.states is not None:
            self.states.begin(step)
            padding = attention.no_mask  # or it is looked at
        with attention_by(attention):
            output = self._base(
                input_ids=ids,
                position_ids=step.positions.unsqueeze(0),
                attention_mask=padding,
                use_cache=False,
            )
        self._hidden.kind = type(output)
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        self._hidden.state = hidden.unsqueeze(0)
        ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
        logits: Tensor = self._head(input_ids=ids, use_cache=False).logits[0]
        return logits.to(self._dtype)


class _Given(nn.Module):
    """Stands where the decoder was, and returns the hidden states that it had."""

    kind: Any
    state: Tensor

    def __init__(self, instead_of: nn.Module) -> None:
        super().__init__()
        self._instead_of = (instead_of,)  # in a tuple, not as a part

    def __getattr__(self, name: str) -> Any:
        """Some heads ask for multipliers."""
        return getattr(self.__dict__["_instead_of"][0], name)

    @property
    def decoder(self) -> "_Given":
        """Heads of encoders' kin ask for it."""
        return self

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.kind(last_hidden_state=self.state)


class _PagedAttention:
    """The attention of one step. Implements `Attends`."""

    def __init__(self, model: TransformersModel, step: StepInputs, caches: list[KVCache]) -> None:
        self._model = model
        self._step = step
        self._caches = caches
        self._layer = 0  # layers attend in the same order in every step
        self.no_mask = torch.empty(1, 1, 1, 1, dtype=torch.bool, device=step.token_ids.device)

    def mask(self, function: MaskFunction, device: torch.device) -> Tensor:
        return self.no_mask  # block tables and windows say it

    def attend(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        slopes: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        model, layer = self._model, self._layer
        self._layer += 1
        cache, inputs = self._caches[layer], self._step.attention[model._groups[layer]]
        attention, head_dim = model._ops.attention, cache.spec.head_dim
        if not k.shape[1] == v.shape[1] == cache.spec.num_kv_heads:
            raise RuntimeError(f"{type(module).__name__} attends with other heads than before")
        scale = q.shape[-1] ** -0.5 if scaling is None else scaling
        if slopes is not None:
            q, k = with_positions(q, k, slopes / scale, self._step.positions)
        rows = [_rows(x, head_dim, model._dtype) for x in (q, k, v)]
        attention.store(rows[1], rows[2], cache, inputs.slots)
        attended = attention.attend(
            rows[0],
            cache,
            inputs,
            scale,
            model._windows[layer],
            softcap,
            *([] if s_aux is None else [s_aux]),
        )
        return attended[..., : v.shape[-1]].to(q.dtype).unsqueeze(0)


def _rows(x: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
    """[T, heads, head_dim] of x [1, heads, T, D], zeros behind its own dimensions."""
    x = x[0].transpose(0, 1)
    if x.shape[-1] < head_dim:
        x = F.pad(x, (0, head_dim - x.shape[-1]))
    return x.to(dtype)
