"""Layers that cache alike share block tables; those with a window give back what fell out of it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.engine import Engine
from engine.schedule.block_tables import most_held
from tests.checkpoints import load_oracle
from tests.conftest import CheckpointFactory
from tests.engine.helpers import Output, new_engine, new_requests, tokens_of
from tests.engine.oracle import greedy_text, random_prompts

WINDOW, BLOCK_SIZE, BUDGET = 20, 4, 32
# Layer 0 sees all tokens, layers 1 and 2 a window of them.
MIXED: dict[str, Any] = dict(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)


@pytest.fixture
def mixed(checkpoints: CheckpointFactory) -> Path:
    return checkpoints("qwen2", **MIXED)


def new_small_engine(directory: Path, **config: Any) -> Any:
    defaults = dict(block_size=BLOCK_SIZE, max_num_batched_tokens=BUDGET, max_num_seqs=8)
    return new_engine(directory, **defaults | dict(num_blocks=256) | config)


@torch.inference_mode()
def spoil_free_blocks(engine: Engine) -> None:
    """Whoever reads a block that nobody holds gets no number from it."""
    layout, caches = engine.runner.cache_layout, engine.runner.forward_pass.kv_caches
    for pool, group in zip(engine.scheduler.blocks.pools, layout.groups, strict=True):
        free = [block for block in range(pool.num_blocks) if pool.is_free(block)]
        for layer in group.layers:
            for tensor in caches[layer].tensors:
                tensor[free] = torch.nan


def test_layers_that_cache_alike_form_a_group(mixed: Path) -> None:
    with new_small_engine(mixed) as engine:
        layout = engine.runner.cache_layout
        assert [(g.window, g.layers) for g in layout.groups] == [(None, [0]), (WINDOW, [1, 2])]
        assert engine.runner.tables.block_tables.shape[0] == 2
        # Windows take no more than all rows can fill.
        most = 8 * most_held(WINDOW, BUDGET, BLOCK_SIZE)
        assert engine.runner.num_blocks[1] == most < engine.runner.num_blocks[0]


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("family", ["mixed", "window only"])
def test_blocks_out_of_the_window_are_given_back_and_never_read(
    checkpoints: CheckpointFactory, family: str, async_scheduling: bool
) -> None:
    directory = (
        checkpoints("qwen2", **MIXED)
        if family == "mixed"
        else checkpoints("mistral", sliding_window=WINDOW)
    )
    text = greedy_text(load_oracle(directory), random_prompts(16, 90), 24)
    most = most_held(WINDOW, BUDGET, BLOCK_SIZE)
    outputs = [Output() for _ in text.prompts]
    with new_small_engine(
        directory, enable_prefix_caching=False, async_scheduling=async_scheduling
    ) as engine:
        for request in new_requests(text.prompts, max_tokens=24, ignore_eos=True):
            engine.add(request)
        while engine.has_work:
            if not async_scheduling:  # else a step in flight may still read them
                spoil_free_blocks(engine)
            for delta in engine.step():
                outputs[int(delta.request_id)].token_ids += delta.token_ids
            for sequence in engine.scheduler.running:
                held = [b for b in sequence.block_tables[-1] if b >= 0]
                assert len(held) <= most
        engine.scheduler.assert_invariants()
    assert tokens_of(outputs) == text.outputs


def test_a_long_text_needs_only_its_window_of_blocks(checkpoints: CheckpointFactory) -> None:
    """Where all layers slide, a pool of a window serves texts of any length."""
    directory = checkpoints("mistral", sliding_window=WINDOW)
    most = most_held(WINDOW, BUDGET, BLOCK_SIZE)
    with new_small_engine(directory, num_blocks=most) as engine:
        assert engine.limits.max_len == 512 > most * BLOCK_SIZE
        for request in new_requests([[5] * 300], max_tokens=200, ignore_eos=True):
            engine.add(request)
        num_tokens = 0
        while engine.has_work:
            num_tokens += sum(len(delta.token_ids) for delta in engine.step())
        assert num_tokens == 200
        assert engine.scheduler.stats.preemptions == 0


def test_a_cached_prefix_is_part_of_the_window(checkpoints: CheckpointFactory) -> None:
    """So a pool of a window also serves a text that goes on long after what it has of it."""
    directory = checkpoints("mistral", sliding_window=WINDOW)
    first = random_prompts(11, 100, seed=3)[10]
    second = first + random_prompts(11, 100, seed=4)[10]
    with new_small_engine(directory) as engine:
        alone = tokens_of_one(engine, second)
    with new_small_engine(
        directory, num_blocks=most_held(WINDOW, BUDGET, BLOCK_SIZE), max_num_seqs=1
    ) as engine:
        tokens_of_one(engine, first)
        assert tokens_of_one(engine, second) == alone
        assert engine.scheduler.stats.cached_tokens == 100


def test_of_a_prefix_in_host_memory_only_the_window_comes_back(
    checkpoints: CheckpointFactory,
) -> None:
    """For the pool need not have room for all of it."""
    directory = checkpoints("mistral", sliding_window=WINDOW)
    texts = [random_prompts(11, 200, seed=seed)[10] for seed in (3, 4)]
    texts.append(texts[0] + texts[1])
    with new_small_engine(directory) as engine:
        alone = [tokens_of_one(engine, text) for text in texts]
    with new_small_engine(
        directory,
        num_blocks=most_held(WINDOW, BUDGET, BLOCK_SIZE),
        max_num_seqs=1,
        host_cache_memory_bytes=1 << 24,
    ) as engine:
        stats = engine.scheduler.stats
        for i in (0, 1, 0, 2, 1):
            cached, restored = stats.cached_tokens, stats.restored_tokens
            assert tokens_of_one(engine, texts[i]) == alone[i]
        assert stats.cached_tokens - cached == 196
        assert 0 < stats.restored_tokens - restored < WINDOW + BLOCK_SIZE


@pytest.mark.parametrize("prefix", [8, 24, 60, 88])
def test_a_prefix_is_found_where_all_groups_have_what_is_seen(mixed: Path, prefix: int) -> None:
    """Of the windowed layers that is the window before the prefix's end, and no more."""
    first = random_prompts(11, 96, seed=3)[10]
    second = [*first[:prefix], *([7] * 12)]
    with new_small_engine(mixed) as engine:
        alone = tokens_of_one(engine, second)
    with new_small_engine(mixed) as engine:
        tokens_of_one(engine, first)
        assert tokens_of_one(engine, second) == alone
        found = engine.scheduler.stats.cached_tokens
        # Only the last window of the first text is sure to be there still.
        assert found in (0, prefix // BLOCK_SIZE * BLOCK_SIZE)


def tokens_of_one(engine: Engine, prompt: list[int]) -> list[int]:
    (request,) = new_requests([prompt], max_tokens=8, ignore_eos=True)
    engine.add(request)
    tokens: list[int] = []
    while engine.has_work:
        before = engine.num_steps
        for delta in engine.step():
            tokens += delta.token_ids
        assert engine.num_steps > before, "stuck: nothing runs, nothing will"
    return tokens


def test_host_memory_is_for_models_whose_layers_cache_alike(mixed: Path) -> None:
    engine = new_small_engine(mixed, host_cache_memory_bytes=1 << 20)
    with pytest.raises(ValueError, match=r"host_cache_memory_bytes: .* is for models"), engine:
        pass
