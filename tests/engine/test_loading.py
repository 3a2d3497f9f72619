"""What a checkpoint must have, what is refused by name, and which slices a rank takes of it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.checkpoint.files import CheckpointError
from engine.checkpoint.source import resolve
from engine.config import EngineConfig
from engine.models.blocks.linear import BuildContext
from engine.models.blocks.norm import Norm
from engine.models.decoder import CausalLM
from engine.models.reader import SafetensorsReader
from engine.models.registry import read_config
from engine.models.weight_loader import load_dummy_weights, load_weights
from engine.models.weights.plain import PlainWeights
from engine.ranks.rank_group import RankGroup, Ranks
from engine.runner.model_runner import ModelRunner
from kernels import select_ops
from tests.checkpoints import load_oracle
from tests.conftest import CheckpointFactory
from tests.engine.helpers import prompt_logits


def load(directory: Path, rank: int = 0, size: int = 1) -> CausalLM:
    config = read_config(directory)
    ops, parallel = select_ops(torch.device("cpu")), RankGroup(rank, size)
    context = BuildContext(config.hidden_size, config.rms_eps, ops, parallel, PlainWeights())
    model = CausalLM(config, 64, context)
    load_weights(model, directory, show_progress=False)
    return model


# --- Broken checkpoints -----------------------------------------------------------------------


def test_missing_tensor_is_named(edited: Callable[..., Path]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(CheckpointError, match=f"no tensor '{name}'"):
        load(edited("qwen3", tensors=lambda weights: weights.pop(name)))


def test_left_over_tensor_is_named(edited: Callable[..., Path]) -> None:
    name = "model.layers.0.self_attn.sinks"
    with pytest.raises(CheckpointError, match=f"no place for: {name}$"):
        load(edited("llama3", tensors=lambda weights: weights.update({name: torch.zeros(4)})))


def test_misshapen_tensor_is_named_with_both_shapes(edited: Callable[..., Path]) -> None:
    name = "model.layers.2.self_attn.k_proj.weight"
    with pytest.raises(CheckpointError, match=rf"{name} has shape \(32, 63\).* \(32, 64\)"):
        load(edited("mistral", tensors=lambda w: w.update({name: w[name][:, :-1].contiguous()})))


def test_untied_checkpoint_needs_its_head(edited: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match="lm_head"):
        load(edited("llama3", tensors=lambda weights: weights.pop("lm_head.weight")))


def test_tied_checkpoint_may_repeat_its_embedding_as_head(edited: Callable[..., Path]) -> None:
    def repeat(weights: dict[str, Tensor]) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()

    model = load(edited("qwen3", tensors=repeat))
    assert model.is_tied


def test_tied_checkpoint_with_a_head_of_its_own_uses_it(edited: Callable[..., Path]) -> None:
    """As transformers does, which warns that the config is wrong."""

    def change(weights: dict[str, Tensor]) -> None:
        head = weights["model.embed_tokens.weight"].clone()
        head[-1] += 1
        weights["lm_head.weight"] = head

    directory = edited("qwen3", tensors=change)
    config = EngineConfig(model=str(directory), device="cpu", num_threads=1, num_blocks=4)
    runner = ModelRunner(config, read_config(directory), directory)
    tokens = [5, 9, 7]
    logits = prompt_logits(runner, tokens, [2, 0])
    with torch.inference_mode():
        expected = load_oracle(directory)(torch.tensor([tokens])).logits[0, -1]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_all_that_is_missing_is_found_before_anything_is_read(
    edited: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> Tensor:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(SafetensorsReader, "read", refuse)
    for name in ("model.norm.weight", "model.layers.2.mlp.down_proj.weight"):
        with pytest.raises(CheckpointError, match=f"no tensor '{name}'"):
            load(edited("qwen3", tensors=lambda weights, name=name: weights.pop(name)))


def test_weights_that_are_no_numbers_are_named(edited: Callable[..., Path]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def spoil(weights: dict[str, Tensor]) -> None:
        weights[name][3, 4] = torch.nan

    with pytest.raises(CheckpointError, match=f"{name} has values that are no numbers"):
        load(edited("qwen3", tensors=spoil))


def test_an_index_points_to_files_beside_it(edited: Callable[..., Path]) -> None:
    directory = edited("qwen3")
    (directory / "model.safetensors").rename(directory.parent / "elsewhere.safetensors")
    index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"not beside it: '\.\./elsewhere"):
        load(directory)


def test_old_rotary_buffers_are_ignored(edited: Callable[..., Path]) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    load(edited("llama3", tensors=lambda weights: weights.update({name: torch.zeros(8)})))


def test_directory_without_safetensors(edited: Callable[..., Path]) -> None:
    directory = edited("qwen3")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors files.*save_pretrained"):
        load(directory)


def test_truncated_file_is_named(edited: Callable[..., Path]) -> None:
    path = edited("qwen3") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        load(path.parent)


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_broken_index_is_named(edited: Callable[..., Path], index: str) -> None:
    directory = edited("qwen3")
    (directory / "model.safetensors").rename(directory / "model-00001-of-00001.safetensors")
    (directory / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json cannot be read"):
        load(directory)


def test_missing_shard_is_named(checkpoints: CheckpointFactory, tmp_path: Path) -> None:
    directory = tmp_path / "sharded"
    shutil.copytree(checkpoints("qwen3", max_shard_size="100KB"), directory)
    lost = sorted(directory.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(CheckpointError, match=lost.name):
        load(directory)


def test_the_index_says_which_copy_of_a_tensor_counts(
    checkpoints: CheckpointFactory, tmp_path: Path
) -> None:
    directory = tmp_path / "sharded"
    shutil.copytree(checkpoints("qwen3", max_shard_size="100KB"), directory)
    weight_map = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    name = "model.norm.weight"
    for stale in {*weight_map.values()} - {weight_map[name]}:
        weights = load_file(directory / stale)
        weights |= {name: torch.zeros(64), "stray": torch.zeros(1)}
        save_file(weights, directory / stale, {"format": "pt"})
    expected = load_file(directory / weight_map[name])[name]
    assert load(directory).model.norm.weight.equal(expected)


def test_other_files_beside_the_model_are_ignored(edited: Callable[..., Path]) -> None:
    directory = edited("qwen3")
    save_file({"stray": torch.zeros(1)}, directory / "adapter.safetensors")
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    load(directory)


def test_missing_directory_and_missing_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no directory or GGUF file '\./nowhere'"):
        resolve("./nowhere")
    with pytest.raises(CheckpointError, match=r"has no config\.json: is it a model"):
        read_config(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"it is an adapter \(LoRA\); merge it"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON"):
        read_config(tmp_path)


# --- What else is refused ---------------------------------------------------------------------


def test_window_longer_than_the_models_is_refused(checkpoints: CheckpointFactory) -> None:
    from engine.engine import Engine

    config = EngineConfig(model=str(checkpoints("qwen3")), max_model_len=513)
    with pytest.raises(ValueError, match=r"max_model_len \(513\).*at most 512"):
        Engine(config)


def test_a_parameter_takes_memory_when_it_is_filled() -> None:
    """So those that are packed as they are read never take that of their values."""
    module = Norm(64)
    assert module.weight.shape == (64,) and module.weight.untyped_storage().nbytes() == 0
    assert module.reserve("weight").fill_(1.0).untyped_storage().nbytes() == 64 * 4


def test_dummy_weights_are_finite_and_the_same_for_one_seed(
    checkpoints: CheckpointFactory,
) -> None:
    def weights(seed: int) -> Tensor:
        model = load(checkpoints("qwen2"))
        load_dummy_weights(model, seed)
        return torch.cat([parameter.flatten() for parameter in model.parameters()])

    assert weights(1).isfinite().all()
    assert weights(1).equal(weights(1))
    assert not weights(1).equal(weights(2))


# --- Tensor parallelism: each rank's slices ---------------------------------------------------


def part(tensor: Tensor, index: int, count: int, dim: int = 0) -> Tensor:
    return tensor.chunk(count, dim)[index]


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama3", "mistral"])
def test_two_ranks_hold_the_two_halves(checkpoints: CheckpointFactory, family: str) -> None:
    directory = checkpoints(family)
    whole = load_file(directory / "model.safetensors")
    for rank in range(2):
        model = load(directory, rank, size=2)
        assert model.model.embed_tokens.weight.equal(
            part(whole["model.embed_tokens.weight"], rank, 2)
        )
        if family in ("llama3", "mistral"):  # untied
            assert model.lm_head.weight.equal(part(whole["lm_head.weight"], rank, 2))
        else:
            assert model.is_tied
        assert model.model.norm.weight.equal(whole["model.norm.weight"])
        for i, layer in enumerate(model.model.layers):
            prefix = f"model.layers.{i}"
            attention, mlp = layer.self_attn, layer.mlp
            for kind in ("weight", "bias") if family == "qwen2" else ("weight",):
                expected = torch.cat(
                    [
                        part(whole[f"{prefix}.self_attn.{name}_proj.{kind}"], rank, 2)
                        for name in "qkv"
                    ]
                )
                assert getattr(attention.qkv_proj, kind).equal(expected)
            assert attention.o_proj.weight.equal(
                part(whole[f"{prefix}.self_attn.o_proj.weight"], rank, 2, dim=1)
            )
            assert mlp.gate_up_proj.weight.equal(
                torch.cat(
                    [
                        part(whole[f"{prefix}.mlp.{name}_proj.weight"], rank, 2)
                        for name in ("gate", "up")
                    ]
                )
            )
            assert mlp.down_proj.weight.equal(
                part(whole[f"{prefix}.mlp.down_proj.weight"], rank, 2, dim=1)
            )
            assert layer.input_layernorm.weight.equal(whole[f"{prefix}.input_layernorm.weight"])
            assert layer.post_attention_layernorm.weight.equal(
                whole[f"{prefix}.post_attention_layernorm.weight"]
            )
            if family == "qwen3":
                assert attention.q_norm.weight.equal(whole[f"{prefix}.self_attn.q_norm.weight"])
                assert attention.k_norm.weight.equal(whole[f"{prefix}.self_attn.k_norm.weight"])


def test_four_ranks_share_two_kv_heads(checkpoints: CheckpointFactory) -> None:
    """Ranks 0 and 1 hold kv head 0, ranks 2 and 3 head 1: the one their query head attends to."""
    directory = checkpoints("mistral")
    whole = load_file(directory / "model.safetensors")
    prefix = "model.layers.0.self_attn"
    for rank in range(4):
        qkv_proj = load(directory, rank, size=4).model.layers[0].self_attn.qkv_proj
        expected = [
            part(whole[f"{prefix}.q_proj.weight"], rank, 4),
            part(whole[f"{prefix}.k_proj.weight"], rank // 2, 2),
            part(whole[f"{prefix}.v_proj.weight"], rank // 2, 2),
        ]
        assert qkv_proj.weight.equal(torch.cat(expected))


@pytest.mark.parametrize("vocab_size, size", [(321, 2), (322, 4), (5, 4)])
def test_vocabulary_that_does_not_divide_is_padded_with_zeros(
    checkpoints: CheckpointFactory, vocab_size: int, size: int
) -> None:
    directory = checkpoints("qwen3", vocab_size=vocab_size)
    whole = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]
    models = [load(directory, rank, size) for rank in range(size)]
    stacked = torch.cat([model.model.embed_tokens.weight for model in models])
    assert len({model.model.embed_tokens.weight.shape for model in models}) == 1
    assert stacked[:vocab_size].equal(whole)
    assert len(stacked) > vocab_size and not stacked[vocab_size:].any()


def test_a_model_that_cannot_be_split_is_refused(checkpoints: CheckpointFactory) -> None:
    directory = checkpoints("qwen3")
    config = EngineConfig(model=str(directory), num_blocks=1, device="cpu", num_threads=1)
    said = "^tensor_parallel_size: the model's 4 attention heads cannot be split over 3 ranks"
    with pytest.raises(ValueError, match=said):
        ModelRunner(
            config,
            read_config(directory),
            directory,
            ranks=Ranks(tensor=RankGroup(0, 3)),
        )


class ThreadedParallel(RankGroup):
    """Ranks as threads of one process, exchanging through a list."""

    def exchange(self, x: Tensor) -> list[Tensor]:
        barrier, mailbox = self.group
        mailbox[self.rank] = x.clone()
        barrier.wait()
        received = list(mailbox)
        barrier.wait()
        return received

    def all_reduce(self, x: Tensor) -> Tensor:
        return torch.stack(self.exchange(x)).sum(0)

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.cat(self.exchange(x), dim=-1)

    def agree_on_minimum(self, value: int) -> int:
        return min(int(other) for other in self.exchange(torch.tensor(value)))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama3", "mistral"])
def test_ranks_together_compute_the_same_logits(
    checkpoints: CheckpointFactory, family: str, size: int
) -> None:
    """With every trap: kv heads shared by ranks, padded vocabulary, biases (added only once)."""
    bias = dict(attention_bias=True) if family in ("qwen3", "llama3") else {}
    directory = checkpoints(family, vocab_size=323, **bias)
    config = EngineConfig(
        model=str(directory), num_blocks=4, device="cpu", num_threads=1, max_num_seqs=1
    )
    tokens = [(7 * i) % 323 for i in range(40)]
    logits: dict[int, Tensor] = {}

    @torch.inference_mode()
    def run_rank(key: int, parallel: RankGroup) -> None:
        model_config = read_config(directory)
        runner = ModelRunner(config, model_config, directory, ranks=Ranks(parallel, parallel))
        logits[key] = prompt_logits(runner, tokens, [2, 0])

    run_rank(-1, RankGroup())
    group: Any = (Barrier(size, timeout=60), [None] * size)
    # Reading files is not at issue here, and torch's default dtype is the process's.
    threads = [
        Thread(target=run_rank, args=(rank, ThreadedParallel(rank, size, group)))
        for rank in range(size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in range(size):
        torch.testing.assert_close(logits[rank], logits[-1], rtol=0, atol=1e-4)
