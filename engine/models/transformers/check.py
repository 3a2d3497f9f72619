"""Whether a model computes through the paged cache what its module computes by itself."""

from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedModel

from engine.checkpoint.files import CheckpointError
from engine.models.transformers.config import TransformersShape
from engine.models.transformers.model import TransformersModel
from kernels import Ops
from kernels.ops import Recorder
from kernels.types import Decodes, PagedKV, StepRows

# Two requests share steps: whole, in chunks, and token by token.
_LENGTHS = (8, 20)
# (tokens of the first, tokens of the second) in each step; single tokens come first.
_STEPS = ((5, 9), (1, 9), (1, 1), (1, 1))
_BLOCK_SIZE, _NUM_BLOCKS = 16, 4
# How far logits may be from the module's, as a share of their own size.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
_TOLERANCE_QUANTIZED = {None: 0.0, "w8a8": 0.3, "int4": 0.7}


def _sequences(vocab_size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocab_size, (n,), generator=generator) for n in _LENGTHS]


def expected_logits(module: PreTrainedModel, vocab_size: int) -> list[Tensor]:
    """[length, vocab] of each sequence, by the module as transformers runs it."""
    return [
        module(input_ids=ids[None], use_cache=False).logits[0].float()
        for ids in _sequences(vocab_size)
    ]


def refuse_if_wrong(
    model: TransformersModel,
    expected: list[Tensor],
    shape: TransformersShape,
    num_ranks: int,
    ops: Ops,
    device: torch.device,
    dtype: torch.dtype,
    quantization: str | None,
) -> None:
    """Raises CheckpointError if, in chunks and in a batch, it says something else.

    If its steps cannot be recorded on this CPU, the model learns it.
    """

    def new_steps() -> _Steps:
        return _Steps(model, shape, num_ranks, ops, device, dtype)

    tolerance = max(_TOLERANCE[dtype], _TOLERANCE_QUANTIZED[quantization])
    hidden = new_steps().run_all()
    error = _error(model, hidden, expected)
    if not error <= tolerance and model.states is not None:
        model.states.go_on = False
        hidden = new_steps().run_all()
        error = _error(model, hidden, expected)
    if not error <= tolerance:
        raise CheckpointError(
            f"model_type {shape.hf.model_type}: over a paged cache its logits are {error:.2g} away "
            "from those of transformers, so it is not served: something but attention looks at "
            "several tokens, or attention does what is not supported"
        )
    if model.is_recordable and device.type == "cpu" and ops.new_recorder is not None:
        replayed = new_steps().replay_last(ops.new_recorder())
        model.is_recordable = replayed is not None and torch.equal(replayed, hidden[-1])


def _error(model: TransformersModel, hidden: list[Tensor], expected: list[Tensor]) -> float:
    """How far logits are from those expected, as a share of their size: the median token's."""
    errors = []
    for row, (theirs, begun) in enumerate(zip(expected, _STEPS[0], strict=True)):
        parts = [x.split(lengths)[row] for x, lengths in zip(hidden, _STEPS, strict=True)]
        ours = model.logits(torch.cat(parts)).float().cpu()
        difference = (ours - theirs)[begun:].norm(dim=-1)
        size = (theirs - theirs.mean(-1, keepdim=True))[begun:].norm(dim=-1)
        errors.append(difference / size.clamp(min=1e-6))
    return float(torch.cat(errors).median())


class _Steps:
    """Runs the two requests over a cache of its own, from their start on."""

    def __init__(
        self,
        model: TransformersModel,
        shape: TransformersShape,
        num_ranks: int,
        ops: Ops,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        specs = [
            PagedKV(_BLOCK_SIZE, c.num_kv_heads, c.head_dim, dtype) for c in shape.caches(num_ranks)
        ]
        self._model, self._ops, self._device = model, ops, device
        self._caches = [ops.attention.new_cache(_NUM_BLOCKS, spec, device) for spec in specs]
        self._groups = [specs[layers[0]] for layers in shape.cache_groups(num_ranks)]
        tokens = torch.zeros(2, max(_LENGTHS), dtype=torch.int64)
        for row, ids in enumerate(_sequences(shape.vocab_size)):
            tokens[row, : len(ids)] = ids
        tables = [[[3, 1], [0, 2]]] * len(self._groups)
        self._tokens = tokens.to(device)
        self._tables = torch.tensor(tables, dtype=torch.int32, device=device)
        self._starts = torch.zeros(2, dtype=torch.int32, device=device)

    def run_all(self) -> list[Tensor]:
        """Hidden states of all steps."""
        return [self._run(lengths) for lengths in _STEPS]

    def _run(self, lengths: tuple[int, int]) -> Tensor:
        hidden = self._compute(self._rows(lengths))
        self._starts += torch.tensor(lengths, dtype=torch.int32, device=self._device)
        return hidden

    def replay_last(self, recorder: Recorder) -> Tensor | None:
        """Those of the last step, recorded as the one before it; None if that cannot be."""
        for lengths in _STEPS[:-2]:
            self._run(lengths)
        rows = self._rows(_STEPS[-1])
        hidden, replay = recorder.record(lambda: self._compute(rows))
        if replay is None:
            return None
        self._starts += torch.tensor(_STEPS[-1], dtype=torch.int32, device=self._device)
        replay()
        return hidden

    def _rows(self, lengths: tuple[int, int]) -> StepRows:
        return StepRows(
            torch.arange(2, dtype=torch.int32, device=self._device),
            self._starts,
            torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=self._device),
            num_tokens=sum(lengths),
            decodes=Decodes.of(lengths),
            max_query_len=max(lengths),
        )

    def _compute(self, rows: StepRows) -> Tensor:
        step = self._ops.prepare_step(rows, self._tokens, self._tables, _BLOCK_SIZE)
        plan = self._ops.attention.plan
        planned = tuple(
            plan(own, spec) for own, spec in zip(step.attention, self._groups, strict=True)
        )
        return self._model(replace(step, attention=planned), self._caches)
