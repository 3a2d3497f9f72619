"""Recorded steps: padding, static buffers and the ladder, proven on CPU tensors."""

import random
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from engine.config import EngineConfig
from engine.device.recorded_steps import (
    RecordedSteps,
    Shape,
    default_sizes,
    draft_shapes,
    prompt_shapes,
)
from engine.runner import model_runner
from engine.runner.model_runner import ModelRunner
from engine.runner.warm_up import warm_up_plans
from engine.sampling.pending_step import PendingStep
from engine.schedule.step import StepPlan
from kernels import select_ops
from kernels.cpu.recorder import Arena
from kernels.ops import REFERENCE
from kernels.types import StepRows
from tests.conftest import CheckpointFactory
from tests.engine.fake_recorder import FakeRecorder
from tests.engine.helpers import new_engine, new_requests, run, tokens_of
from tests.engine.oracle import random_prompts
from tests.engine.test_speculation import Liar, speculate

SAMPLED = dict(temperature=1.0, ignore_eos=True)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> FakeRecorder:
    """Engines record as on a GPU, though they are on a CPU."""
    ops = select_ops(torch.device("cpu"))
    # Attention in plain torch reads lengths on the host.
    fake = FakeRecorder(strict=ops.name != "cpu-torch")
    ops = replace(ops, new_recorder=lambda: fake)
    monkeypatch.setattr(model_runner, "select_ops", lambda *_: ops)
    return fake


# --- The ladder -------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 2, 3, 7, 8, 9, 64, 100, 256, 300, 1024])
def test_the_ladder_wastes_little(most: int) -> None:
    sizes = default_sizes(most)
    assert sizes[0] == 1 and sizes[-1] == most
    for low, high in pairwise(sizes):
        assert low < high <= max(2 * low if low < 8 else 0, low + 8, low + low // 8)
    assert len(sizes) <= 60


# --- Buffers and padding ----------------------------------------------------------------------


def test_a_step_is_padded_to_the_next_shape_and_nothing_of_the_last_one_remains() -> None:
    """Where it decodes, also with drafts, and where rows have any number of tokens."""
    seen: list[tuple[list[int], list[int], list[int], int]] = []
    kinds: list[int] = []  # most tokens of a row that decodes, 0: any number

    def step(rows: StepRows) -> Tensor:
        starts = rows.query_starts.tolist()
        assert starts[-1] == rows.num_tokens and rows.decodes.rows in (0, len(rows.rows))
        longest = max(end - start for start, end in pairwise(starts))
        assert longest <= rows.max_query_len
        kinds.append(rows.decodes.longest if rows.decodes.rows else 0)
        seen.append((rows.rows.tolist(), rows.starts.tolist(), starts, rows.num_tokens))
        request = torch.arange(len(rows.rows)).repeat_interleave(rows.query_starts.diff())
        return torch.stack((rows.rows[request], rows.starts[request]), 1).double()

    recorder = FakeRecorder()
    shapes = [Shape(n, rows) for n in (16, 40) for rows in (3, 9)]
    shapes += [Shape(4, 3, 3), Shape(12, 3, 3), Shape(12, 9, 3)]
    graphs = RecordedSteps(recorder, [2, 8, 4], shapes, None, step, torch.device("cpu"))
    assert graphs.sizes == [2, 4, 8] and recorder.num_recorded == 10
    assert str(graphs).startswith("10 steps recorded in ")
    assert all(rows == [-1] * len(rows) for rows, *_ in seen), "recorded over rows of requests"
    for rows, lengths, shape in (
        ([5, 6, 7, 8, 3], [1] * 5, (8, 8, 1)),
        ([1, 4], [1, 30], (40, 3, 0)),
        ([1], [1], (2, 2, 1)),
        ([4, 2, 9], [1, 1, 14], (16, 9, 0)),
        ([4, 2], [1, 1], (2, 2, 1)),
        ([3], [16], (16, 3, 0)),
        ([1, 2, 3], [1] * 3, (4, 4, 1)),
        ([6], [2], (4, 3, 3)),
        ([6, 2], [1, 3], (4, 3, 3)),
        ([6, 2, 5], [2, 3, 3], (12, 9, 3)),
        ([6, 2, 5, 1, 3], [1, 3, 3, 3, 3], (16, 9, 0)),
        ([6], [4], (16, 3, 0)),
    ):
        seen.clear()
        kinds.clear()
        starts = [row * 10 for row in rows]
        hidden = graphs.run(rows, starts, lengths)
        tokens, more, kind = shape
        assert kinds == [kind]
        padding = more - len(rows)
        assert seen[0][:2] == (rows + [-1] * padding, starts + [0] * padding)
        if sum(lengths) > len(rows):
            ends = [sum(lengths[:i]) for i in range(len(rows) + 1)]
            assert seen[0][2:] == (ends + [tokens] * padding, tokens)
        assert hidden is not None
        assert hidden.tolist() == [
            [row, row * 10] for row, n in zip(rows, lengths, strict=True) for _ in range(n)
        ]
    for lengths in ([1] * 9, [41], [2] * 9):
        assert graphs.run([0] * len(lengths), [0] * len(lengths), lengths) is None
    assert recorder.num_recorded == 10


def test_a_library_that_cannot_be_recorded_is_launched(caplog: pytest.LogCaptureFixture) -> None:
    def step(rows: StepRows) -> Tensor:
        if rows.decodes.rows == 0:
            raise RuntimeError("operation not permitted when stream is capturing")
        return torch.zeros(rows.num_tokens, 1)

    graphs = RecordedSteps(FakeRecorder(), [2], [Shape(16, 3)], None, step, torch.device("cpu"))
    assert graphs.run([0], [0], [5]) is None and graphs.run([0], [0], [1]) is not None
    assert "steps with prompts cannot be recorded" in caplog.text


@pytest.mark.parametrize("most, rows", [(2048, 1024), (8192, 256), (100, 20), (16, 1), (5, 3)])
def test_shapes_of_steps_with_prompts(most: int, rows: int) -> None:
    shapes = prompt_shapes(most, rows)
    tokens = sorted({shape.tokens for shape in shapes})
    assert tokens[-1] == most and all(b <= 1.5 * a for a, b in pairwise(tokens))
    assert len(shapes) == len(set(shapes)) <= 40
    assert not any(shape.longest for shape in shapes)
    for size in tokens:  # rows for any step of so many tokens up to 63, and one to spare
        own = [shape.rows for shape in shapes if shape.tokens == size]
        assert max(own) > min(size, rows, 63)
    assert prompt_shapes(0, rows) == []


@pytest.mark.parametrize("rows, longest", [(256, 17), (8, 17), (1, 5), (20, 2)])
def test_shapes_of_steps_with_drafts_are_few_and_hold_any(rows: int, longest: int) -> None:
    shapes = draft_shapes(256, rows, longest)
    assert len(shapes) <= 26 and {shape.longest for shape in shapes} == {longest}
    for row_count in {1, min(7, rows), min(63, rows)}:
        for tokens in range(row_count + 1, min(row_count * longest, 256) + 1):
            size = min(shape.tokens for shape in shapes if shape.tokens >= tokens)
            assert size <= max(1.5 * tokens, 3)
            assert any(s.tokens == size and s.rows > row_count for s in shapes)


def test_padding_touches_nothing_of_anybody(
    checkpoints: CheckpointFactory, recorder: FakeRecorder
) -> None:
    """Of the cache, a padded step changes one token of each request, and nothing else."""
    with new_engine(
        checkpoints("qwen3"), num_blocks=20, cuda_graph_sizes=[8], max_num_seqs=8
    ) as engine:
        for request in new_requests(random_prompts(13, 9)[:3], max_tokens=9, ignore_eos=True):
            engine.add(request)
        engine.step()
        tokens_before = engine.runner.tables.token_ids.clone()
        caches = engine.runner.forward_pass.kv_caches
        before = [cache.keys.clone() for cache in caches]
        replays = engine.runner.forward_pass.num_replays
        engine.step()
        assert engine.runner.forward_pass.num_replays == replays + 1
        changed = engine.runner.tables.token_ids != tokens_before
        assert changed.sum(1).tolist()[3:] == [0] * 5, "a token in a row of nobody"
        for cache, keys_before in zip(caches, before, strict=True):
            bits, bits_before = (
                cache.keys.view(torch.int32),
                keys_before.view(torch.int32),
            )  # or NaN
            slots = (bits != bits_before).any(-1).any(1)  # [blocks, block size]
            assert int(slots.sum()) == 3


# --- The same text ----------------------------------------------------------------------------

CONFIGS: dict[str, dict[str, Any]] = {
    "default ladder": dict(max_num_seqs=32),
    "few sizes, and batches beyond": dict(max_num_seqs=32, cuda_graph_sizes=[3, 11]),
    "preempted": dict(block_size=4, num_blocks=30, max_num_seqs=16),
    "overlapping": dict(async_scheduling=True, max_num_seqs=32),
    "chunks": dict(max_num_seqs=16, max_num_batched_tokens=20),
    "prompts too": dict(
        max_num_seqs=16, max_num_batched_tokens=40, cuda_graph_sizes=[16], cuda_graph_max_tokens=40
    ),
}


@pytest.fixture(scope="module")
def eager_text(checkpoints: CheckpointFactory) -> list[list[int]]:
    with new_engine(checkpoints("mistral")) as engine:
        return tokens_of(run(engine, requests()))


def requests() -> list[Any]:
    """They end one by one, so that batches of all sizes come about."""
    made = []
    for i, prompt in enumerate(random_prompts(20, 40)):
        (request,) = new_requests([prompt], **SAMPLED, max_tokens=2 + i)
        request.id, request.seed = str(i), i
        made.append(request)
    return made


@pytest.mark.parametrize("config", CONFIGS)
def test_same_text_as_without_graphs(
    checkpoints: CheckpointFactory,
    recorder: FakeRecorder,
    eager_text: list[list[int]],
    config: str,
) -> None:
    with new_engine(checkpoints("mistral"), **CONFIGS[config]) as engine:
        num_recorded = recorder.num_recorded
        assert tokens_of(run(engine, requests())) == eager_text
        assert recorder.num_recorded == num_recorded, "recorded while requests were waiting"
        stats = engine.stats()
        assert 0 < stats["replayed_steps"] <= stats["steps"]
        all_recorded = config == "prompts too"
        assert (stats["replayed_steps"] == stats["steps"]) == all_recorded


def test_rows_with_drafts_replay_steps_too(
    checkpoints: CheckpointFactory, recorder: FakeRecorder, eager_text: list[list[int]]
) -> None:
    own = requests()
    texts = {r.id: r.prompt_token_ids + t for r, t in zip(own, eager_text, strict=True)}
    with new_engine(checkpoints("mistral"), speculation="suffix", max_num_seqs=32) as engine:
        num_recorded, engine.step_log = recorder.num_recorded, deque()
        speculate(engine, Liar(texts, 0.8, random.Random(0)))
        assert tokens_of(run(engine, own)) == eager_text
        plans = [done.step.plan for done in engine.step_log]
        decoding = [plan for plan in plans if plan.lengths == plan.num_sampled]
        assert any(max(plan.lengths) > 1 for plan in decoding)
        assert engine.stats()["replayed_steps"] == len(decoding)
        assert recorder.num_recorded == num_recorded


def test_eager_means_no_graphs(checkpoints: CheckpointFactory, recorder: FakeRecorder) -> None:
    with new_engine(checkpoints("qwen3"), enforce_eager=True) as engine:
        run(engine, requests()[:3])
        assert recorder.num_recorded == 0
        assert engine.stats()["replayed_steps"] == 0


@pytest.mark.parametrize(
    "config",
    [
        dict(cuda_graph_sizes=[1, 2]),
        dict(cuda_graph_max_tokens=64),
        dict(gpu_memory_utilization=0.5, num_blocks=None),
    ],
)
def test_settings_of_gpus_are_refused_on_a_cpu(
    checkpoints: CheckpointFactory, config: dict[str, Any]
) -> None:
    name = next(iter(config))
    with (
        pytest.raises(ValueError, match=rf"{name}: .* is for GPUs only"),
        new_engine(checkpoints("qwen3"), **config),
    ):
        pass


def test_graphs_and_eager_contradict() -> None:
    with pytest.raises(ValidationError, match="enforce_eager means no graphs"):
        EngineConfig(model="m", enforce_eager=True, cuda_graph_sizes=[1])


# --- On a CPU ---------------------------------------------------------------------------------

has_recorder = pytest.mark.skipif(
    select_ops(torch.device("cpu")).new_recorder is None, reason="no C++ compiler here"
)
CPU_CONFIGS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": dict(dtype="bfloat16"),
    "float16": dict(dtype="float16"),
    "w8a8": dict(dtype="bfloat16", quantization="w8a8"),
    "int4": dict(dtype="bfloat16", quantization="int4"),
    "fp8 cache": dict(dtype="bfloat16", kv_cache_dtype="fp8"),
    "transformers": dict(model_impl="transformers"),
    "preempted": dict(block_size=4, num_blocks=30, max_num_seqs=16),
}


@has_recorder
@pytest.mark.parametrize(
    ("family", "config"),
    [*(("qwen3", config) for config in CPU_CONFIGS), ("llama3", "w8a8"), ("mistral", "bfloat16")],
)
def test_a_cpu_records_each_batch_size_when_it_comes(
    checkpoints: CheckpointFactory, family: str, config: str
) -> None:
    directory = checkpoints(family, hidden_size=64, intermediate_size=128)
    # No cached prompts: in 16 bits they may decide between two tokens that are as likely.
    options = dict(max_num_seqs=32, enable_prefix_caching=False) | CPU_CONFIGS[config]
    with new_engine(directory, enforce_eager=True, **options) as engine:
        expected = tokens_of(run(engine, requests()))
        assert engine.stats()["replayed_steps"] == 0
    with new_engine(directory, **options) as engine:
        assert tokens_of(run(engine, requests())) == expected
        first = engine.stats()
        assert tokens_of(run(engine, requests())) == expected
        both = engine.stats()
        assert both["replayed_steps"] > 2 * first["replayed_steps"]
        assert 2 * both["replayed_steps"] > first["steps"]


@has_recorder
def test_a_cpu_records_small_steps_with_drafts_as_they_come(checkpoints: CheckpointFactory) -> None:
    directory = checkpoints("qwen3", hidden_size=64, intermediate_size=128)
    options: dict[str, Any] = dict(max_num_seqs=4, speculation="suffix", dtype="bfloat16")
    with new_engine(directory, enforce_eager=True, **options) as engine:
        engine.scheduler.speculation = None
        expected = tokens_of(run(engine, requests()))
    texts = {r.id: r.prompt_token_ids + text for r, text in zip(requests(), expected, strict=True)}
    with new_engine(directory, **options) as engine:
        replayed = []
        for _ in range(2):
            engine.step_log = deque()
            speculate(engine, Liar(texts, 0.8, random.Random(0)))
            before = engine.stats()["replayed_steps"]
            assert tokens_of(run(engine, requests())) == expected
            plans = [done.step.plan for done in engine.step_log]
            drafted = [p for p in plans if p.lengths == p.num_sampled and max(p.lengths) > 1]
            assert drafted
            replayed.append(engine.stats()["replayed_steps"] - before)
        # What came in the first round is there in the second; prompts are computed as ever.
        assert replayed[1] > replayed[0] and replayed[1] > len(drafted)


@has_recorder
def test_what_torch_computes_is_replayed_too(
    checkpoints: CheckpointFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    ops = replace(select_ops(torch.device("cpu")), rms_norm=REFERENCE.rms_norm)
    monkeypatch.setattr(model_runner, "select_ops", lambda *_: ops)
    with new_engine(checkpoints("qwen3"), enforce_eager=True) as engine:
        expected = tokens_of(run(engine, requests()))
    with new_engine(checkpoints("qwen3")) as engine:
        for _ in range(2):
            assert tokens_of(run(engine, requests())) == expected
        assert engine.stats()["replayed_steps"] > 0


@has_recorder
def test_a_replay_calls_kernels_and_torch_in_their_order() -> None:
    ops = select_ops(torch.device("cpu"))
    assert ops.new_recorder is not None
    x, norm, state = torch.randn(1, 4, 2, 8), torch.rand(32), torch.zeros(2)

    def work() -> Tensor:
        flat = x.transpose(1, 2).reshape(2, 32) * 2  # a copy, then a function of it
        turned = torch.cat((-flat[:, 16:], flat[:, :16]), dim=-1).to(torch.bfloat16)
        y = ops.rms_norm(flat, norm, 1e-6) + turned.float().pow(2).mean(-1, keepdim=True)
        y[:, :1] += 1
        state.add_(torch.tensor([1.0, 2.0]))  # of numbers that Python holds
        values, indices = y.topk(3)
        dropped = F.dropout(y[torch.arange(2), indices[:, 0]], training=False)
        return ops.silu_and_mul(torch.stack((dropped, values.sum(-1), state, y[0, :2])))

    with torch.inference_mode():
        result, replay = ops.new_recorder().record(work)
        assert replay is not None
        for _ in range(3):
            x.normal_()
            before, state = state, state.clone()
            expected = work()
            state = before
            assert not torch.equal(result, expected)
            replay()
            assert torch.equal(result, expected)


@has_recorder
@pytest.mark.parametrize(
    "look",
    [
        lambda x: x * x.sum().item(),
        lambda x: x * len(x[0].tolist()),
        lambda x: x + torch.from_numpy(x.numpy() * 2),
        lambda x: x[x > 0],
        lambda x: x if x.sum() > 0 else -x,
        lambda x: x + x.nonzero().sum(),
        lambda x: x + torch.rand_like(x),
    ],
    ids=["item", "tolist", "numpy", "mask", "bool", "nonzero", "random"],
)
def test_what_depends_on_values_is_not_recorded(look: Callable[[Tensor], Tensor]) -> None:
    ops, x = select_ops(torch.device("cpu")), torch.randn(2, 8)
    assert ops.new_recorder is not None
    with torch.inference_mode():
        assert ops.new_recorder().record(lambda: look(x))[1] is None


def test_memory_of_a_recording_is_reused_when_nothing_views_it() -> None:
    arena = Arena()
    x = arena.empty((3, 1000), torch.float32)
    row, address = x[1], x.data_ptr()
    del x
    y = arena.empty((3, 1000), torch.float32)
    assert y.data_ptr() != address, "given away under a view"
    del row
    z = arena.empty((2000,), torch.bfloat16)
    assert z.data_ptr() != address, "of another size"
    assert arena.empty((2900,), torch.float32).data_ptr() == address


@has_recorder
def test_work_that_fails_leaves_nothing_recording() -> None:
    ops = select_ops(torch.device("cpu"))
    assert ops.new_recorder is not None
    recorder = ops.new_recorder()
    x = torch.randn(4, 64)

    def work() -> Tensor:
        return ops.silu_and_mul(ops.silu_and_mul(x))

    def fail() -> Tensor:
        work()
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        recorder.record(fail)
    ops.silu_and_mul(x)
    result, replay = recorder.record(work)
    assert replay is not None
    for _ in range(3):
        x.normal_()
        expected = work()
        assert not torch.equal(result, expected)
        replay()
        assert torch.equal(result, expected)


# --- Rehearsal --------------------------------------------------------------------------------


@pytest.mark.parametrize("max_num_seqs, budget, max_len", [(1, 1, 2), (4, 10, 100), (3, 64, 5)])
def test_the_rehearsed_steps_are_the_largest(max_num_seqs: int, budget: int, max_len: int) -> None:
    config = EngineConfig(model="m", max_num_seqs=max_num_seqs, max_num_batched_tokens=budget)
    *largest, alone, decoding = warm_up_plans(config, max_len, max_drafts=0)
    assert [row.num_tokens for row in decoding.scheduled] == [1] * max_num_seqs
    assert [row.num_tokens for row in alone.scheduled] == [min(budget, max_len - 1)]
    for plan in largest:
        assert len(plan.scheduled) == len(plan.new_rows) == max_num_seqs
        assert plan.num_tokens == budget or max(r.num_tokens for r in plan.scheduled) == max_len - 1
        assert plan.num_tokens <= budget
        assert all(row.num_tokens < max_len for row in plan.scheduled)


def test_a_step_of_as_many_drafts_as_there_can_be_is_rehearsed() -> None:
    config = EngineConfig(model="m", max_num_seqs=40, max_num_batched_tokens=1000)
    plans = warm_up_plans(config, 500, max_drafts=16)
    lengths = [tuple(plan.num_sampled) for plan in plans if max(plan.num_sampled) > 1]
    assert sorted(lengths) == [(2,) * 40, (17,) * 15]
    assert all(plan.num_sampled == plan.lengths for plan in plans[1:3])


def test_rehearsal_leaves_no_trace(checkpoints: CheckpointFactory, recorder: FakeRecorder) -> None:
    """Neither penalties nor logprobs of the rehearsed requests are left in the rows."""
    with new_engine(checkpoints("mistral"), max_num_seqs=4) as engine:
        assert recorder.num_recorded == 2 * len(default_sizes(4)), "once to measure, once to keep"
        sampler, everywhere = engine.runner.sampler, [range(4)] * 2
        assert not sampler._num_logprobs
        assert not any(processor.applies_to(*everywhere) for processor in sampler.processors)
        assert engine.runner.memory.activations is not None


# --- Compilation ------------------------------------------------------------------------------


def test_kernels_compiled_while_serving_are_counted(
    checkpoints: CheckpointFactory, recorder: FakeRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the rehearsal compiles is not: the watch begins before and serves after it."""

    class Watch:
        def __init__(self) -> None:
            self.late: list[str] = []
            self.serving = False

        def start_serving(self) -> None:
            self.serving = True

        def count(self, kernel: str) -> None:
            if self.serving:
                self.late.append(kernel)

    watch = Watch()
    monkeypatch.setattr(model_runner, "watch_compilation", lambda _: watch)
    launch = ModelRunner.launch

    def compile_and_launch(runner: ModelRunner, plan: StepPlan) -> PendingStep:
        watch.count(f"for {plan.num_tokens} tokens")
        return launch(runner, plan)

    monkeypatch.setattr(ModelRunner, "launch", compile_and_launch)
    with new_engine(checkpoints("qwen3")) as engine:
        assert engine.stats()["late_compilations"] == 0
        run(engine, new_requests([[5] * 7], max_tokens=2))
        assert engine.stats()["late_compilations"] == 2
        assert watch.late == ["for 7 tokens", "for 1 tokens"]
