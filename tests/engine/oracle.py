"""What transformers computes: logits of whole sequences, and greedy text by definition."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.checkpoints import VOCAB_SIZE

# Greedy text is only then a fact about the model, rather than about rounding, when the best token
# leads by more than fp32 rounding can move a logit (about 1e-5 here).
CLEAR_LEAD = 1e-3


@torch.inference_mode()
def logits_of(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """[length, vocab] float32 per sequence. Padding on the right: no position looks there."""
    width = max(map(len, sequences))
    padded = torch.tensor([[*tokens, *[0] * (width - len(tokens))] for tokens in sequences])
    logits = model(padded, use_cache=False).logits.float()
    return [logits[i, : len(tokens)] for i, tokens in enumerate(sequences)]


@dataclass(frozen=True)
class GreedyText:
    """Prompts and how transformers continues them, greedily and without regard to EOS."""

    prompts: list[list[int]]
    outputs: list[list[int]]


def greedy_text(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], num_tokens: int
) -> GreedyText:
    """Continues the prompts; leaves out those where a runner-up comes near."""
    sequences = [list(prompt) for prompt in prompts]
    clear = [True] * len(prompts)
    for _ in range(num_tokens):
        for i, logits in enumerate(logits_of(model, sequences)):
            best, second = logits[-1].topk(2).values.tolist()
            clear[i] &= best - second > CLEAR_LEAD
            sequences[i].append(int(logits[-1].argmax()))
    return GreedyText(
        [list(prompt) for prompt, keep in zip(prompts, clear, strict=True) if keep],
        [tokens[-num_tokens:] for tokens, keep in zip(sequences, clear, strict=True) if keep],
    )


def random_prompts(count: int, max_len: int, seed: int = 0) -> list[list[int]]:
    """Prompts of random tokens; the lengths first go through all edges of 16-token blocks."""
    rng = random.Random(seed)
    edges = [1, 2, 15, 16, 17, 31, 32, 33, 48, 64, max_len]
    lengths = edges + [rng.randint(1, max_len) for _ in range(count - len(edges))]
    return [[rng.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in lengths]
