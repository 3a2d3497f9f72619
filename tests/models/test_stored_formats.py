"""Checkpoints with weights of fewer bits give the text of the values that they stand for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.checkpoint.files import CheckpointError
from engine.models.blocks.linear import Source
from engine.models.config import ModelConfig
from engine.models.reader import open_tensors
from engine.models.registry import read_config
from engine.models.rewrite import Rewrite, Rewrites, RewrittenReader
from engine.models.weights.dequantize import scaled
from engine.models.weights.stored import stored_format
from tests.conftest import CheckpointFactory
from tests.engine.helpers import new_engine, new_requests, prompt_logits, run, tokens_of
from tests.engine.oracle import random_prompts

Stored = tuple[dict[str, Tensor], Tensor]  # what is stored of a weight, and what it stands for
GROUP = 32


def by_compressed_tensors(weight: Tensor, format: str, **arguments: Any) -> Stored:
    """Of the library that defines the format."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments))
    args = scheme.weights
    groups = weight.unflatten(-1, (-1, args.group_size or weight.shape[1]))
    low, high = groups.amin(-1), groups.amax(-1)
    if args.strategy == "tensor":
        low, high = low.min().reshape(1), high.max().reshape(1)
    if args.strategy == "block":
        rows, columns = args.block_structure
        blocks = weight.unflatten(0, (-1, rows)).unflatten(-1, (-1, columns))
        low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    scale, zero = calculate_qparams(low, high, args)
    compressor = compressors.BaseCompressor.get_value_from_registry(format)
    parts = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    stored = compressor.compress(dict(parts), scheme)
    value = compressor.decompress(dict(stored), scheme)["weight"]
    return {name: tensor.contiguous() for name, tensor in stored.items()}, value.float()


def int_args(bits: int, **more: Any) -> dict[str, Any]:
    return dict(num_bits=bits, type="int") | more


def packed(values: Tensor, bits: int, order: list[int] | None = None) -> Tensor:
    """[rows, n] in int32 words [rows, n * bits / 32]; value order[i] of each word at place i."""
    words = values.long().unflatten(1, (-1, 32 // bits))
    if order is not None:
        words = words[:, :, order]
    total = (words << torch.arange(0, 32, bits)).sum(-1)
    return torch.where(total >= 2**31, total - 2**32, total).to(torch.int32)


def gptq(weight: Tensor, version: str = "gptq", act_order: bool = False) -> Stored:
    """As AutoGPTQ packs it: zeros less one in its first version, and groups of any inputs."""
    groups = torch.arange(weight.shape[1]) // GROUP
    if act_order:
        groups = groups[torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(0))]
    scales = torch.rand(weight.shape[0], groups.max() + 1) * 0.05 + 0.02
    zeros = torch.randint(1, 15, scales.shape)
    levels = (weight / scales[:, groups] + zeros[:, groups]).round().clamp(0, 15)
    stored_zeros = zeros - 1 if version == "gptq" else zeros
    return {
        "qweight": packed(levels, 4).T.contiguous(),
        "qzeros": packed(stored_zeros.T, 4),
        "scales": scales.T.contiguous(),
        "g_idx": groups.to(torch.int32),
    }, (levels - zeros[:, groups]) * scales[:, groups]


def awq(weight: Tensor) -> Stored:
    """As AutoAWQ's gemm packs it."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    scales = torch.rand(weight.shape[0], weight.shape[1] // GROUP) * 0.05 + 0.02
    zeros = torch.randint(0, 15, scales.shape)
    scale, zero = (x.repeat_interleave(GROUP, 1) for x in (scales, zeros))
    levels = (weight / scale + zero).round().clamp(0, 15)
    return {
        "qweight": packed(levels.T, 4, order),
        "qzeros": packed(zeros.T, 4, order),
        "scales": scales.T.contiguous(),
    }, (levels - zero) * scale


def fp8_blocks(weight: Tensor) -> Stored:
    """As DeepSeek and Qwen store it: the last blocks may be cut off."""
    size, (rows, columns) = 48, weight.shape
    scale = torch.rand(-(-rows // size), -(-columns // size)) * 0.01 + 0.001
    spread = scale.repeat_interleave(size, 0).repeat_interleave(size, 1)[:rows, :columns]
    stored = (weight / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {"weight": stored, "weight_scale_inv": scale}, stored.float() * spread


def by_bitsandbytes(weight: Tensor, **arguments: Any) -> Stored:
    """Of the library that defines the format; LLM.int8 without arguments."""
    functional = pytest.importorskip("bitsandbytes").functional
    if not arguments:
        stored, largest, _ = functional.int8_vectorwise_quant(weight.half())
        parts = {"weight": stored, "SCB": largest, "weight_format": torch.tensor(0).byte()}
        return parts, functional.int8_vectorwise_dequant(stored, largest)
    stored, state = functional.quantize_4bit(weight, **arguments)
    beside = {f"weight.{what}": part for what, part in state.as_dict(packed=True).items()}
    return {"weight": stored} | beside, functional.dequantize_4bit(stored, state)


def compressed(format: str, **arguments: Any) -> tuple[dict[str, Any], Callable[[Tensor], Stored]]:
    groups = {"group_0": {"targets": ["Linear"], "weights": arguments}}
    config = dict(quant_method="compressed-tensors", format=format, config_groups=groups)
    return config, lambda weight: by_compressed_tensors(weight, format, **arguments)


BITSANDBYTES = dict(quant_method="bitsandbytes")
GPTQ = dict(quant_method="gptq", bits=4, group_size=GROUP)
FORMATS: dict[str, tuple[dict[str, Any], Callable[[Tensor], Stored]]] = {
    "int8, by channel": compressed("int-quantized", **int_args(8, strategy="channel")),
    "int4, in groups": compressed(
        "pack-quantized", **int_args(4, strategy="group", group_size=GROUP)
    ),
    "int4, in groups with zero points": compressed(
        "pack-quantized", **int_args(4, strategy="group", group_size=GROUP, symmetric=False)
    ),
    "int8, packed": compressed("pack-quantized", **int_args(8, strategy="channel")),
    "fp8, by tensor": compressed("float-quantized", num_bits=8, type="float", strategy="tensor"),
    "fp8, by channel": compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
    "fp8, in blocks": compressed(
        "float-quantized", num_bits=8, type="float", strategy="block", block_structure=[16, 32]
    ),
    "fp8 of DeepSeek": (dict(quant_method="fp8", weight_block_size=[48, 48]), fp8_blocks),
    "gptq": (GPTQ, gptq),
    "gptq v2": (GPTQ | dict(checkpoint_format="gptq_v2"), lambda w: gptq(w, "gptq_v2")),
    "gptq, by activations": (GPTQ | dict(desc_act=True), lambda w: gptq(w, act_order=True)),
    "awq": (dict(quant_method="awq", bits=4, version="gemm", group_size=GROUP), awq),
    "bitsandbytes, int8": (BITSANDBYTES, by_bitsandbytes),
    "bitsandbytes, nf4": (BITSANDBYTES, lambda w: by_bitsandbytes(w, quant_type="nf4")),
    "bitsandbytes, fp4 with nested scales": (
        BITSANDBYTES,
        lambda w: by_bitsandbytes(w, quant_type="fp4", compress_statistics=True),
    ),
}


@pytest.fixture
def store(checkpoints: CheckpointFactory, tmp_path: Path) -> Callable[[str, str], list[Path]]:
    """store(family, format): a checkpoint in the format, and a plain one of its values."""

    def store(family: str, name: str) -> list[Path]:
        torch.manual_seed(0)
        config, quantize = FORMATS[name]
        source = checkpoints(family)
        hf = json.loads((source / "config.json").read_text())
        plain = load_file(source / "model.safetensors")
        stored: dict[str, Tensor] = {}
        for path, tensor in list(plain.items()):
            linear = path.removesuffix(".weight")
            if not linear.endswith("_proj"):
                stored[path] = tensor
                continue
            parts, plain[path] = quantize(tensor)
            plain[path] = plain[path].contiguous()
            stored |= {f"{linear}.{what}": part for what, part in parts.items()}
            stored[f"{linear}.input_scale"] = torch.ones(1)
        made = []
        for kind, tensors, more in (
            ("stored", stored, {"quantization_config": config}),
            ("plain", plain, {}),
        ):
            made.append(tmp_path / kind)
            made[-1].mkdir()
            (made[-1] / "config.json").write_text(json.dumps(hf | more))
            save_file(tensors, made[-1] / "model.safetensors", {"format": "pt"})
        return made

    return store


def text_of(directory: Path) -> list[list[int]]:
    with new_engine(directory) as engine:
        return tokens_of(run(engine, new_requests(random_prompts(16, 60), ignore_eos=True)))


@pytest.mark.parametrize("name", FORMATS)
def test_the_text_is_that_of_the_values(store: Callable[..., list[Path]], name: str) -> None:
    stored, plain = store("llama3", name)
    assert text_of(stored) == text_of(plain)


@pytest.mark.parametrize("name", FORMATS)
def test_levels_and_scales_stand_for_the_values(name: str) -> None:
    """Where kernels multiply them as they are stored; that is said for each format."""
    torch.manual_seed(0)
    config, quantize = FORMATS[name]
    parts, values = quantize((torch.randn(48, 128) / 8).bfloat16().float())
    if "scales" in parts:  # which such checkpoints have of 16 bits
        parts["scales"] = parts["scales"].half()
        values = stored_format(config).values(parts)
    if "weight_scale" in parts:
        parts["weight_scale"] = parts["weight_scale"].bfloat16()
        values = stored_format(config).values(parts)
    weight = stored_format(config).grouped(parts)
    is_widened = ("fp8", "bitsandbytes")
    assert (weight is None) == any(part in name for part in is_widened)
    if weight is not None:
        ours = weight.rows(torch.arange(48)).values()
        in_order = values if weight.order is None else values[:, weight.order]
        torch.testing.assert_close(ours, in_order, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "format, group", [("nvfp4-pack-quantized", 16), ("mxfp4-pack-quantized", 32)]
)
def test_four_bit_floats_are_those_of_the_library(format: str, group: int) -> None:
    """Which gives them in bfloat16."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    generator = torch.Generator().manual_seed(0)
    parts = {"weight_packed": torch.randint(256, (8, 32), generator=generator, dtype=torch.uint8)}
    scales = torch.randint(110, 140, (8, 64 // group), generator=generator, dtype=torch.uint8)
    if format.startswith("nv"):
        parts["weight_scale"] = (scales.float() / 16).to(torch.float8_e4m3fn)
        parts["weight_global_scale"] = torch.tensor([37.0])
        strategy = "tensor_group"
    else:
        parts["weight_scale"] = scales
        strategy = "group"
    args = QuantizationArgs(num_bits=4, type="float", strategy=strategy, group_size=group)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = compressors.BaseCompressor.get_value_from_registry(format)
    expected = compressor.decompress(dict(parts), scheme)["weight"].float()
    torch.testing.assert_close(scaled(parts), expected, rtol=2**-7, atol=0)


def test_what_is_rewritten_as_it_is_loaded_is_not_multiplied_as_it_is_stored(
    store: Callable[..., list[Path]],
) -> None:
    """Scales can be another's times; to take a mean off needs values."""
    stored, _ = store("llama3", "int4, in groups")
    tensors = load_file(stored / "model.safetensors")
    scales = {name: scale.bfloat16() for name, scale in tensors.items() if "_scale" in name}
    save_file(tensors | scales, stored / "model.safetensors")
    for rewrite, is_stored in (
        (Rewrite(), True),
        (Rewrite(times=3.0), True),
        (Rewrite(without_mean_of=0), False),
        (Rewrite(plus=1.0), False),
    ):
        with RewrittenReader(open_tensors(stored), Rewrites({"o_proj": rewrite})) as reader:
            name = "model.layers.0.self_attn.o_proj.weight"
            rows, columns = reader.values(name).shape
            source = Source(name, (rows, columns), 0, 0, rows)
            weight = reader.stored(source)
            assert (weight is not None) == is_stored
            if weight is not None:
                values = weight.rows(torch.arange(rows)).values()
                torch.testing.assert_close(values, reader.read(source), rtol=2**-8, atol=0)


def test_inputs_come_in_the_order_of_groups_by_activations(
    store: Callable[..., list[Path]], caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is widened, and steps can be recorded; but maps of one input share an order."""
    stored, plain = store("llama3", "gptq, by activations")
    tensors = load_file(stored / "model.safetensors")
    halves = {name: part.half() for name, part in tensors.items() if name.endswith(".scales")}
    save_file(tensors | halves, stored / "model.safetensors")
    with new_engine(plain, dtype="float32") as engine:
        exact = prompt_logits(engine.runner, [5, 6, 7], [0])
    texts = []
    for is_eager in (True, False):
        with new_engine(stored, dtype="bfloat16", enforce_eager=is_eager) as engine:
            ours = prompt_logits(engine.runner, [5, 6, 7], [0])
            texts.append(tokens_of(run(engine, new_requests([[5, 6, 7]], ignore_eos=True))))
    assert torch.cosine_similarity(ours.float().flatten(), exact.flatten(), 0) > 0.99
    assert texts[0] == texts[1] and "no kernel multiplies" not in caplog.text
    name = next(name for name in tensors if name.endswith("k_proj.g_idx"))
    save_file(tensors | halves | {name: tensors[name].flip(0)}, stored / "model.safetensors")
    with new_engine(stored, dtype="bfloat16"):
        assert "no kernel multiplies" in caplog.text


def test_so_it_is_where_transformers_module_computes(store: Callable[..., list[Path]]) -> None:
    directories = store("qwen3", "int4, in groups with zero points")
    for directory in directories:  # our blocks have no such activation
        hf = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(hf | {"hidden_act": "gelu"}))
        assert not isinstance(read_config(directory), ModelConfig)
    assert text_of(directories[0]) == text_of(directories[1])


def test_what_is_quantized_is_not_quantized_again(store: Callable[..., list[Path]]) -> None:
    with (
        pytest.raises(CheckpointError, match=r"'w8a8' is for plain weights, .* is in gptq"),
        new_engine(store("llama3", "gptq")[0], quantization="w8a8"),
    ):
        pass


def test_what_no_kernel_multiplies_as_it_is_stored_is_said(
    store: Callable[..., list[Path]], caplog: pytest.LogCaptureFixture
) -> None:
    stored, _ = store("llama3", "fp8 of DeepSeek")
    with new_engine(stored, dtype="bfloat16"):
        pass
    assert "stored with bits that no kernel multiplies here; as torch.bfloat16" in caplog.text
