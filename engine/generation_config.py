"""How a checkpoint wants to generate: what ends an output, and which sampling is recommended.

Or to embed: which hidden states. Or to classify: which labels.
"""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from engine.checkpoint.files import CheckpointError, read_json, special_tokens
from engine.sampling_params import SamplingParams
from engine.strict import explain, shown

logger = logging.getLogger(__name__)

# The names in generation_config.json of what we have too, and ours.
_OBEYED = {
    **{name: name for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")},
    "max_new_tokens": "max_tokens",
}
# What else would make transformers' `generate` write another text. Neutral are null, 0 and 1.
_NOT_OBEYED = frozenset(
    (
        *("min_length", "min_new_tokens", "max_time", "stop_strings", "num_return_sequences"),
        *("num_beams", "num_beam_groups", "diversity_penalty", "constraints", "force_words_ids"),
        *("top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "penalty_alpha", "dola_layers"),
        *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty"),
        *("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias"),
        *("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"),
        *("guidance_scale", "token_healing", "watermarking_config"),
    )
)


def eos_token_ids(directory: Path) -> frozenset[int]:
    """Tokens that end an output: those of both configs and the tokenizer's, as in vLLM.

    Where none of them names one, any special token does: it is no text.
    """
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        given = read_json(directory, name).get("eos_token_id")
        ids = given if isinstance(given, list) else [] if given is None else [given]
        if any(type(i) is not int for i in ids):
            raise _wrong(directory, name, "eos_token_id", given, "a token id or a list of them")
        found.update(ids)
    named = special_tokens(directory).get("eos_token")
    if named is not None or not found:
        ids_by_text, special = _tokens(directory)
        found |= {ids_by_text[named]} if named in ids_by_text else set()
        found = found or special
    return frozenset(found)


def _typed(directory: Path, name: str, field: str, kind: type, right: str) -> Any:
    """What a file says of the field, if anything; raises CheckpointError for another type."""
    value = read_json(directory, name).get(field)
    if value is not None and type(value) is not kind:
        raise _wrong(directory, name, field, value, right)
    return value


def _wrong(directory: Path, name: str, field: str, value: Any, right: str) -> CheckpointError:
    return CheckpointError(f"{directory}/{name}: {field}: should be {right} (got {shown(value)})")


def _tokens(directory: Path) -> tuple[dict[str, int], set[int]]:
    """(ids by text, ids of special tokens), from the files: a tokenizer takes long to load."""
    ids: dict[str, int] = {}
    added = read_json(directory, "tokenizer_config.json").get("added_tokens_decoder")
    if added is None:
        content = read_json(directory, "tokenizer.json")
        added = {token["id"]: token for token in content.get("added_tokens", ())}
        vocab = content.get("model", {}).get("vocab")
        ids |= vocab if isinstance(vocab, dict) else {}
    ids |= {token["content"]: int(i) for i, token in added.items()}
    return ids, {int(i) for i, token in added.items() if token.get("special")}


def sampling_defaults(directory: Path) -> dict[str, Any]:
    """The sampling parameters that the model's authors recommend.

    What they recommend and we lack is named in the log. Raises CheckpointError for a value that
    cannot be.
    """
    recommended = {
        name: value
        for name, value in read_json(directory, "generation_config.json").items()
        if value is not None
    }
    defaults = {ours: recommended[name] for name, ours in _OBEYED.items() if name in recommended}
    do_sample = _typed(directory, "generation_config.json", "do_sample", bool, "true or false")
    if do_sample is False:  # said outright, not left out
        for name in ("top_k", "top_p", "min_p"):
            defaults.pop(name, None)
        defaults["temperature"] = 0.0
    try:
        SamplingParams(**defaults)
    except ValidationError as error:
        theirs = {ours: name for name, ours in _OBEYED.items()}
        faults = "; ".join(f"{theirs[field]}: {fault}" for field, fault in explain(error.errors()))
        raise CheckpointError(f"{directory}/generation_config.json: {faults}") from error
    ignored = {
        name: value
        for name, value in recommended.items()
        if name in _NOT_OBEYED and value not in (0, 1, [], {})
    }
    window = _typed(directory, "config.json", "max_position_embeddings", int, "an integer")
    longest = _typed(directory, "generation_config.json", "max_length", int, "an integer")
    if "max_tokens" not in defaults and longest is not None and longest < (window or 0):
        ignored["max_length"] = longest
    if ignored:
        listed = ", ".join(f"{name}={value!r}" for name, value in sorted(ignored.items()))
        logger.warning("generation_config.json recommends what is not obeyed here: %s", listed)
    return defaults


PoolingKind = Literal["last", "mean", "cls"]
_MODES: dict[str, PoolingKind] = {
    "pooling_mode_lasttoken": "last",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
}


@dataclass(frozen=True)
class EmbeddingConfig:
    kind: PoolingKind
    normalizes: bool = True  # to length 1


def embedding_config(directory: Path) -> EmbeddingConfig | None:
    """None for one that is not made for it; raises CheckpointError for one that pools otherwise."""
    path = directory / "modules.json"
    if not path.exists():
        return None
    modules = json.loads(path.read_text(encoding="utf-8"))
    kinds = {str(m.get("type", "")).rsplit(".", 1)[-1]: m.get("path", "") for m in modules}
    if "Pooling" not in kinds:
        return None
    modes = read_json(directory / kinds["Pooling"], "config.json")
    wanted = [name for name, value in modes.items() if name.startswith("pooling_mode_") and value]
    if len(wanted) != 1 or wanted[0] not in _MODES:
        raise CheckpointError(f"{path.parent}: pools by {wanted}; known are {list(_MODES)}")
    return EmbeddingConfig(_MODES[wanted[0]], "Normalize" in kinds)


@dataclass(frozen=True)
class ClassifierConfig:
    labels: list[str]
    activation: Literal["softmax", "sigmoid", "none"]

    def probabilities(self, logits: Sequence[float]) -> list[float]:
        """What the labels' logits mean: scores as they are, where that is what was trained."""
        if self.activation == "none":
            return list(logits)
        if self.activation == "sigmoid":
            return [0.5 + 0.5 * math.tanh(logit / 2) for logit in logits]
        shares = [math.exp(logit - max(logits)) for logit in logits]
        return [share / sum(shares) for share in shares]


def classifier_config(directory: Path) -> ClassifierConfig | None:
    """None for a model of another kind. What labels mean is as vLLM takes problem_type."""
    content = read_json(directory, "config.json")
    architectures = content.get("architectures") or ()
    if not any(name.endswith("ForSequenceClassification") for name in architectures):
        return None
    names = content.get("id2label") or {
        i: f"LABEL_{i}" for i in range(content.get("num_labels", 2))
    }
    labels = [str(names[i]) for i in sorted(names, key=int)]
    one_of_them: Literal["softmax", "sigmoid"] = "softmax" if len(labels) > 1 else "sigmoid"
    match content.get("problem_type"):
        case "regression":
            return ClassifierConfig(labels, "none")
        case "multi_label_classification":
            return ClassifierConfig(labels, "sigmoid")
    return ClassifierConfig(labels, one_of_them)
