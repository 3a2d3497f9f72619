"""What a module of transformers does, found by running it without weights ("meta" tensors)."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental import _config as meta
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from engine.checkpoint.files import CheckpointError
from engine.models.hf_config import longest_text
from engine.models.shape import LayerCache
from engine.models.transformers.distances import width_with_positions
from engine.models.transformers.interface import NAME, MaskFunction, attention_by
from engine.models.transformers.legacy import go_through_interface
from engine.models.transformers.parallel import shard
from engine.models.transformers.states import StatesSpy
from engine.ranks.rank_group import RankGroup

# Tokens of the probe, a number that nothing else has, and distances at which masks are looked at.
_TOKENS, _FAR = 11, 1 << 20
_NOTHING = LayerCache(1, 16)
_ALL_NONZERO = {"meta_nonzero_assume_all_nonzero": True}
_NO_INTERFACE = "the attention of {} does not go through transformers' interface"
# What may be said to an attention function without changing what it is to compute.
_HARMLESS = frozenset(
    (
        *("dropout", "training", "is_causal", "position_ids", "position_embeddings"),
        *("use_cache", "cache", "past_key_values", "cache_position", "return_dict"),
        *("output_attentions", "output_hidden_states", "output_router_logits", "sliding_window"),
        *("num_items_in_batch", "logits_to_keep", "layer_type", "layer_idx", "token_type_ids"),
        "slopes",
        "indices",  # of the keys that an indexer selects: all, as long as texts may be
    )
)
_KINDS = frozenset(
    ("full_attention", "sliding_attention", "chunked_attention", "indexed_attention")
)


@dataclass(frozen=True)
class Probed:
    caches: tuple[LayerCache, ...]  # one for each time that the model attends
    vocab_size: int
    has_sinks: bool
    has_slopes: bool  # by which scores fall with distance
    read_weights: frozenset[str]  # paths of linear maps whose weights others read as well
    mixers: frozenset[str]  # paths of modules that keep states
    state_bytes: int  # of a text


class UnservedError(CheckpointError):
    """The module does what a paged cache and packed tokens do not allow."""


def probe(hf: PreTrainedConfig, num_ranks: int = 1) -> Probed:
    """Run the model on nothing, as one of so many ranks. Raises UnservedError with the reason."""
    model = empty_model(hf)
    shard(model, RankGroup(0, num_ranks), is_probe=True)
    watched = _watch_linears(model)
    try:
        records, spy, logits = _run(model, "meta")
    except CheckpointError:
        raise
    except Exception:  # of whatever kind; some must have values, if only to loop over experts
        _fill_with_zeros(model)
        try:
            records, spy, logits = _run(model, "cpu")
        except CheckpointError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise UnservedError(
                f"{type(model).__name__} cannot be run on packed tokens: {reason}"
            ) from error
    mixers = _mixers(model, spy.modules, records.modules)
    if not records.caches and not mixers:
        raise UnservedError(_NO_INTERFACE.format(type(model).__name__))
    # Blocks of something there must be, for tokens to be counted in.
    caches = tuple(records.caches) or (_NOTHING,)
    read = frozenset(path for path, module in watched.items() if module.was_read)
    return Probed(
        caches,
        logits.shape[-1],
        records.has_sinks,
        records.has_slopes,
        read,
        mixers,
        spy.num_bytes,
    )


def _other_kinds(model: PreTrainedModel) -> set[str]:
    """Of layers, that are not known to attend."""
    return set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - _KINDS


def _mixers(
    model: PreTrainedModel, keep: list[nn.Module], attend: list[nn.Module]
) -> frozenset[str]:
    """Paths of modules that keep states, without those within others."""
    name = type(model).__name__
    others = _other_kinds(model)
    if others and not keep:
        raise UnservedError(f"{name} has layers of kinds that are not served: {sorted(others)}")
    if model._is_stateful and not keep:
        raise UnservedError(f"{name} keeps states in a way of its own")
    outermost = [
        one for one in keep if not any(one is not o and one in set(o.modules()) for o in keep)
    ]
    for one in outermost:
        if not {"cache", "attention_mask"} <= set(inspect.signature(one.forward).parameters):
            raise UnservedError(f"{type(one).__name__} keeps states in a way of its own")
        if set(attend) & set(one.modules()):
            raise UnservedError(f"{type(one).__name__} attends and keeps states at once")
    return frozenset(path for path, module in model.named_modules() if module in outermost)


def _run(model: PreTrainedModel, device: str) -> "tuple[_Records, StatesSpy, Tensor]":
    records, spy, counting = _Records(model.config), StatesSpy(), _CountsTokens()
    cache = {"cache": spy} if model._is_stateful or _other_kinds(model) else {}
    tokens = torch.zeros(1, _TOKENS, dtype=torch.int64, device=device)
    # Experts are looked up by what is not zero, of which without values all is.
    nonzero = meta.patch(_ALL_NONZERO)  # type: ignore[attr-defined]
    with torch.inference_mode(), attention_by(records), nonzero, counting:
        output = getattr(model, str(decoder_name(model)))(
            input_ids=tokens,
            position_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            use_cache=False,
            **cache,
        )
        logits = model.get_output_embeddings()(output.last_hidden_state)
    if counting.seen and records.caches:
        raise UnservedError(f"{type(model).__name__} counts the positions of tokens by itself")
    return records, spy, logits


def _fill_with_zeros(model: nn.Module) -> None:
    """Values for all parameters, in hardly any memory."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            module._parameters[name] = nn.Parameter(zeros, requires_grad=False)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)


def model_class(hf: PreTrainedConfig) -> type[PreTrainedModel]:
    """Raises UnservedError when it cannot be one that we serve."""
    if type(hf) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnservedError(f"model_type {hf.model_type} generates no text")
    found: type[PreTrainedModel] = MODEL_FOR_CAUSAL_LM_MAPPING[type(hf)]
    return found


def empty_model(hf: PreTrainedConfig) -> PreTrainedModel:
    """The model without memory. Raises UnservedError as `model_class`."""
    name = model_class(hf).__name__
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                hf, attn_implementation="eager", experts_implementation="batched_mm"
            )
        let_us_attend(model)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UnservedError(f"transformers cannot build {name}: {reason}") from error
    if decoder_name(model) is None or model.get_output_embeddings() is None:
        raise UnservedError(f"{name} has no decoder and head that can be told apart")
    return model.eval()


def decoder_name(model: PreTrainedModel) -> str | None:
    """The attribute that is the decoder, for few of another name than they say."""
    names = (model.base_model_prefix, "model")
    return next((n for n in names if isinstance(getattr(model, n, None), nn.Module)), None)


def let_us_attend(model: PreTrainedModel) -> None:
    """Send the model's attention through our interface, where it can be."""
    model.set_attn_implementation(NAME)
    go_through_interface(model)
    for module in model.modules():
        if type(module).__name__.endswith("Indexer"):  # it would select all keys, at a cost
            module.forward = _select_all


def _select_all(*_: Any, **__: Any) -> Tensor:
    return torch.empty(0, dtype=torch.int32)  # that nobody looks at


class _Records:
    """Notes what each call of attention needs. Implements `Attends`."""

    def __init__(self, hf: PreTrainedConfig) -> None:
        self._hf = hf
        self.caches: list[LayerCache] = []
        self.modules: list[nn.Module] = []
        self.has_sinks = self.has_slopes = False
        self._masks: dict[int, tuple[Tensor, MaskFunction]] = {}  # by the mask's id

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
        self.modules.append(module)
        self.has_sinks |= options.pop("s_aux", None) is not None
        for given in ("scaling", "softcap"):
            options.pop(given, None)
        unknown = {key for key, value in options.items() if value is not None} - _HARMLESS
        if unknown or options.get("is_causal") is False:
            raise UnservedError(
                f"{name} attends in a way of its own: {sorted(unknown) or 'not causal'}"
            )
        if mask is not None and id(mask) not in self._masks:
            raise UnservedError(f"{name} changes its mask")
        if q.shape[0] != 1 or not q.shape[2] == k.shape[2] == v.shape[2] == _TOKENS:
            raise UnservedError(f"{name} attends to other than the sequence's tokens")
        if k.shape[1] != v.shape[1] or q.shape[1] % k.shape[1]:
            raise UnservedError(f"{name} has {q.shape[1]}, {k.shape[1]} and {v.shape[1]} heads")
        window = options.get("sliding_window")
        if mask is not None:
            window = _window(self._masks[id(mask)][1], longest_text(self._hf))
        head_dim = max(q.shape[-1], v.shape[-1])
        if options.get("slopes") is not None:
            head_dim = width_with_positions(head_dim)
            self.has_slopes = True
        self.caches.append(LayerCache(k.shape[1], head_dim, window))
        return q.new_empty(1, _TOKENS, q.shape[1], v.shape[-1])

    def mask(self, function: MaskFunction, device: torch.device) -> Tensor:
        mask = torch.empty(1, 1, _TOKENS, _TOKENS, dtype=torch.bool, device=device)
        self._masks[id(mask)] = mask, function
        return mask


def _window(function: MaskFunction, longest: int) -> int | None:
    """How far back tokens of a text see; None: all. Raises UnservedError for other shapes."""
    zero, last = torch.zeros((), dtype=torch.int64), min(longest, _FAR) - 1
    seen = []  # (position, how many tokens it sees)
    for position in (last, last // 2, last // 3 + 1):
        query, distance = torch.tensor(position), torch.arange(-8, position + 1)
        visible = torch.as_tensor(function(zero, zero, query, query - distance))
        visible = visible.expand(distance.shape)
        width = int(visible.sum())
        if width == 0 or visible[:8].any() or not visible[8 : 8 + width].all():
            raise UnservedError("its mask is neither causal nor a sliding window")
        seen.append((position, width))
    window = max(width for _, width in seen)
    if any(width != min(position + 1, window) for position, width in seen):
        raise UnservedError("its mask is in chunks")
    return None if window == last + 1 else window


class _CountsTokens(TorchDispatchMode):
    """Notices who numbers the tokens of a step, which are of several texts."""

    seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        if func.overloadpacket is torch.ops.aten.arange and out.numel() == _TOKENS:
            self.seen = True
        return out


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
