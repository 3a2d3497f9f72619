"""The engine on a GPU says what transformers says, however its steps are run.

Without a GPU this is a rehearsal on the CPU with the GPU's ops, see `tests.gpu.device`.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from engine.config import EngineConfig
from engine.engine import Engine
from engine.quantize.write import quantize
from engine.schedule.request import Request
from engine.schedule.step import StepPlan
from kernels.cuda import linear
from kernels.types import Rounded
from tests.checkpoints import FAMILIES, VOCAB_SIZE, load_oracle, make_checkpoint
from tests.conftest import CheckpointFactory
from tests.engine.helpers import new_engine, new_requests, prompt_logits, run, tokens_of
from tests.engine.test_new_weights import move
from tests.gpu.device import DEVICE, ON_GPU, gpu_engine, needs_gpu

NUM_OUTPUT = 24 if ON_GPU else 3
LENGTHS = [1, 15, 16, 17, 200, 33, 90, 140] if ON_GPU else [1, 20]
# In chunks, beside tokens that are decoded.
SMALL = dict(max_num_seqs=8, max_num_batched_tokens=64, max_model_len=256, num_blocks=128)
if not ON_GPU:
    SMALL |= dict(max_num_seqs=2, max_num_batched_tokens=12)


def random_prompts(lengths: list[int], vocab_size: int = VOCAB_SIZE) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(3, vocab_size) for _ in range(length)] for length in lengths]


PROMPTS = random_prompts(LENGTHS)


def text(directory: Path, engine: Any = gpu_engine, **config: Any) -> list[list[int]]:
    """What the engine makes of the prompts, greedily; `sampling` are other parameters."""
    sampling = dict(max_tokens=NUM_OUTPUT, ignore_eos=True) | config.pop("sampling", {})
    with engine(directory, **SMALL | config) as made:
        return tokens_of(run(made, new_requests(PROMPTS, **sampling)))


@torch.inference_mode()
def worst_lag(
    directory: Path, prompts: list[list[int]], outputs: list[list[int]], dtype: torch.dtype
) -> float:
    """How far a token of the outputs lags behind the best one by transformers.

    In units of the standard deviation of the logits; 0 if all are the best.
    """
    oracle = load_oracle(directory, dtype).to(DEVICE)
    worst = 0.0
    for prompt, output in zip(prompts, outputs, strict=True):
        logits = oracle(torch.tensor([prompt + output], device=DEVICE)).logits[0].float()
        logits = logits[len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(output, device=DEVICE).unsqueeze(1)).squeeze(1)
        worst = max(worst, float(((logits.amax(1) - chosen) / logits.std(1)).max()))
    return worst


@pytest.mark.parametrize("family", FAMILIES if ON_GPU else ["mistral"])
def test_greedy_in_float32(checkpoints: CheckpointFactory, family: str) -> None:
    directory = checkpoints(family)
    assert worst_lag(directory, PROMPTS, text(directory), torch.float32) < 1e-4


@pytest.mark.parametrize("family", FAMILIES if ON_GPU else ["qwen3"])
def test_greedy_in_bfloat16(checkpoints: CheckpointFactory, family: str) -> None:
    directory = checkpoints(family)
    outputs = text(directory, dtype="bfloat16")
    assert worst_lag(directory, PROMPTS, outputs, torch.bfloat16) < 0.1


@needs_gpu
def test_greedy_at_the_size_of_a_real_model(tmp_path: Path) -> None:
    """Four layers as wide as Qwen3-0.6B's, with its vocabulary."""
    directory = make_checkpoint(
        tmp_path / "wide",
        "qwen3",
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=4096,
        initializer_range=0.05,
    )
    prompts = random_prompts([1, 500, 2047, 33, 1024, 129], 151_936)
    for config in ({}, {"block_size": 128}, {"block_size": 256}, {"attention_backend": "triton"}):
        sizes = dict(max_num_batched_tokens=1024, max_model_len=4096, num_blocks=600)
        with gpu_engine(directory, dtype="bfloat16", **sizes | config) as engine:
            requests = new_requests(prompts, max_tokens=40, ignore_eos=True)
            outputs = tokens_of(run(engine, requests))
        assert worst_lag(directory, prompts, outputs, torch.bfloat16) < 0.1


@pytest.mark.parametrize(
    "sampling",
    [pytest.param({}, marks=needs_gpu), dict(temperature=0.8, top_p=0.95)],
    ids=["greedy", "drawn"],
)
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(dict(enforce_eager=True), marks=needs_gpu),
        dict(cuda_graph_sizes=[3]),
        pytest.param(dict(async_scheduling=False), marks=needs_gpu),
        pytest.param(dict(attention_backend="triton"), marks=needs_gpu),
        pytest.param(dict(num_blocks=20), marks=needs_gpu),  # rows are preempted
        pytest.param(dict(block_size=64), marks=needs_gpu),
    ],
    ids=lambda change: " ".join(f"{name}={value}" for name, value in change.items()),
)
def test_same_text_however_it_is_run(
    checkpoints: CheckpointFactory, change: dict[str, Any], sampling: dict[str, Any]
) -> None:
    """Graphs or not, overlapped or not, and so on: one seed, one text."""
    directory = checkpoints("qwen3")
    assert text(directory, sampling=sampling, **change) == text(directory, sampling=sampling)


@pytest.mark.parametrize(
    "sampling",
    [
        dict(temperature=0.8, top_k=40, top_p=0.9, min_p=0.02),
        dict(
            repetition_penalty=1.3,
            frequency_penalty=0.5,
            presence_penalty=0.2,
            allowed_token_ids=list(range(0, VOCAB_SIZE, 3)),
            logit_bias={6: 3.0},
        ),
    ],
    ids=lambda sampling: next(iter(sampling)),
)
def test_same_text_as_on_a_cpu(checkpoints: CheckpointFactory, sampling: dict[str, Any]) -> None:
    """By the same seeds; where rounding may decide, in one text of eight."""
    directory = checkpoints("llama3")
    ours = text(directory, sampling=sampling)
    expected = text(directory, engine=new_engine, sampling=sampling)
    differing = sum(a != b for a, b in zip(ours, expected, strict=True))
    assert differing <= len(PROMPTS) // 8


def test_cache_of_8_bits(checkpoints: CheckpointFactory) -> None:
    """As on a CPU, where it is rounded by the same rule; not as without."""
    directory = checkpoints("qwen2")
    ours = text(directory, kv_cache_dtype="fp8")
    expected = text(directory, engine=new_engine, kv_cache_dtype="fp8")
    assert sum(a != b for a, b in zip(ours, expected, strict=True)) <= len(PROMPTS) // 4
    assert worst_lag(directory, PROMPTS, ours, torch.float32) < 1.0


@needs_gpu
@pytest.mark.parametrize("format", ["int4", "fp8"])
def test_weights_of_fewer_bits(tmp_path: Path, format: str) -> None:
    """Not the same tokens as with all of them, but none that is far from the best."""
    sizes = dict(hidden_size=128, intermediate_size=256, num_attention_heads=4, head_dim=32)
    directory = make_checkpoint(tmp_path / "model", "qwen3", **sizes)
    outputs = text(directory, dtype="bfloat16", quantization=format)
    assert worst_lag(directory, PROMPTS, outputs, torch.bfloat16) < 1.5


def test_weights_of_few_bits_stay_as_they_are_stored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """None is widened, and what comes out is what their values give, but for rounding."""
    sizes = dict(hidden_size=128, intermediate_size=256, num_attention_heads=4, head_dim=32)
    plain = make_checkpoint(tmp_path / "plain", "qwen3", num_hidden_layers=2, **sizes)
    quantize(plain, tmp_path / "stored", "W4A16", group=64)
    with gpu_engine(tmp_path / "stored", **SMALL | dict(dtype="bfloat16")) as engine:
        assert "no kernel multiplies" not in caplog.text
        ours = prompt_logits(engine.runner, [5, 6, 7], [0]).float().cpu()
    with new_engine(tmp_path / "stored", dtype="float32") as engine:
        exact = prompt_logits(engine.runner, [5, 6, 7], [0])
    torch.testing.assert_close(ours, exact, rtol=0.02, atol=0.03 * float(exact.std()))


def test_what_norms_round_is_what_products_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same logits; attention's output alone is rounded by a kernel of its own."""
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    directory = make_checkpoint(tmp_path / "model", "qwen3", **sizes)
    num_rounded, round_rows = [0], linear.round_rows

    def counted(x: Tensor) -> Rounded:
        num_rounded[0] += 1
        return round_rows(x)

    def multiply(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, **_: Any) -> Tensor:
        return ((a.float() * scale_a) @ (b.float() * scale_b)).bfloat16()

    monkeypatch.setattr(linear, "round_rows", counted)
    if not ON_GPU:
        monkeypatch.setattr(torch, "_scaled_mm", multiply)
        monkeypatch.setattr(EngineConfig, "check_device", lambda *_: None)
    results = []
    for takes_rounded in (True, False):
        monkeypatch.setattr(linear.LinearFp8, "takes_rounded", takes_rounded)
        num_rounded[0] = 0
        config = dict(dtype="bfloat16", quantization="fp8", enforce_eager=True)
        with gpu_engine(directory, **SMALL | config) as engine:
            results.append((prompt_logits(engine.runner, [5, 6, 7], [0]), num_rounded[0]))
    assert [count for _, count in results] == [1 + 2, 4 * 2]
    assert torch.equal(results[0][0], results[1][0])


@needs_gpu
@pytest.mark.parametrize("eager", [False, True])
def test_nothing_is_compiled_while_requests_wait(
    checkpoints: CheckpointFactory, eager: bool
) -> None:
    with gpu_engine(checkpoints("qwen3"), enforce_eager=eager, **SMALL) as engine:
        for lengths in ([1], [200, 3], [17, 16, 15, 130, 1]):
            for sampling in ({}, dict(temperature=1.0, allowed_token_ids=[5, 6, 7])):
                prompts = random_prompts(lengths)
                run(engine, new_requests(prompts, max_tokens=5, ignore_eos=True, **sampling))
        assert engine.runner.late_compilations == []


def test_other_weights_are_computed_with_in_recorded_steps_too(
    checkpoints: CheckpointFactory, edited: Callable[..., Path]
) -> None:
    first, other = checkpoints("qwen3"), edited("qwen3", tensors=move)

    def said(engine: Engine) -> list[list[int]]:
        prompts = PROMPTS if ON_GPU else PROMPTS[:1]
        return tokens_of(run(engine, new_requests(prompts, max_tokens=NUM_OUTPUT)))

    with gpu_engine(other, **SMALL) as engine:
        wanted = said(engine)
    with gpu_engine(first, **SMALL) as engine:
        in_use = torch.cuda.memory_allocated() if ON_GPU else 0
        engine.update_weights_from_disk(str(other))
        assert said(engine) == wanted
        if ON_GPU:
            assert torch.cuda.memory_allocated() < in_use + (1 << 20), "the old ones are gone"


def test_evicted_blocks_come_back_from_host_memory(checkpoints: CheckpointFactory) -> None:
    """In a pool that holds one of the prompts, over streams of their own on a GPU."""
    lengths = [150, 180, 200] if ON_GPU else [20, 40]
    first, *others = random_prompts(lengths)
    sizes = SMALL | dict(num_blocks=-(-(lengths[-1] + NUM_OUTPUT) // 16))
    with gpu_engine(checkpoints("qwen3"), host_cache_memory_bytes=1 << 24, **sizes) as engine:
        outputs = []
        for prompt in (first, *others, first):
            requests = new_requests([prompt], max_tokens=NUM_OUTPUT, ignore_eos=True)
            outputs += tokens_of(run(engine, requests))
        assert engine.stats()["restored_tokens"] == (len(first) - 1) // 16 * 16
    assert outputs[-1] == outputs[0]


def test_deterministic_logits_do_not_depend_on_the_batch(checkpoints: CheckpointFactory) -> None:
    """By no bit: alone, beside others, in chunks, from cached blocks, resumed, replayed."""
    prompt, *others = random_prompts([200, 90, 33, 140] if ON_GPU else [18, 3])
    seen: dict[int, list[Tensor]] = {}

    def run_all(engine: Engine, requests: list[Request]) -> None:
        sampler = engine.runner.sampler
        take = sampler.logits

        def keep(plan: StepPlan, hidden: Tensor) -> Tensor:
            logits = take(plan, hidden)
            sampling = [row for row in plan.scheduled if row.num_sampled]
            first = engine.scheduler.sequences.get("0")
            for row, own in zip(sampling, logits, strict=True):
                if first is not None and row.row == first.row:
                    seen.setdefault(row.end, []).append(own.clone())
            return logits

        sampler.logits = keep
        run(engine, requests)
        sampler.logits = take

    params = dict(max_tokens=NUM_OUTPUT, ignore_eos=True)
    options = dict(dtype="bfloat16", deterministic=True, speculation="off") | SMALL
    directory = checkpoints("qwen3", num_hidden_layers=3 if ON_GPU else 1)
    with gpu_engine(directory, **options, cuda_graph_sizes=[2]) as engine:
        run_all(engine, new_requests([prompt], **params))
        run_all(engine, new_requests([prompt, *others], **params))  # and of cached blocks
    with gpu_engine(directory, **options | dict(max_num_batched_tokens=9)) as engine:
        (resumed,) = new_requests([prompt], **params)
        text = [int(seen[position][0].argmax()) for position in sorted(seen)]
        resumed.output_token_ids = text[: NUM_OUTPUT // 2]  # as the front brings it
        run_all(engine, [resumed])
    for position, logits in seen.items():
        assert all(torch.equal(logits[0], other) for other in logits[1:]), position
    assert min(map(len, seen.values())) >= 2 and max(map(len, seen.values())) == 3
