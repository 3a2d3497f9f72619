"""What a module of transformers does, found by running it without weights ("meta" tensors)."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from engine.checkpoint import CheckpointError
from engine.models.shape import LayerCache
from engine.models.transformers.interface import NAME, MaskFunction, attention_by
from engine.models.transformers.parallel import shard
from engine.ranks.rank_group import RankGroup

# Tokens of the probe, and distances at which masks are looked at.
_TOKENS, _FAR = 4, 1 << 20
# What may be said to an attention function without changing what it is to compute.
_HARMLESS = frozenset(
    (
        *("dropout", "training", "is_causal", "position_ids", "position_embeddings"),
        *("use_cache", "cache", "past_key_values", "cache_position", "return_dict"),
        *("output_attentions", "output_hidden_states", "output_router_logits", "sliding_window"),
        *("num_items_in_batch", "logits_to_keep", "layer_type", "layer_idx", "token_type_ids"),
    )
)


@dataclass(frozen=True)
class Probed:
    caches: tuple[LayerCache, ...]  # one for each time that the model attends
    vocab_size: int
    has_sinks: bool
    read_weights: frozenset[str]  # paths of linear maps whose weights others read as well


class UnservedError(CheckpointError):
    """The module does what a paged cache and packed tokens do not allow."""


def probe(hf: PreTrainedConfig, num_ranks: int = 1) -> Probed:
    """Run the model on nothing, as one of so many ranks. Raises UnservedError with the reason."""
    model = empty_model(hf)
    shard(model, RankGroup(0, num_ranks), is_probe=True)
    watched = _watch_linears(model)
    records = _Records()
    tokens = torch.zeros(1, _TOKENS, dtype=torch.int64, device="meta")
    base = model.base_model
    try:
        with torch.inference_mode(), attention_by(records):
            output = base(
                input_ids=tokens,
                position_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                use_cache=False,
            )
            head = model.get_output_embeddings()(output.last_hidden_state)
    except CheckpointError:
        raise
    except Exception as error:  # of whatever kind the module's are
        reason = " ".join(str(error).split())[:300]
        raise UnservedError(
            f"{type(model).__name__} cannot be run on packed tokens: {reason}"
        ) from error
    if not records.caches:
        raise UnservedError(
            f"the attention of {type(model).__name__} does not go through transformers' interface"
        )
    read = frozenset(path for path, module in watched.items() if module.was_read)
    return Probed(tuple(records.caches), head.shape[-1], records.has_sinks, read)


def empty_model(hf: PreTrainedConfig) -> PreTrainedModel:
    """The model without memory. Raises UnservedError when it cannot be one that we serve."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                hf, attn_implementation=NAME, experts_implementation="batched_mm"
            )
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UnservedError(
            f"transformers cannot build model_type {hf.model_type}: {reason}"
        ) from error
    name = type(model).__name__
    if model._is_stateful:
        raise UnservedError(f"{name} keeps states that are no keys and values")
    kinds = set(getattr(hf.get_text_config(), "layer_types", None) or ())
    if others := kinds - {"full_attention", "sliding_attention", "chunked_attention"}:
        raise UnservedError(f"{name} has layers of kinds that are not served: {sorted(others)}")
    if model.base_model is model or model.get_output_embeddings() is None:
        raise UnservedError(f"{name} has no decoder and head that can be told apart")
    return model.eval()


class _Records:
    """Notes what each call of attention needs. Implements `Attends`."""

    def __init__(self) -> None:
        self.caches: list[LayerCache] = []
        self.has_sinks = False
        self._windows: dict[int, int | None] = {}  # by the mask's id
        self._masks: list[Tensor] = []  # kept, so that ids stay theirs

    def attend(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        **options: Any,
    ) -> Tensor:
        name = type(module).__name__
        self.has_sinks |= options.pop("s_aux", None) is not None
        for given in ("scaling", "softcap"):
            options.pop(given, None)
        unknown = {key for key, value in options.items() if value is not None} - _HARMLESS
        if unknown or options.get("is_causal") is False:
            raise UnservedError(
                f"{name} attends in a way of its own: {sorted(unknown) or 'not causal'}"
            )
        if mask is not None and id(mask) not in self._windows:
            raise UnservedError(f"{name} changes its mask")
        if q.shape[0] != 1 or not q.shape[2] == k.shape[2] == v.shape[2] == _TOKENS:
            raise UnservedError(f"{name} attends to other than the sequence's tokens")
        if k.shape[1] != v.shape[1] or q.shape[1] % k.shape[1]:
            raise UnservedError(f"{name} has {q.shape[1]}, {k.shape[1]} and {v.shape[1]} heads")
        window = self._windows[id(mask)] if mask is not None else options.get("sliding_window")
        head_dim = max(q.shape[-1], v.shape[-1])
        self.caches.append(LayerCache(k.shape[1], head_dim, window))
        return q.new_empty(1, _TOKENS, q.shape[1], v.shape[-1])

    def mask(self, function: MaskFunction, device: torch.device) -> Tensor:
        mask = torch.empty(1, 1, _TOKENS, _TOKENS, dtype=torch.bool, device=device)
        self._masks.append(mask)
        self._windows[id(mask)] = _window(function)
        return mask


def _window(function: MaskFunction) -> int | None:
    """How far back tokens see; None: all. Raises UnservedError for other shapes."""
    zero = torch.zeros((), dtype=torch.int64)
    distance = torch.arange(-8, _FAR)
    widths = set()
    for query in (2 * _FAR, 2 * _FAR + 12345):
        position = torch.tensor(query)
        visible = torch.as_tensor(function(zero, zero, position, position - distance))
        visible = visible.expand(distance.shape)
        width = int(visible.sum())
        if width == 0 or visible[:8].any() or not visible[8 : 8 + width].all():
            raise UnservedError("its mask is neither causal nor a sliding window")
        widths.add(width)
    if len(widths) > 1:
        raise UnservedError("its mask is in chunks")
    return None if width == _FAR else width


class _WatchedLinear(nn.Linear):
    was_read = False

    def __getattr__(self, name: str) -> Any:  # parameters are found here
        if name == "weight":
            self.was_read = True
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self._parameters["weight"], self._parameters["bias"])  # type: ignore[arg-type]


def _watch_linears(model: nn.Module) -> dict[str, _WatchedLinear]:
    watched: dict[str, _WatchedLinear] = {}
    for path, module in model.named_modules():
        if type(module) is nn.Linear:
            module.__class__ = _WatchedLinear
            assert isinstance(module, _WatchedLinear)
            watched[path] = module
    return watched
