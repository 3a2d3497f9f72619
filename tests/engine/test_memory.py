"""How large the KV cache becomes, and what start-up says about it."""

import mmap
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from engine import LLM
from engine.config import EngineConfig
from engine.device import memory
from engine.device.memory import DeviceMemory, MemoryMeter, MemoryUse
from engine.models.shared import RestingModel
from tests.conftest import CheckpointFactory
from tests.engine.helpers import BLOCK_SIZE, new_engine, new_requests, run

GIB = 1 << 30
# Of the tiny models: 3 layers, 2 heads of keys and values each, of dimension 32, in fp32.
BLOCK_BYTES = 3 * 2 * 2 * 32 * 4 * BLOCK_SIZE


@pytest.mark.parametrize(
    "free, utilization, own, budget",
    [
        (140, None, 20, 126 - 20),  # 90 % of all, less what we take ourselves
        (140, 0.5, 20, 70 - 20),
        (100, 0.5, 20, 70 - 20),  # what others hold does not matter as long as our share is free
        (60, 0.5, 20, 60 - 20),  # they hold more: take what they leave
        (60, 0.5, 80, 0),
    ],
)
def test_a_gpu_is_shared_by_what_we_take_ourselves(
    free: int, utilization: float | None, own: int, budget: int
) -> None:
    device = DeviceMemory(140 * GIB, free * GIB, is_host=False)
    assert device.kv_cache_budget(own * GIB, utilization) == budget * GIB
    assert device.left(own * GIB, budget * GIB) == max(free - own - budget, 0) * GIB


def test_a_host_is_shared_with_everybody() -> None:
    host = DeviceMemory(64 * GIB, 20 * GIB, is_host=True)
    assert host.kv_cache_budget(0, None) == 10 * GIB
    assert host.kv_cache_budget(6 * GIB, None) == 7 * GIB
    assert host.left(6 * GIB, 7 * GIB) == 7 * GIB


@pytest.mark.parametrize(
    "config, num_blocks",
    [
        (dict(num_blocks=7), 7),
        (dict(kv_cache_memory_bytes=9 * BLOCK_BYTES + 1), 9),
        # Half of a free GiB would do for thousands, but two rows never fill more.
        (dict(max_num_seqs=2, max_model_len=100), 2 * 7),
    ],
)
def test_size_of_the_pool(
    checkpoints: CheckpointFactory,
    monkeypatch: pytest.MonkeyPatch,
    config: dict[str, Any],
    num_blocks: int,
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: GIB)
    with new_engine(checkpoints("qwen3"), **dict(num_blocks=None) | config) as engine:
        assert engine.limits.num_blocks == engine.scheduler.pool.num_blocks == num_blocks
        use = engine.runner.memory
        assert use.kv_cache == num_blocks * BLOCK_BYTES
        caches = engine.runner.forward_pass.kv_caches
        assert sum(part.nbytes for cache in caches for part in cache.tensors) == use.kv_cache
        assert use.left == GIB - use.kv_cache
        assert use.weights >= 0 and use.activations is None


@pytest.mark.parametrize("config", [dict(), dict(kv_cache_memory_bytes=BLOCK_BYTES - 1)])
def test_too_little_memory_is_an_error_that_says_what_to_do(
    checkpoints: CheckpointFactory, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any]
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: BLOCK_BYTES)
    with (
        pytest.raises(MemoryError, match=f"takes {BLOCK_BYTES}; free some"),
        new_engine(checkpoints("qwen3"), num_blocks=None, **config),
    ):
        pass


def test_one_setting_says_how_large_it_is() -> None:
    with pytest.raises(ValidationError, match="num_blocks and kv_cache_memory_bytes"):
        EngineConfig(model="m", num_blocks=5, kv_cache_memory_bytes=10**9)


def test_startup_says_what_went_where(
    checkpoints: CheckpointFactory, capfd: pytest.CaptureFixture[str]
) -> None:
    LLM(str(checkpoints("qwen3")), num_blocks=50, num_threads=1, device="cpu", load_format="dummy")
    said = capfd.readouterr().err
    assert "50 KV cache blocks of torch.float32 on cpu; weights " in said
    assert f"KV cache {50 * 2 * 3 * 2 * 32 * 32 * 4 / (1 << 20):.1f} MiB" in said
    assert "left for activations and others" in said
    assert "kernels; dtype=auto is the checkpoint's float32\n" in said


def test_a_report_names_each_part() -> None:
    use = MemoryUse(16 * GIB, 100 << 20, 2 * GIB, 300 << 20, 100 * GIB, 8 * GIB, 20 * GIB)
    assert str(use) == (
        "weights 16.00 GiB, activations 2.00 GiB, CUDA graphs 300.0 MiB, other 100.0 MiB, "
        "KV cache 100.00 GiB, host cache 8.00 GiB, left 20.00 GiB"
    )


@pytest.mark.parametrize("kind", [mmap.MAP_PRIVATE, mmap.MAP_SHARED])
def test_a_host_process_is_measured_by_the_memory_it_holds(kind: int) -> None:
    """Its own, and what it shares, such as weights that a node keeps."""
    meter, size = MemoryMeter(torch.device("cpu")), 64 << 20
    before = meter.in_use()
    with mmap.mmap(-1, size, flags=kind | mmap.MAP_ANONYMOUS) as held:
        for page in range(0, size, mmap.PAGESIZE):
            held[page] = 1
        growth = meter.in_use() - before
    assert abs(growth - size) < 16 << 20


def test_pages_of_files_are_not_what_a_process_holds() -> None:
    """The system can drop them at any time."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    meter, size = MemoryMeter(torch.device("cpu")), 64 << 20
    before = meter.in_use()
    with (
        library.open("rb") as file,
        mmap.mmap(file.fileno(), size, mmap.MAP_SHARED, mmap.PROT_READ) as held,
    ):
        assert sum(held[page] for page in range(0, size, mmap.PAGESIZE))
        growth = meter.in_use() - before
    assert abs(growth) < 16 << 20


def test_an_engine_that_sleeps_has_no_kv_cache(checkpoints: CheckpointFactory) -> None:
    """And answers the same afterwards, having forgotten what was cached."""
    prompts = [list(range(3, 60))]
    with new_engine(checkpoints("qwen3"), enable_sleep_mode=True) as engine:
        said = run(engine, new_requests(prompts))
        assert run(engine, new_requests(prompts))[0].num_cached_tokens > 0
        engine.sleep()
        engine.sleep()
        assert engine.runner.forward_pass.kv_caches == []
        with pytest.raises(ValueError, match="asleep"):
            engine.add(new_requests(prompts)[0])
        engine.wake_up()
        assert run(engine, new_requests(prompts)) == said  # num_cached_tokens is 0 as well


def test_an_engine_at_work_does_not_sleep(checkpoints: CheckpointFactory) -> None:
    with new_engine(checkpoints("qwen3"), enable_sleep_mode=True) as engine:
        engine.add(new_requests([[5, 6, 7]])[0])
        with pytest.raises(ValueError, match="has requests"):
            engine.sleep()
    with (
        new_engine(checkpoints("qwen3")) as engine,
        pytest.raises(ValueError, match="enable_sleep_mode"),
    ):
        engine.sleep()


def test_weights_that_rest_come_back_to_where_they_were() -> None:
    """Also those that are two views of one storage, and one in two places."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    both = torch.randn(16, 8)
    model[0].weight.data, model[1].weight.data = both[:8], both[8:].T
    model[0].again = model[1].weight
    x = torch.randn(2, 8)
    expected = model(x)
    resting = RestingModel(model, {})
    assert all(parameter.numel() == 0 for parameter in model.parameters())
    resting.return_to(torch.device("cpu"))
    assert torch.equal(model(x), expected) and model[0].again is model[1].weight
    storages = {p.untyped_storage().data_ptr() for p in (model[0].weight, model[1].weight)}
    assert len(storages) == 1
