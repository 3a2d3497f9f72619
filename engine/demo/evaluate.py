"""Greedy exact match on held-out instances."""

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from engine.demo.samples import Sample
from engine.demo.tasks import KINDS, draw

BATCH = 50


def prompt_of(tokenizer: Any, sample: Sample) -> str:
    """The sample's conversation as text, up to where the model's reply begins."""
    text: str = tokenizer.apply_chat_template(
        sample.messages,
        tools=sample.tools or None,
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=sample.thinking,
    )
    return text


@torch.inference_mode()
def replies(model: Any, tokenizer: Any, samples: Sequence[Sample]) -> list[str]:
    """The greedy reply to each sample; one batch, padded on the left."""
    prompts = [prompt_of(tokenizer, sample) for sample in samples]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left",
                       add_special_tokens=False)  # fmt: skip
    longest = max(len(tokenizer(s.expected)["input_ids"]) for s in samples)
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=longest + 8,
        do_sample=False,
    )
    new = output[:, inputs["input_ids"].shape[1] :]
    return [tokenizer.decode(row, skip_special_tokens=True) for row in new]


def held_out_samples(per_kind: int, seed: int = 1) -> list[Sample]:
    """The same number of held-out samples of every kind, no question twice."""
    rng = random.Random(seed)
    samples: dict[tuple[str, str], Sample] = {}
    for number, kind in enumerate(KINDS, 1):
        while len(samples) < number * per_kind:
            sample = draw(kind, rng, held_out=True, thinking=False)
            samples[kind, str(sample.messages)] = sample
    return list(samples.values())


def evaluate(model: Any, tokenizer: Any, per_kind: int, show: int = 0) -> dict[str, float]:
    """The share of exactly matching replies of each kind; prints up to `show` misses of each."""
    samples = held_out_samples(per_kind)
    by_length = sorted(samples, key=lambda s: (len(s.expected), len(str(s.messages))))
    right: Counter[str] = Counter()
    missed: Counter[str] = Counter()
    for start in range(0, len(by_length), BATCH):
        batch = by_length[start : start + BATCH]
        for sample, reply in zip(batch, replies(model, tokenizer, batch), strict=True):
            if reply == sample.expected:
                right[sample.kind] += 1
                continue
            missed[sample.kind] += 1
            if missed[sample.kind] <= show:
                question = sample.messages[-1]["content"]
                print(f"  {sample.kind}: {question!r}\n    {sample.expected!r}\n    {reply!r}")
    return {kind: right[kind] / per_kind for kind in KINDS}


def table(scores: dict[str, float], per_kind: int) -> str:
    """The scores as a table, with the mean over all kinds."""
    lines = [f"{'kind':<14}{'held-out':>9}{'exact':>9}"]
    lines += [f"{kind:<14}{per_kind:>9}{score:>9.1%}" for kind, score in scores.items()]
    mean = sum(scores.values()) / len(scores)
    lines.append(f"{'all':<14}{per_kind * len(scores):>9}{mean:>9.1%}")
    return "\n".join(lines)
