"""A GGUF file is a checkpoint: its values, its configuration, its tokenizer and its template."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine import LLM, SamplingParams
from engine.checkpoint.files import CheckpointError
from engine.checkpoint.source import resolve
from engine.models.gguf.convert import convert
from engine.models.gguf.file import GgufFile, StoredTensor
from engine.models.gguf.levels import KINDS, grouped_weight
from kernels.cpu.linear import LinearPacker
from kernels.grouped import StoredWeight
from kernels.quantization import quantize_int4
from tests.conftest import CheckpointFactory
from tests.engine.helpers import new_engine, new_requests, run, tokens_of
from tests.engine.oracle import random_prompts
from tests.engine.small_tokenizer import byte_level

NAMES = {
    "embed_tokens": "token_embd",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "lm_head": "output",
}
TEMPLATE = "{% for m in messages %}<bos>{{ m['content'] }}<eos>{% endfor %}"


def gguf_name(name: str) -> str:
    stem, kind = name.removeprefix("model.").rsplit(".", 1)
    if stem == "norm":
        return f"output_norm.{kind}"
    if stem.startswith("layers."):
        _, layer, part = stem.split(".", 2)
        return f"blk.{layer}.{NAMES[part]}.{kind}"
    return f"{NAMES[stem]}.{kind}"


def rotary_rows_side_by_side(weight: Tensor, heads: int) -> Tensor:
    """As llama.cpp's converter has queries and keys of the architecture "llama"."""
    halves = weight.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).flatten(0, 2)


@pytest.fixture
def make(checkpoints: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """make(family, kind): a GGUF file of tensors of this kind, and a checkpoint of its values."""
    monkeypatch.setattr("engine.checkpoint.derived.cache", lambda: tmp_path / "cache")

    def make_both(family: str, kind: str) -> tuple[Path, Path]:
        source = checkpoints(family, **own.get(family, {}))
        hf = json.loads((source / "config.json").read_text())
        tensors = load_file(source / "model.safetensors")
        architecture = hf["model_type"]
        path, plain = tmp_path / f"{family}-{kind}.gguf", tmp_path / f"{family}-{kind}"
        writer = GGUFWriter(path, architecture)
        add_metadata(writer, hf)
        for name, tensor in list(tensors.items()):
            stored = tensor
            for part, heads in (("q_proj", 4), ("k_proj", 2)):
                if f".{part}." in name and architecture == "llama":
                    stored = rotary_rows_side_by_side(tensor, heads)
            quantized = GGMLQuantizationType[kind if tensor.dim() > 1 else "F32"]
            rows = quantize(stored.numpy(), quantized)
            writer.add_tensor(gguf_name(name), rows, raw_dtype=quantized)
            rows = quantize(tensor.numpy(), quantized)  # the order of rows does not enter
            tensors[name] = torch.from_numpy(np.array(dequantize(rows, quantized)))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        plain.mkdir()
        (plain / "config.json").write_text(json.dumps(hf))
        save_file(tensors, plain / "model.safetensors", {"format": "pt"})
        return path, plain

    # Rows of whole blocks.
    own: dict[str, dict[str, Any]] = {
        "llama3": dict(rope_parameters=dict(rope_type="default", rope_theta=5e3)),
    }
    return make_both


def add_metadata(writer: GGUFWriter, hf: dict[str, Any]) -> None:
    writer.add_context_length(hf["max_position_embeddings"])
    writer.add_block_count(hf["num_hidden_layers"])
    writer.add_embedding_length(hf["hidden_size"])
    writer.add_feed_forward_length(hf["intermediate_size"])
    writer.add_head_count(hf["num_attention_heads"])
    writer.add_head_count_kv(hf["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(hf["rms_norm_eps"])
    writer.add_rope_freq_base(hf["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(hf["head_dim"])
    writer.add_key_length(hf["head_dim"])
    tokenizer = json.loads(byte_level().to_str())["model"]
    tokens = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    kinds = [TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(tokens) - 3)
    unused = hf["vocab_size"] - len(tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens + [f"[PAD{i}]" for i in range(unused)])
    writer.add_token_types(kinds + [TokenType.UNUSED] * unused)
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)


@pytest.mark.parametrize(
    "family, kind",
    [
        *(("llama3", kind) for kind in ("F32", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")),
        ("qwen3", "Q8_0"),
    ],
)
def test_the_text_is_that_of_its_values(make: Any, family: str, kind: str) -> None:
    texts = []
    path, plain = make(family, kind)
    unpacked = path.with_suffix(".unpacked")
    unpacked.mkdir()
    convert([path], unpacked)
    for model in (unpacked, plain):
        with new_engine(model) as engine:
            requests = new_requests(random_prompts(16, 60), ignore_eos=True)
            texts.append(tokens_of(run(engine, requests)))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("kind", KINDS)
def test_levels_and_scales_are_those_of_the_library(kind: GGMLQuantizationType) -> None:
    """Of any bytes, bit for bit."""
    rng = np.random.default_rng(0)
    per_block, size = GGML_QUANT_SIZES[kind]
    rows = rng.integers(0, 256, (5, 512 // per_block * size), dtype=np.uint8)
    weight = grouped_weight(StoredTensor((5, 512), kind, rows))
    assert weight is not None
    expected = torch.from_numpy(dequantize(rows, kind))
    known = expected.isfinite()  # but where a scale is none
    assert known.float().mean() > 0.5
    assert torch.equal(weight.rows(torch.arange(5)).values()[known], expected[known])


@pytest.mark.parametrize(
    "family, kind", [("llama3", kind) for kind in ("Q4_0", "Q4_1", "Q5_0", "Q8_0")]
)
def test_in_16_bits_products_are_of_the_bits_in_the_file(
    make: Any, monkeypatch: pytest.MonkeyPatch, family: str, kind: str
) -> None:
    """The model's outputs are those of its values, but for activations of 8 bits."""
    path, plain = make(family, kind)
    unpacked = path.with_suffix(".unpacked")
    unpacked.mkdir()
    convert([path], unpacked)
    text, likely, is_stored = [3 + 7 * i % 90 for i in range(40)], [], []
    packed = LinearPacker.pack_stored

    def spy(packer: LinearPacker, parts: Any, bias: Any) -> Any:
        is_stored.append(all(isinstance(part, StoredWeight) for part in parts))
        return packed(packer, parts, bias)

    monkeypatch.setattr(LinearPacker, "pack_stored", spy)
    for model in (unpacked, plain):
        llm = LLM(str(model), dtype="bfloat16", num_blocks=64, num_threads=1)
        params = SamplingParams(max_tokens=1, prompt_logprobs=0)
        (output,) = llm.generate([text], params, use_tqdm=False)
        likely.append(
            [e[t].logprob for e, t in zip(output.prompt_logprobs, text, strict=True) if e]
        )
        llm.close()
    num_layers = json.loads((plain / "config.json").read_text())["num_hidden_layers"]
    assert is_stored == [True] * (4 * num_layers + 2)  # and the embedding and the head
    difference = (torch.tensor(likely[0]) - torch.tensor(likely[1])).abs()
    assert difference.mean() < 0.1


def test_int4_keeps_the_levels_of_q4_0() -> None:
    """And its scales, but for the last of their bits: so that format may be asked for."""
    weight = torch.randn(32, 96, generator=torch.Generator().manual_seed(0))
    rows = quantize(weight.numpy(), GGMLQuantizationType.Q4_0)
    values = torch.from_numpy(np.array(dequantize(rows, GGMLQuantizationType.Q4_0)))
    torch.testing.assert_close(quantize_int4(values).values(), values, rtol=2**-8, atol=0)


def test_tokenizer_template_and_ends_come_from_its_metadata(make: Any) -> None:
    path, _ = make("qwen3", "Q8_0")
    llm = LLM(str(path), num_blocks=64, num_threads=1)
    tokenizer = llm.get_tokenizer()
    assert tokenizer.encode("the cat€") == [*byte_level().encode("the cat€").ids]
    assert tokenizer.encode_chat([{"role": "user", "content": "the"}]) == [
        1,
        *byte_level().encode("the").ids,
        2,
    ]
    assert llm.engine.limits.eos_token_ids == [2]
    assert resolve(str(path)) == resolve(str(path))  # made once
    llm.close()


def test_what_is_no_gguf_file_or_is_cut_off_is_refused(make: Any, tmp_path: Path) -> None:
    path, _ = make("qwen3", "Q8_0")
    for content in (b"", b"GGML" + path.read_bytes()[4:], path.read_bytes()[:-1000]):
        broken = tmp_path / "broken.gguf"
        broken.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"broken\.gguf .*(cannot be read|no GGUF file)"):
            GgufFile(broken)


def test_an_architecture_that_is_not_served_is_named(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.add_tokenizer_model("gpt2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="architecture 'mamba' is not served from GGUF"):
        convert([tmp_path / "other.gguf"], tmp_path)
