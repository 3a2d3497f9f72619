"""Whether a model computes through the paged cache what its module computes by itself."""

from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from engine.checkpoint import CheckpointError
from engine.models.transformers.config import TransformersShape
from engine.models.transformers.model import TransformersModel
from kernels import Ops
from kernels.types import Decodes, PagedKV, StepRows

# Two requests share steps: whole, in chunks, and token by token.
_LENGTHS = (7, 19)
# (tokens of the first, tokens of the second) in each step; single tokens come first.
_STEPS = ((5, 9), (1, 9), (1, 1))
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
    """Raises CheckpointError if, in chunks and in a batch, it says something else."""
    found = _paged_logits(model, shape, num_ranks, ops, device, dtype)
    errors = []
    for ours, theirs, begun in zip(found, expected, _STEPS[0], strict=True):
        difference = (ours - theirs)[begun:].norm(dim=-1)
        size = (theirs - theirs.mean(-1, keepdim=True))[begun:].norm(dim=-1)
        errors.append(difference / size.clamp(min=1e-6))
    error = float(torch.cat(errors).median())
    if not error <= max(_TOLERANCE[dtype], _TOLERANCE_QUANTIZED[quantization]):
        raise CheckpointError(
            f"model_type {shape.hf.model_type}: over a paged cache its logits are {error:.2g} away "
            "from those of transformers, so it is not served: something but attention looks at "
            "several tokens, or attention does what is not supported"
        )


def _paged_logits(
    model: TransformersModel,
    shape: TransformersShape,
    num_ranks: int,
    ops: Ops,
    device: torch.device,
    dtype: torch.dtype,
) -> list[Tensor]:
    specs = [
        PagedKV(_BLOCK_SIZE, c.num_kv_heads, c.head_dim, dtype) for c in shape.caches(num_ranks)
    ]
    caches = [ops.attention.new_cache(_NUM_BLOCKS, spec, device) for spec in specs]
    groups = [specs[layers[0]] for layers in shape.cache_groups(num_ranks)]
    tokens = torch.zeros(2, max(_LENGTHS), dtype=torch.int64)
    for row, ids in enumerate(_sequences(shape.vocab_size)):
        tokens[row, : len(ids)] = ids
    tables = torch.tensor([[[3, 1], [0, 2]]] * len(groups), dtype=torch.int32, device=device)
    found: list[list[Tensor]] = [[], []]
    starts = torch.zeros(2, dtype=torch.int32)
    for first, second in _STEPS:
        lengths = torch.tensor([first, second], dtype=torch.int32)
        rows = StepRows(
            torch.arange(2, dtype=torch.int32, device=device),
            starts.to(device),
            torch.tensor([0, first, first + second], dtype=torch.int32, device=device),
            num_tokens=first + second,
            decodes=Decodes.of([first, second]),
            max_query_len=max(first, second),
        )
        step = ops.prepare_step(rows, tokens.to(device), tables, _BLOCK_SIZE)
        planned = tuple(
            ops.attention.plan(own, spec) for own, spec in zip(step.attention, groups, strict=True)
        )
        hidden = model(replace(step, attention=planned), caches)
        logits = model.logits(hidden).float().cpu()
        for row, part in enumerate(logits.split([first, second])):
            found[row].append(part)
        starts = starts + lengths
    return [torch.cat(parts) for parts in found]
