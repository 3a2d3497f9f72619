"""Decoders of transformers compute here what they compute there, or are refused by name."""

import re
from pathlib import Path

import pytest

from tests.models.sweep import Outcome, examine
from tests.models.tiny import KINDS

# What sets each apart -> kind: together, all that the backend has to get right.
SERVED = {
    "windows in some layers, scaled embeddings, four norms": "gemma3_text",
    "capped scores and logits": "gemma2",
    "fused projections, a partial rotary embedding": "phi3",
    "learned positions, weights the other way round": "gpt2",
    "experts": "qwen3_moe",
    "latent attention, values narrower than keys": "deepseek_v3",
    "sinks": "gpt_oss",
    "layers that attend twice": "diffllama",
}
REFUSED = {
    "mamba": "keeps states",
    "lfm3": r"kinds that are not served: \['conv'\]",
    "bloom": "does not go through transformers' interface",
    "deepseek_v32": "indexed_attention",
}


@pytest.mark.parametrize("kind", SERVED.values(), ids=SERVED)
def test_text_is_that_of_transformers(kind: str, tmp_path: Path) -> None:
    outcome = examine(kind, tmp_path)
    assert outcome.state == "served", outcome
    assert outcome.path == "transformers"
    assert outcome.ranks == "equal" or "no plan for tensor parallelism" in outcome.ranks


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_served_is_refused_before_weights_are_read(kind: str, tmp_path: Path) -> None:
    outcome = examine(kind, tmp_path)
    assert outcome.state == "refused"
    assert re.search(REFUSED[kind], outcome.reason)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_decoder_is_silently_wrong(kind: str, tmp_path: Path) -> None:
    outcome: Outcome = examine(kind, tmp_path)
    assert outcome.state in ("served", "refused", "not made"), outcome
    assert not outcome.ranks.startswith("wrong"), outcome
