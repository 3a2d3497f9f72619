"""What quantization costs: the next-token distributions of a quantized model and of float32's.

Over the positions of texts that the model itself wrote: the mean and the 99th percentile of the
Kullback-Leibler divergence, and how often both hold the same token for the most probable. The first
line is bfloat16 against float32: what rounding alone does.

    python -m benchmarks.quantization --model manta-demo
"""

import argparse
from typing import Any

import torch
from torch import Tensor, nn

from engine import LLM, SamplingParams
from engine.models.decoder import CausalLM
from engine.schedule.request import Request

_PROMPTS = ("Once upon a time", "The engine", "A block is", "Every request", "To serve a model")


def sample_texts(llm: LLM, count: int, length: int) -> list[list[int]]:
    """Token ids of prompts with what the model wrote after them."""
    prompts = [_PROMPTS[i % len(_PROMPTS)] for i in range(count)]
    params = SamplingParams(temperature=1.0, max_tokens=length, ignore_eos=True)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [output.prompt_token_ids + output.outputs[0].token_ids for output in outputs]


def log_probabilities(model: str, texts: list[list[int]], **config: Any) -> Tensor:
    """[positions, vocab] float32 of the next token after every position of the texts."""
    llm = LLM(model, enable_prefix_caching=False, **config)
    taken: list[Tensor] = []
    decoder = llm.engine.runner.model
    assert isinstance(decoder, CausalLM)

    def keep(_module: nn.Module, _arguments: Any, hidden: Tensor) -> None:
        taken.append(decoder.logits(hidden).float().log_softmax(-1))

    decoder.register_forward_hook(keep)
    for i, text in enumerate(texts):
        llm.engine.add(Request(str(i), text, SamplingParams(max_tokens=1), seed=0))
        while llm.engine.has_work:
            llm.engine.step()
    return torch.cat(taken)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="manta-demo", help="checkpoint directory or hub id")
    parser.add_argument("--texts", type=int, default=50)
    parser.add_argument("--length", type=int, default=200, help="tokens of each text")
    arguments = parser.parse_args()
    texts = sample_texts(LLM(arguments.model, dtype="bfloat16"), arguments.texts, arguments.length)
    wanted = log_probabilities(arguments.model, texts, dtype="float32")
    print(f"{len(wanted)} positions; against float32\n{'':8} mean KL   p99 KL  same top token")
    configs: dict[str, dict[str, str]] = {
        "bfloat16": {"dtype": "bfloat16"},
        "w8a8": {"dtype": "bfloat16", "quantization": "w8a8"},
        "int4": {"dtype": "bfloat16", "quantization": "int4"},
        "fp8 KV": {"dtype": "bfloat16", "kv_cache_dtype": "fp8"},
    }
    for name, config in configs.items():
        got = log_probabilities(arguments.model, texts, **config)
        divergence = (wanted.exp() * (wanted - got)).sum(-1)
        same = (wanted.argmax(-1) == got.argmax(-1)).float().mean()
        print(
            f"{name:8} {divergence.mean():7.4f}  {divergence.quantile(0.99):7.4f}  {same:14.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
