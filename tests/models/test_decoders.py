"""Decoders of transformers compute here what they compute there, or are refused by name."""

import re
from pathlib import Path

import pytest

from tests.models.sweep import Outcome, examine
from tests.models.tiny import KINDS

# What sets each apart -> kind, and whether two ranks share it: a part of what -m slow runs.
NATIVE = {
    "softcaps, scaled embeddings, norms of 1 + weight, four of them": ("gemma2", False),
    "a rotary embedding and a window by kind of layer": ("gemma3_text", False),
    "maps stored as one": ("phi3", True),
    "half of each head stands still, pairs side by side": ("glm4", True),
    "norms over all heads, and behind attention and MLP": ("olmo3", True),
    "multipliers": ("granite", False),
    "no positions where there is no window": ("exaone4", False),
}
SERVED = {
    "one norm for attention and MLP, windows in some layers": ("cohere2", False),
    "learned positions, weights the other way round": ("gpt2", False),
    "experts": ("qwen3_moe", True),
    "latent attention, values narrower than keys": ("deepseek_v3", True),
    "sinks": ("gpt_oss", False),
    "attention by a method of its own": ("gpt_neo", False),
    "an indexer that selects tokens": ("deepseek_v32", False),
}
REFUSED = {
    "mamba": "keeps states",
    "lfm3": r"kinds that are not served: \['conv'\]",
    "bloom": "does not go through transformers' interface",
    "inkling_text": "hybrid_sliding",
}


@pytest.mark.parametrize("kind, shared", SERVED.values(), ids=SERVED)
def test_text_is_that_of_transformers(kind: str, shared: bool, tmp_path: Path) -> None:
    outcome = examine(kind, tmp_path, shared)
    assert outcome.state == "served", outcome
    assert outcome.path == "transformers"
    assert outcome.ranks == ("equal" if shared else "")


@pytest.mark.parametrize("kind, shared", NATIVE.values(), ids=NATIVE)
def test_our_blocks_compute_it_too(kind: str, shared: bool, tmp_path: Path) -> None:
    outcome = examine(kind, tmp_path, shared)
    assert (outcome.state, outcome.path) == ("served", "native"), outcome
    assert outcome.ranks == ("equal" if shared else "")


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
