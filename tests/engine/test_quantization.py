"""Quantized linear layers: close to the full model, and one copy of each weight."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from engine import LLM
from engine.config import EngineConfig
from engine.engine import Engine
from engine.quantize.write import quantize
from engine.sampling_params import SamplingParams
from engine.schedule.request import Request
from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.conftest import CheckpointFactory


def prompt_logits(directory: Path, quantization: str | None) -> Tensor:
    """Float32 logits [vocab] after one prompt."""
    config = EngineConfig(
        model=str(directory),
        dtype="bfloat16",
        device="cpu",
        num_blocks=8,
        quantization=quantization,  # type: ignore[arg-type]
    )
    engine = Engine(config)
    runner = engine.runner
    assert {n.rpartition(".")[0] for n, p in runner.model.named_parameters() if p.dim() == 2} <= {
        "model.embed_tokens"
    }
    seen = []
    sample = runner.ops.sampling.sample

    def record(logits: Tensor, *arguments: Tensor) -> Tensor:
        seen.append(logits.float())
        return sample(logits, *arguments)

    runner.ops.sampling.sample = record
    prompt = torch.randint(3, VOCAB_SIZE, (40,), generator=torch.Generator().manual_seed(0))
    engine.add(Request("0", prompt.tolist(), SamplingParams(temperature=0, max_tokens=1), 0))
    while engine.has_work:
        engine.step()
    engine.close()
    return seen[0][0]


@pytest.mark.parametrize(("quantization", "similarity"), [("w8a8", 0.99), ("int4", 0.9)])
def test_logits_stay_close(tmp_path: Path, quantization: str, similarity: float) -> None:
    directory = make_checkpoint(tmp_path, "llama3")
    full, rounded = prompt_logits(directory, None), prompt_logits(directory, quantization)
    assert not torch.equal(full, rounded)
    assert torch.cosine_similarity(full, rounded, dim=0) > similarity


def test_layers_whose_inputs_are_no_multiple(tmp_path: Path) -> None:
    """Of 64, for the kernel of 8 bits; of 32, for groups of 4 bits, there are none."""
    directory = make_checkpoint(tmp_path, "llama3", intermediate_size=100)
    full, rounded = prompt_logits(directory, None), prompt_logits(directory, "w8a8")
    assert torch.cosine_similarity(full, rounded, dim=0) > 0.99
    with pytest.raises(ValueError, match="'int4' needs inputs in multiples of 32, not 100"):
        prompt_logits(directory, "int4")


def test_an_embedding_that_is_the_head_is_there_once(checkpoints: CheckpointFactory) -> None:
    """Packed; one that is rounded to be a head stays beside it, for tokens have its values."""
    model = str(checkpoints("qwen3"))
    for quantization, kept in ((None, set()), ("w8a8", {"model.embed_tokens.weight"})):
        llm = LLM(model, dtype="bfloat16", num_blocks=8, num_threads=1, quantization=quantization)
        named = llm.engine.runner.model.named_parameters()
        assert {name for name, tensor in named if tensor.dim() == 2} == kept
        llm.close()


@pytest.mark.parametrize(("scheme", "tolerance"), [("W4A16", 2e-3), ("W8A8", 0.1)])
def test_a_written_checkpoint_is_the_same_model_to_transformers(
    checkpoints: CheckpointFactory, tmp_path: Path, scheme: str, tolerance: float
) -> None:
    """Loaded by its library, with compressed-tensors, which may round activations too."""
    target = tmp_path / scheme
    quantize(checkpoints("qwen3"), target, scheme, group=32)
    text = [3 + 7 * i % 90 for i in range(40)]
    llm = LLM(str(target), dtype="float32", num_blocks=64, num_threads=1)
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    (output,) = llm.generate([text], params, use_tqdm=False)
    ours = [e[t].logprob for e, t in zip(output.prompt_logprobs, text, strict=True) if e]
    llm.close()
    # Left in few bits, what has packed zeros has no place in compressed-tensors 0.20's modules.
    loaded_as = CompressedTensorsConfig(dequantize=scheme == "W4A16")
    model = AutoModelForCausalLM.from_pretrained(
        target, dtype=torch.float32, quantization_config=loaded_as
    )
    with torch.inference_mode():
        theirs = model(torch.tensor([text])).logits[0, :-1].log_softmax(-1)
    expected = theirs.gather(1, torch.tensor(text[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(ours), expected, rtol=0, atol=tolerance)
    names = set(load_file(target / "model-00001.safetensors"))
    wanted = "self_attn.q_proj.weight" + ("_packed" if scheme == "W4A16" else "_scale")
    assert f"model.layers.0.{wanted}" in names
