"""Tensor parallelism of transformers' modules, by the plans that come with them."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine.ranks.rank_group import RankGroup

# Style -> the dimension of weights that is cut, and into how many equal parts each first.
_CUTS: dict[str, tuple[int, int]] = {
    **dict.fromkeys(("colwise", "colwise_gather_output", "colwise_rep"), (-2, 1)),
    **dict.fromkeys(("rowwise", "rowwise_split_input", "rowwise_rep"), (-1, 1)),
    "packed_colwise": (-2, 2),
    "packed_rowwise": (-1, 2),
    "embedding_rowwise": (-2, 1),
}
_WHOLE = frozenset(
    (
        *("replicated_with_grad_allreduce", "replicate", "mla_kv_a_proj", "local_params"),
        *("moe_tp_experts", "moe_identity_expert", "all_reduce"),
    )
)


def shard(model: PreTrainedModel, group: RankGroup, is_probe: bool = False) -> None:
    """Leave this rank's parts of the parameters, and let modules talk to the other ranks.

    Raises ValueError when the model cannot be split over so many.
    """
    if group.size == 1:
        return
    if not any(style in _CUTS for style in model.tp_plan.values()):
        raise ValueError(
            f"tensor_parallel_size: {type(model).__name__} comes with no plan for it; leave it out"
        )
    talk = _Alone(group) if is_probe else _Talk(group)
    rules = [
        (re.compile(re.escape(pattern).replace(r"\*", r"\d+")), style)
        for pattern, style in model.tp_plan.items()
    ]

    def style_of(path: str) -> str | None:
        return next((style for pattern, style in rules if pattern.fullmatch(path)), None)

    parts: dict[tuple[int, str], nn.Parameter] = {}  # tied parameters stay tied
    for path, module in list(model.named_modules()):
        style = style_of(path)
        for name, parameter in list(module.named_parameters(recurse=False)):
            own = style_of(f"{path}.{name}") or style
            if own is not None and own not in _WHOLE:
                key = id(parameter), repr(_CUTS.get(own))
                if key not in parts:
                    parts[key] = nn.Parameter(_part(parameter, own, f"{path}.{name}", group), False)
                setattr(module, name, parts[key])
        if style is not None:
            _hook(module, style, talk)


def _part(parameter: Tensor, style: str, name: str, group: RankGroup) -> Tensor:
    """What this rank holds of a parameter."""
    if style not in _CUTS:
        raise ValueError(
            f"tensor_parallel_size: the style {style!r} of {name} is not known here; leave it out"
        )
    dim, packed = _CUTS[style]
    if parameter.dim() == 1:
        if dim == -1:  # the bias of sums over ranks: added once
            return parameter.detach() if group.rank == 0 else torch.zeros_like(parameter)
        dim = -1
    size = parameter.shape[dim]
    is_vocabulary = style in ("embedding_rowwise", "colwise_gather_output", "colwise_rep")
    if size % (packed * group.size) and not is_vocabulary:
        raise ValueError(
            f"tensor_parallel_size: the {size} of {name} cannot be split over {group.size} ranks"
        )
    start, end = group.share(size // packed)
    whole = parameter.detach().chunk(packed, dim)
    pieces = [piece.narrow(dim, start, end - start) for piece in whole]
    return pieces[0] if packed == 1 else torch.cat(pieces, dim)


class _Talk:
    def __init__(self, group: RankGroup) -> None:
        self.group = group

    def sum(self, x: Tensor) -> Tensor:
        return self.group.all_reduce(x.contiguous())

    def gather(self, x: Tensor) -> Tensor:
        """x [..., M] of every rank, side by side."""
        rows = x.reshape(-1, x.shape[-1])
        return self.group.all_gather(rows).view(*x.shape[:-1], -1)


class _Alone(_Talk):
    """Shapes as with others, who are not there."""

    def sum(self, x: Tensor) -> Tensor:
        return x

    def gather(self, x: Tensor) -> Tensor:
        return torch.cat([x] * self.group.size, -1)


def _hook(module: nn.Module, style: str, talk: _Talk) -> None:
    group = talk.group
    if style in ("rowwise", "rowwise_rep", "moe_tp_experts", "all_reduce"):
        module.register_forward_hook(lambda _, __, out: _first(out, talk.sum))
    elif style == "rowwise_split_input":
        start, end = group.share(module.in_features)  # type: ignore[arg-type]
        module.register_forward_pre_hook(lambda _, x: (x[0][..., start:end], *x[1:]))
        module.register_forward_hook(lambda _, __, out: talk.sum(out))
    elif style in ("colwise_gather_output", "colwise_rep"):
        total: int = module.out_features  # type: ignore[assignment]
        width = -(-total // group.size)

        def gather(_: nn.Module, __: Any, out: Tensor) -> Tensor:
            padded = nn.functional.pad(out, (0, width - out.shape[-1]))
            return talk.gather(padded)[..., :total]

        module.register_forward_hook(gather)
    elif style == "embedding_rowwise":
        _look_up_own_rows(module, talk)
    elif style == "moe_identity_expert":
        module.register_forward_pre_hook(lambda _, x: (x[0] / group.size, *x[1:]))


def _look_up_own_rows(embedding: nn.Module, talk: _Talk) -> None:
    look_up = embedding.forward
    start, end = talk.group.share(embedding.num_embeddings)  # type: ignore[arg-type]

    def forward(ids: Tensor) -> Tensor:
        elsewhere = (ids < start) | (ids >= end)
        embedded = look_up((ids - start).masked_fill(elsewhere, 0))
        return talk.sum(embedded.masked_fill(elsewhere.unsqueeze(-1), 0))

    embedding.forward = forward


def _first(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """An output, or the first of several, changed."""
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)
