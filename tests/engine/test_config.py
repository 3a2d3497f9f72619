"""What is left open is decided by the device, the same on every rank."""

import re
from typing import Any

import pytest
from pydantic import ValidationError

from engine.config import EngineConfig

GB = 10**9


@pytest.mark.parametrize(
    "device, memory, given, size",
    [
        ("cpu", 500 * GB, {}, (64, 2048)),
        ("cuda", 24 * GB, {}, (256, 2048)),
        ("cuda", 80 * GB, {}, (1024, 8192)),
        ("cuda", 80 * GB, dict(max_num_batched_tokens=512), (512, 512)),
        ("cuda", 24 * GB, dict(max_num_seqs=4000), (4000, 4000)),
        ("cuda", 80 * GB, dict(max_num_seqs=8, max_num_batched_tokens=100), (8, 100)),
        ("cpu", 500 * GB, dict(max_num_batched_tokens=16), (16, 16)),
    ],
)
def test_the_size_of_a_step(
    device: str, memory: int, given: dict[str, Any], size: tuple[int, int]
) -> None:
    config = EngineConfig(model="m", **given)
    decided = config.on_device(device, memory)
    assert decided.step_size == size
    assert (decided.max_num_seqs, decided.max_num_batched_tokens) == size
    assert decided.block_key == config.block_key


def test_an_open_size_is_a_cpus_until_there_is_a_device() -> None:
    assert EngineConfig(model="m").step_size == (64, 2048)


@pytest.mark.parametrize(
    "given, said",
    [
        (dict(attention_backend="flash-attn-4"), "attention_backend: 'flash-attn-4' is not"),
        (dict(quantization="int4"), "quantization: 'int4' is not deterministic"),
        (dict(tensor_parallel_size=2), "deterministic: ranks add up in an order of their own"),
    ],
)
def test_what_is_not_deterministic_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        EngineConfig(model="m", deterministic=True, **given)
    with pytest.raises(ValueError, match="deterministic: True is for GPUs only"):
        EngineConfig(model="m", deterministic=True).on_device("cpu", 500 * GB)


@pytest.mark.parametrize(
    "device, format, is_refused",
    [("cpu", "fp8", True), ("cpu", "int4", False), ("cuda", "w8a8", True), ("cuda", "fp8", False)],
)
def test_formats_of_weights_that_a_device_has(device: str, format: Any, is_refused: bool) -> None:
    config = EngineConfig(model="m", quantization=format)
    if is_refused:
        with pytest.raises(ValueError, match=f"quantization: '{format}' is for .PUs only"):
            config.on_device(device, 80 * GB)
    else:
        assert config.on_device(device, 80 * GB).quantization == format


def test_steps_with_prompts_are_recorded_on_a_gpu_alone() -> None:
    config = EngineConfig(model="m")
    assert config.on_device("cpu", 80 * GB).cuda_graph_max_tokens is None
    assert config.on_device("cuda", 80 * GB).cuda_graph_max_tokens == 2048
    none = EngineConfig(model="m", cuda_graph_max_tokens=0)
    assert none.on_device("cuda", 80 * GB).cuda_graph_max_tokens == 0
    with pytest.raises(ValidationError, match="cuda_graph_max_tokens: enforce_eager means no"):
        EngineConfig(model="m", enforce_eager=True, cuda_graph_max_tokens=64)


@pytest.mark.parametrize(
    "name, text, value, wrong, said",
    [
        ("cuda_graph_sizes", "[1, 4]", [1, 4], "1 4", "should be a JSON list, such as [1, 2, 4]"),
        ("hf_overrides", '{"a": [1]}', {"a": [1]}, "a=1", "should be a JSON object"),
    ],
)
def test_lists_and_objects_are_json_on_a_command_line(
    name: str, text: str, value: Any, wrong: str, said: str
) -> None:
    given = EngineConfig.model_validate({"model": "m", name: text})
    assert getattr(given, name) == value
    with pytest.raises(ValidationError, match=re.escape(said)):
        EngineConfig.model_validate({"model": "m", name: wrong})
