"""An engine goes on with the weights of another checkpoint, as in a loop of learning."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import LLM, SamplingParams
from engine.engine import Engine
from engine.runner.model_runner import ModelRunner
from engine.schedule.request import Request
from tests.conftest import CheckpointFactory
from tests.engine.helpers import new_engine, new_requests, run, tokens_of
from tests.engine.test_commands import engine_of

PROMPTS = [list(range(3, 60)), [5, 9, 7], list(range(20, 40))]
Edited = Callable[..., Path]


def move(tensors: dict[str, torch.Tensor]) -> None:
    """As a step of learning does, but farther."""
    generator = torch.Generator().manual_seed(1)
    for name in sorted(tensors):
        tensors[name] += 0.05 * torch.randn(tensors[name].shape, generator=generator)


def answers(engine: Engine, **params: Any) -> list[list[int]]:
    return tokens_of(run(engine, new_requests(PROMPTS, **params)))


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("qwen3", {}),
        ("qwen3", dict(async_scheduling=True)),
        ("qwen3", dict(quantization="w8a8")),
        ("qwen3", dict(dtype="bfloat16", quantization="int4")),
        ("qwen3", dict(model_impl="transformers")),
        ("qwen3", dict(speculation="suffix")),
        ("qwen3", dict(host_cache_memory_bytes=1 << 20)),
        ("llama3", {}),
        ("mistral", {}),
    ],
    ids=str,
)
def test_it_says_what_an_engine_of_the_other_checkpoint_says(
    checkpoints: CheckpointFactory, edited: Edited, family: str, config: dict[str, Any]
) -> None:
    first, other = checkpoints(family), edited(family, tensors=move)
    params = dict(logprobs=2, prompt_logprobs=1)
    with new_engine(other, **config) as engine:
        others = answers(engine, **params)
    with new_engine(first, **config) as engine:
        own = answers(engine, **params)
        assert own != others
        for path, wanted in ((other, others), (first, own)):
            engine.update_weights_from_disk(str(path))
            outputs = run(engine, new_requests(PROMPTS, **params))
            assert tokens_of(outputs) == wanted
            assert [output.num_cached_tokens for output in outputs] == [0, 0, 0]
            engine.scheduler.assert_invariants()


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
def test_requests_go_on_where_they_are_with_all_that_they_had_computed_anew(
    checkpoints: CheckpointFactory, edited: Edited, async_scheduling: bool
) -> None:
    first, other = checkpoints("qwen3"), edited("qwen3", tensors=move)
    texts: dict[str, list[int]] = {"0": [], "1": [], "2": []}
    with new_engine(first, async_scheduling=async_scheduling, max_num_seqs=2) as engine:
        for request in new_requests(PROMPTS, temperature=1.0, max_tokens=24):
            engine.add(request)

        def step() -> None:
            for delta in engine.step():
                texts[delta.request_id] += delta.token_ids

        while len(texts["0"]) < 8:
            step()
        engine.update_weights_from_disk(str(other))
        before = {key: list(text) for key, text in texts.items()}
        brought = {d.request_id: list(d.token_ids) for d in engine._brought}
        assert before["2"] == []  # it waits
        while engine.has_work:
            step()
        assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_blocks
    with new_engine(other) as engine:
        for i, (prompt, (key, had)) in enumerate(zip(PROMPTS, before.items(), strict=True)):
            had = had + brought.get(key, [])
            params = SamplingParams(temperature=1.0, max_tokens=24)
            (rest,) = run(engine, [Request(key, prompt, params, seed=i, output_token_ids=had)])
            assert had + rest.token_ids == texts[key]


@dataclass(frozen=True)
class UpdateWhereARankCannot:
    path: str
    rank: int

    def run(self, runner: ModelRunner) -> str | None:
        def fail(*_: object) -> Any:
            raise OSError("no such file here")

        if runner.ranks.world.rank == self.rank:
            runner._load = fail  # type: ignore[method-assign]
        failure = runner.update_weights(self.path)
        vars(runner).pop("_load", None)
        return failure


def test_all_ranks_change_their_weights_or_none_does(
    checkpoints: CheckpointFactory, edited: Edited
) -> None:
    first, other = checkpoints("qwen3"), edited("qwen3", tensors=move)
    with new_engine(other) as engine:
        others = answers(engine)
    with engine_of(first, 2, async_scheduling=True, dtype="float32") as engine:
        own = answers(engine)
        for rank, told in ((0, "no such file here"), (1, "another rank cannot load them")):
            failure = engine.executor.run(UpdateWhereARankCannot(str(other), rank))()
            engine.scheduler.forget_computed()
            assert failure is not None and failure.startswith(told)
            assert answers(engine) == own
        engine.update_weights_from_disk(str(other))
        assert answers(engine) == others


def test_a_draft_model_stays(checkpoints: CheckpointFactory, edited: Edited) -> None:
    first, other = checkpoints("qwen3"), edited("qwen3", tensors=move)
    with new_engine(first, speculation="model", draft_model=str(other)) as engine:
        assert engine.runner.draft is not None
        engine.update_weights_from_disk(str(other))
        said = answers(engine)
        assert engine.runner.draft.forward_pass.kv_caches
    with new_engine(other) as engine:
        assert said == answers(engine)


def test_random_weights_give_way_to_real_ones(checkpoints: CheckpointFactory) -> None:
    """An engine that is given its weights later need not read any before."""
    first = checkpoints("qwen3")
    with new_engine(first) as engine:
        wanted = answers(engine)
    with new_engine(first, load_format="dummy") as engine:
        assert answers(engine) != wanted
        engine.update_weights_from_disk(str(first))
        assert answers(engine) == wanted


def test_another_model_is_refused_and_nothing_is_lost(
    checkpoints: CheckpointFactory, edited: Edited, tmp_path: Path
) -> None:
    for path, told in (
        (tmp_path, "config.json"),
        (tmp_path / "nowhere", "nowhere"),
        (checkpoints("qwen3", vocab_size=520), "is another model, .* vocab_size is 520, here "),
        (checkpoints("qwen3", num_hidden_layers=1), "its layers keep other keys and values"),
        (checkpoints("qwen3", max_position_embeddings=64), "its window is 64 tokens, here "),
    ):
        with new_engine(checkpoints("qwen3")) as engine:
            own = answers(engine)
            with pytest.raises(ValueError, match=f"(?s)model_path: .*{told}"):
                engine.update_weights_from_disk(str(path))
            outputs = run(engine, new_requests(PROMPTS))
            assert tokens_of(outputs) == own
            assert outputs[0].num_cached_tokens > 0


def test_what_turns_out_not_to_load_leaves_the_old_weights(
    checkpoints: CheckpointFactory, edited: Edited
) -> None:
    broken = edited("qwen3", tensors=lambda tensors: tensors.pop("model.norm.weight"))
    with new_engine(checkpoints("qwen3")) as engine:
        own = answers(engine)
        with pytest.raises(ValueError, match=r"cannot be loaded: .*model\.norm\.weight"):
            engine.update_weights_from_disk(str(broken))
        assert answers(engine) == own


def test_an_engine_that_sleeps_is_to_wake_up_first(checkpoints: CheckpointFactory) -> None:
    with new_engine(checkpoints("qwen3"), enable_sleep_mode=True) as engine:
        engine.sleep()
        with pytest.raises(ValueError, match="asleep"):
            engine.update_weights_from_disk(str(checkpoints("qwen3")))


def test_a_batch_of_prompts_between_two_updates(
    checkpoints: CheckpointFactory, edited: Edited
) -> None:
    llm = LLM(str(checkpoints("qwen3")), dtype="float32", num_blocks=64, num_threads=1)
    params = SamplingParams(temperature=0, max_tokens=8)

    def said() -> list[int]:
        (output,) = llm.generate([[5, 9, 7]], params, use_tqdm=False)
        return output.outputs[0].token_ids

    first = said()
    llm.update_weights_from_disk(str(edited("qwen3", tensors=move)))
    assert said() != first
    llm.close()
