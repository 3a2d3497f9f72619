"""Initial weights in which copying already works.

Most of the tasks copy words from the prompt. Trained from random weights, a transformer spends
most of a short run before it discovers how: one head must look at the previous token, and a later
head must look for the current token among those previous tokens. Here the first heads are set up
that way, and training starts from there. The embedding starts with a word being the same word
with and without a space in front, and with its letters in it; and with digits that lie on a line
and on circles, so that carries are easy to find. Everything else is random.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3ForCausalLM

HEAD = 64
SHARP = 2.0
FAST = range(0, 6)
"""Rotary frequencies that tell neighbouring positions apart."""
SLOW = range(18, 32)
"""Rotary frequencies that hardly depend on the position."""


def orthonormal(rows: int, avoid: Tensor) -> Tensor:
    """Random orthonormal rows that are orthogonal to the rows of `avoid`."""
    basis = torch.linalg.qr(torch.cat([avoid, torch.randn(rows, avoid.shape[1])]).T).Q.T
    return basis[len(avoid) :]


def embedding(tokens: list[str], always: Tensor) -> Tensor:
    """A vector per token: one for its text, a part for each letter, one for a space in front."""
    hidden = always.shape[1]
    words: dict[str, Tensor] = defaultdict(lambda: torch.randn(hidden) * 0.08)
    letters: dict[tuple[int, str], Tensor] = defaultdict(lambda: torch.randn(hidden) * 0.03)
    space, axes = torch.randn(hidden) * 0.05, torch.randn(9, hidden)
    rows = []
    for token in tokens:
        text = token.removeprefix("Ġ")
        vector = words[text] + space * (text != token)
        if text.isalpha() and text.isascii():
            for place in enumerate(text.lower()):
                vector = vector + letters[place]
        elif text.isascii() and text.isdigit():
            vector = vector + 0.035 * number(int(text)) @ axes
        rows.append(vector)
    vectors = torch.stack(rows)
    return vectors + (1.0 - vectors @ always.T) * always


def number(digit: int) -> Tensor:
    """A digit's place on a line, and on circles that it goes around one to four times."""
    angles = torch.arange(1, 5) * (2 * torch.pi * digit / 10)
    return torch.cat([torch.tensor([(digit - 4.5) / 3]), angles.cos(), angles.sin()])


@torch.no_grad()
def wire(model: Qwen3ForCausalLM, tokens: list[str]) -> None:
    """Set the embedding of the given vocabulary, a previous-token head and two copying heads."""
    layers, hidden = model.model.layers, model.config.hidden_size
    for layer in layers:
        for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
            writer.weight.mul_((2 * len(layers)) ** -0.5)
    always = nn.functional.normalize(torch.randn(1, hidden), dim=1)
    model.model.embed_tokens.weight.copy_(embedding(tokens, always))
    model.model.norm.weight.fill_(0.3)

    current = orthonormal(HEAD, always)
    previous = orthonormal(HEAD, torch.cat([always, current]))
    look_back(layers[0].self_attn, always, current, previous)
    for layer in (layers[1], layers[2]):
        copy_match(layer.self_attn, current, previous, orthonormal(HEAD, always))


def look_back(attention: Any, always: Tensor, current: Tensor, previous: Tensor) -> None:
    """The first key-value head attends one position back and notes which token is there."""
    query, key = torch.zeros(HEAD, 1), torch.zeros(HEAD, 1)
    for i in FAST:
        angle = torch.tensor(10000.0 ** (-i / (HEAD // 2)))
        key[i] = 0.5
        query[i], query[i + HEAD // 2] = 0.5 * angle.cos(), -0.5 * angle.sin()
    set_head(attention, query @ always, key @ always, 0.3 * current, 0.3 * previous.T)


def copy_match(attention: Any, current: Tensor, previous: Tensor, value: Tensor) -> None:
    """The first key-value head attends to what followed the current token, and copies it."""
    place = torch.tensor([*SLOW, *(i + HEAD // 2 for i in SLOW)])
    query, key = torch.zeros_like(current), torch.zeros_like(current)
    query[place], key[place] = current[: len(place)], previous[: len(place)]
    set_head(attention, 0.3 * query, 0.3 * key, 0.6 * value, 0.6 * value.T)


def set_head(attention: Any, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> None:
    """Write the matrices of the first head, and sharpen what the layer attends to."""
    attention.q_proj.weight[:HEAD] = query
    attention.k_proj.weight[:HEAD] = key
    attention.v_proj.weight[:HEAD] = value
    attention.o_proj.weight[:, :HEAD] = out
    attention.q_norm.weight.fill_(SHARP)
    attention.k_norm.weight.fill_(SHARP)
