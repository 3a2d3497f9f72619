"""GGUF files of a shape, as large as real ones: random weights, a tokenizer of made-up words.

python -m benchmarks.random_gguf DIRECTORY [--model DIRECTORY] [--mix BF16 Q8_0 Q4_0 Q4_K_M]
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from gguf import GGUFWriter, TokenType
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from benchmarks.floor import SHAPE
from benchmarks.shape import DenseShape, read_shape

MIXES = ("BF16", "Q8_0", "Q4_0", "Q4_K_M")
_Kind = GGMLQuantizationType
_WIDTH = 0.02  # of the weights
# By kind: at which bytes of a block there are halves, and what makes its values this wide.
_HALVES = {
    _Kind.Q8_0: {0: _WIDTH / 74},
    _Kind.Q4_0: {0: _WIDTH / 4.6},
    _Kind.Q4_K: {0: _WIDTH / 4.6 / 32, 2: _WIDTH / 4.6 / 32 * 7.5},
    _Kind.Q6_K: {208: _WIDTH / 18.5 / 74},
}


def write_gguf(config: DenseShape, path: Path, mix: str) -> None:
    """A Qwen3 of this shape, quantized as llama.cpp does by that name; a tensor at a time."""
    writer = GGUFWriter(path, "qwen3")
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_eps)
    writer.add_rope_freq_base(1e6)
    _add_tokenizer(writer, config.vocab_size)
    kinds = dict(_tensors(config, mix))
    for name, (shape, kind) in kinds.items():
        rows, size = _stored(shape, kind)
        writer.add_tensor_info(name, (*rows, size), np.dtype(np.uint8), _bytes(shape, kind), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    draw = np.random.default_rng(0)
    for shape, kind in kinds.values():
        writer.write_tensor_data(_blocks(draw, shape, kind))
    writer.close()


def _add_tokenizer(writer: GGUFWriter, size: int) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    words = [*map(chr, range(33, 127)), "Ċ", "Ġ", *(f"w{i}" for i in range(size))][:size]
    writer.add_token_list(words)
    writer.add_token_types([TokenType.NORMAL] * size)
    writer.add_token_merges(["w 0"])
    writer.add_eos_token_id(size - 1)


def _tensors(
    config: DenseShape, mix: str
) -> Iterator[tuple[str, tuple[tuple[int, ...], GGMLQuantizationType]]]:
    """Names, shapes and kinds."""
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_layers
    q_size, kv_size = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
    main = {kind.name: kind for kind in _Kind}["Q4_K" if mix == "Q4_K_M" else mix]
    better = _Kind.Q6_K if mix.startswith("Q4") else main
    head = (config.vocab_size, hidden), better
    yield "token_embd.weight", head if config.tied_embeddings else (head[0], main)
    yield "output_norm.weight", ((hidden,), _Kind.F32)
    if not config.tied_embeddings:
        yield "output.weight", head
    for i in range(layers):
        is_outer = i < layers // 8 or i >= 7 * layers // 8 or (i - layers // 8) % 3 == 2
        of_some = better if mix == "Q4_K_M" and is_outer else main
        norms = {"attn_norm": hidden, "ffn_norm": hidden}
        norms |= {f"attn_{n}_norm": config.head_dim for n in "qk"}
        for name, size in norms.items():
            yield f"blk.{i}.{name}.weight", ((size,), _Kind.F32)
        for name, shape, kind in (
            ("attn_q", (q_size, hidden), main),
            ("attn_k", (kv_size, hidden), main),
            ("attn_v", (kv_size, hidden), of_some),
            ("attn_output", (hidden, q_size), main),
            ("ffn_gate", (inner, hidden), main),
            ("ffn_up", (inner, hidden), main),
            ("ffn_down", (hidden, inner), of_some),
        ):
            yield f"blk.{i}.{name}.weight", (shape, kind)


def _stored(shape: tuple[int, ...], kind: GGMLQuantizationType) -> tuple[tuple[int, ...], int]:
    """Rows, and bytes of each."""
    per_block, size = GGML_QUANT_SIZES[kind]
    return shape[:-1], shape[-1] // per_block * size


def _bytes(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    rows, size = _stored(shape, kind)
    return int(np.prod(rows)) * size


def _blocks(
    draw: np.random.Generator, shape: tuple[int, ...], kind: GGMLQuantizationType
) -> NDArray[np.uint8]:
    if kind == _Kind.F32:  # a norm
        return np.ones(shape, dtype=np.float32).view(np.uint8)
    if kind == _Kind.BF16:
        single = draw.standard_normal(shape, dtype=np.float32) * _WIDTH
        return (single.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)  # rounded down
    blocks = np.frombuffer(bytearray(draw.bytes(_bytes(shape, kind))), np.uint8)
    halves = blocks.reshape(-1, GGML_QUANT_SIZES[kind][1])
    for at, value in _HALVES[kind].items():
        halves[:, at : at + 2] = np.frombuffer(np.float16(value).tobytes(), np.uint8)
    return blocks


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--model", type=Path, default=SHAPE, help="directory of a config.json")
    parser.add_argument("--mix", nargs="+", choices=MIXES, default=list(MIXES))
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    for mix in arguments.mix:
        path = arguments.directory / f"{arguments.model.name}-{mix}.gguf"
        write_gguf(read_shape(arguments.model), path, mix)
        print(f"{path}: {path.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
