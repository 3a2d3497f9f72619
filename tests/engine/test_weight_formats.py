"""A format of weights is a file and a line; here one of 8 bits whose scales lie beside them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.checkpoint.files import CheckpointError
from engine.models import weights
from engine.models.blocks.linear import BuildContext
from engine.models.decoder import CausalLM
from engine.models.registry import read_config
from engine.models.weight_loader import load_weights
from engine.models.weights.format import StoredTensor
from engine.ranks.rank_group import RankGroup
from kernels import Ops, select_ops
from kernels.types import Linear
from tests.conftest import CheckpointFactory
from tests.engine.helpers import new_engine, new_requests, run, tokens_of
from tests.engine.oracle import random_prompts

GROUP = 16  # inputs that share a scale


class ScaledBytes:
    """weight [in, out] int8: outputs lie along dimension 1; scales [in / 16, out] float32."""

    def tensors(self, out_features: int, in_features: int) -> Sequence[StoredTensor]:
        scales = (in_features // GROUP, out_features)
        return [
            StoredTensor("qweight", (in_features, out_features), torch.int8, out_dim=1, in_dim=0),
            StoredTensor("scales", scales, torch.float32, 1, 0, ins_per_entry=GROUP),
        ]

    def pack(
        self, ops: Ops, tensors: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype
    ) -> Linear:
        scales = tensors["scales"].repeat_interleave(GROUP, 0)
        weight = (tensors["qweight"] * scales).to(dtype).T.contiguous()
        return ops.pack_linear(weight, bias, None)


@pytest.fixture
def both(
    checkpoints: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, Path]:
    """A checkpoint in this format, and a plain one of the same values."""
    monkeypatch.setitem(weights.FORMATS, "scaled-bytes", lambda _: ScaledBytes())
    source = checkpoints("llama3")
    hf = json.loads((source / "config.json").read_text())
    stored: dict[str, Tensor] = {}
    plain = load_file(source / "model.safetensors")
    for name, tensor in list(plain.items()):
        if not name.endswith("_proj.weight"):
            stored[name] = tensor
            continue
        groups = tensor.T.contiguous().view(-1, GROUP, tensor.shape[0])
        scales = groups.abs().amax(1) / 127
        quantized = (groups / scales.unsqueeze(1)).round().contiguous()
        prefix = name.removesuffix(".weight")
        stored[f"{prefix}.qweight"] = quantized.reshape(-1, tensor.shape[0]).to(torch.int8)
        stored[f"{prefix}.scales"] = scales.contiguous()
        plain[name] = (quantized * scales.unsqueeze(1)).reshape(-1, tensor.shape[0]).T.contiguous()
    made = []
    for kind, tensors, more in (
        ("stored", stored, {"quantization_config": {"quant_method": "scaled-bytes"}}),
        ("plain", plain, {}),
    ):
        directory = tmp_path / kind
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(hf | more))
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        made.append(directory)
    return made[0], made[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_text_is_that_of_the_values_it_stands_for(both: tuple[Path, Path], dtype: str) -> None:
    texts = []
    for directory in both:
        with new_engine(directory, dtype=dtype) as engine:
            outputs = run(engine, new_requests(random_prompts(16, 60), ignore_eos=True))
            texts.append(tokens_of(outputs))
    assert texts[0] == texts[1]


def test_dummy_weights_are_of_its_types(both: tuple[Path, Path]) -> None:
    with new_engine(both[0], load_format="dummy") as engine:
        assert len(run(engine, new_requests([[5, 6, 7]]))) == 1


@pytest.mark.parametrize("size", [1, 2])
def test_each_rank_holds_its_part(both: tuple[Path, Path], size: int) -> None:
    """Of every fused map, cut along dimension 1, and of the inputs with the scales they need."""
    for rank in range(size):
        models = []
        for directory, kind in zip(both, (ScaledBytes(), weights.PlainWeights()), strict=True):
            config, ops = read_config(directory), select_ops(torch.device("cpu"))
            parallel = RankGroup(rank, size)
            context = BuildContext(config.hidden_size, config.rms_eps, ops, parallel, kind)
            model = CausalLM(config, 64, context)
            load_weights(model, directory, show_progress=False, filled=lambda m, o=ops: m.pack(o))
            models.append(model.model.layers[0])
        x = torch.randn(3, 64)
        inner, heads = torch.randn(3, 96 // size), torch.randn(3, 64 // size)
        for name, argument in (
            ("self_attn.qkv_proj", x),
            ("mlp.gate_up_proj", x),
            ("mlp.down_proj", inner),
            ("self_attn.o_proj", heads),
        ):
            ours, theirs = (layer.get_submodule(name)._linear(argument) for layer in models)
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_a_tensor_of_another_type_is_refused(both: tuple[Path, Path]) -> None:
    path = both[0] / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.qweight"
    save_file(tensors | {name: tensors[name].float()}, path, {"format": "pt"})
    message = rf"{name} is torch.float32, not torch.int8"
    with pytest.raises(CheckpointError, match=message), new_engine(both[0]):
        pass


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "unheard-of"}, "quantization_config=.*unheard-of.* is not supported"),
        ({"bits": 4}, "quantization_config=.*is not supported"),
    ],
)
def test_a_format_that_is_not_there_is_refused_by_name(
    both: tuple[Path, Path], config: dict[str, Any], message: str
) -> None:
    path = both[1] / "config.json"
    hf = json.loads(path.read_text())
    path.write_text(json.dumps(hf | {"quantization_config": config}))
    with pytest.raises(CheckpointError, match=message):
        read_config(both[1])
