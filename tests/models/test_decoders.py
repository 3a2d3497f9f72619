"""Decoders of transformers compute here what they compute there, or are refused by name."""

import re
from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig
from engine.models.early import UNSERVED
from engine.models.transformers.distances import width_with_positions, with_positions
from engine.runner.footprint import describe
from tests.models.sweep import Outcome, examine, on_two_ranks
from tests.models.tiny import KINDS, save_random, tiny_config

# What sets each apart -> kind, and whether two ranks share it: a part of what -m slow runs.
NATIVE = {
    "softcaps, scaled embeddings, norms of 1 + weight, four of them": ("gemma2", False),
    "a rotary embedding and a window by kind of layer": ("gemma3_text", False),
    "maps stored as one": ("phi3", True),
    "half of each head stands still, pairs side by side": ("glm4", True),
    "norms over all heads, and behind attention and MLP": ("olmo3", True),
    "layer norms, attention and MLP beside each other": ("cohere2", True),
    "multipliers": ("granite", False),
    "no positions where there is no window": ("exaone4", False),
}
SERVED = {
    "learned positions, weights the other way round": ("gpt2", False),
    "experts": ("qwen3_moe", True),
    "latent attention, values narrower than keys": ("deepseek_v3", True),
    "sinks": ("gpt_oss", False),
    "attention by a method of its own": ("gpt_neo", False),
    "scores that fall with distance": ("bloom", False),
    "states of gated delta nets, next to attention": ("qwen3_next", True),
    "states that modules begin anew where several tokens come": ("jamba", False),
    "an indexer that selects tokens": ("deepseek_v32", False),
}
REFUSED = {
    "rwkv": "keeps states in a way of its own",
    "doge": "changes its mask",
    "inkling_text": "position_bias",
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scores_fall_with_distance_as_far_apart_as_texts_are_long(dtype: torch.dtype) -> None:
    positions = torch.tensor([0, 255, 256, 1000, 30_001, 30_002])
    q, k = torch.zeros(1, 4, 6, 16, dtype=dtype), torch.zeros(1, 2, 6, 16, dtype=dtype)
    slopes = torch.tensor([1.0, 0.5, 0.25, 2**-8])
    q, k = with_positions(q, k, slopes, positions)
    assert q.dtype == k.dtype == dtype and width_with_positions(16) == 32
    scores = q.float() @ k.float().repeat_interleave(2, 1).mT
    distances = positions[None, :] - positions[:, None]
    expected = slopes[:, None, None] * distances
    torch.testing.assert_close((scores - scores.diagonal(dim1=-2, dim2=-1)[..., None])[0], expected)


def test_norms_over_all_heads_count_those_that_ranks_share_once(tmp_path: Path) -> None:
    config = tiny_config("olmo2")
    config.num_key_value_heads = 1
    save_random("olmo2", config, tmp_path)
    assert on_two_ranks(tmp_path) == "equal"


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_served_is_refused_before_weights_are_read(kind: str, tmp_path: Path) -> None:
    outcome = examine(kind, tmp_path)
    assert outcome.state == "refused"
    assert re.search(REFUSED[kind], outcome.reason)
    assert UNSERVED[kind] == outcome.reason  # what is told without looking closer


def test_states_are_neither_shared_nor_taken_back(tmp_path: Path) -> None:
    tiny_config("lfm2").save_pretrained(tmp_path)
    config = EngineConfig(model=str(tmp_path), load_format="dummy", device="cpu")
    assert "no prefix is shared" in describe(config)["States"]
    for name, value in (("speculation", "ngram"), ("host_cache_memory_bytes", 2**20)):
        with pytest.raises(ValueError, match=f"{name}: .* is not for models with states"):
            describe(config.model_copy(update={name: value}))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_decoder_is_silently_wrong(kind: str, tmp_path: Path) -> None:
    outcome: Outcome = examine(kind, tmp_path)
    assert outcome.state in ("served", "refused", "refused after loading", "not made"), outcome
    assert outcome.state != "refused after loading" or kind in UNSERVED
    assert not outcome.ranks.startswith("wrong"), outcome
