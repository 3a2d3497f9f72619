"""transformers' `generate` by the names of vLLM, for `benchmarks.compare_vllm`."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM


@dataclass
class SamplingParams:
    temperature: float
    max_tokens: int
    ignore_eos: bool


class LLM:
    """A model of random weights, which computes one batch after the other, padded on the left."""

    def __init__(self, model: str, *, dtype: str, max_num_seqs: int, **_: Any) -> None:
        config = AutoConfig.from_pretrained(model)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        self.model.eval().to(self.device)
        self.model.generation_config.eos_token_id = None
        self.batch_size = max_num_seqs

    def generate(
        self, prompts: list[dict[str, Any]], params: list[SamplingParams], use_tqdm: bool
    ) -> list[Any]:
        """A batch goes on until its longest output is done; of the others no more is kept."""
        outputs: list[Any] = []
        for start in range(0, len(prompts), self.batch_size):
            of_batch = slice(start, start + self.batch_size)
            texts = [prompt["prompt_token_ids"] for prompt in prompts[of_batch]]
            made = self._generate_batch(texts, params[of_batch])
            for tokens, own in zip(made, params[of_batch], strict=True):
                output = SimpleNamespace(token_ids=tokens[: own.max_tokens])
                outputs.append(SimpleNamespace(outputs=[output]))
        return outputs

    @torch.inference_mode()
    def _generate_batch(
        self, texts: list[list[int]], params: list[SamplingParams]
    ) -> list[list[int]]:
        longest = max(map(len, texts))
        padded = [[0] * (longest - len(text)) + text for text in texts]
        is_text = [[0] * (longest - len(text)) + [1] * len(text) for text in texts]
        temperature = params[0].temperature
        sampling = dict(temperature=temperature, top_k=0) if temperature > 0 else {}
        tokens = self.model.generate(
            torch.tensor(padded, device=self.device),
            attention_mask=torch.tensor(is_text, device=self.device),
            do_sample=temperature > 0,
            max_new_tokens=max(own.max_tokens for own in params),
            pad_token_id=0,
            **sampling,
        )
        made: list[list[int]] = tokens[:, longest:].tolist()
        return made
