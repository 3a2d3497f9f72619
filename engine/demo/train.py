"""Train the demo model: `python -m engine.demo.train --out DIR --minutes 30`.

Generates the conversations, trains the tokenizer and the model on them, saves the checkpoint and
prints exact match on held-out instances. `--evaluate DIR` only prints the table. The bundled model
had 3,500 steps from random weights, then 12 minutes more, about 30 minutes of two cores in all:

    python -m engine.demo.train --out first --steps 3500 --compile
    python -m engine.demo.train --resume first --out second --minutes 12 --rate 1.5e-3 --compile
"""

import argparse
import copy
import itertools
import math
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoTokenizer, GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from engine.demo.evaluate import evaluate, prompt_of, table
from engine.demo.samples import Sample
from engine.demo.tasks import training_sample
from engine.demo.tokenizer import CONTEXT, VOCAB_SIZE, save_tokenizer, train_tokenizer
from engine.demo.wiring import wire

TOKENIZER_SAMPLES = 12_000
POOL = 1024
BATCH_TOKENS = 3_000
WARMUP_STEPS = 100
PEAK_RATE = 4e-3
FINAL_RATE = 0.02
EARLIER_TURNS = 0.3
SNAPSHOT_STEPS = 400


def build_model(tokenizer: Any) -> Qwen3ForCausalLM:
    """A fresh model. Heads, key-value heads and sizes are even, so two ranks can share it."""
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    wire(model, tokenizer.convert_ids_to_tokens(range(VOCAB_SIZE)))
    return model


def encode(tokenizer: Any, sample: Sample) -> tuple[list[int], list[float]]:
    """Token ids and the weight of each as a target: zero outside the assistant's turns.

    A reply's tokens share a weight that grows with the root of its length, so that short answers
    count. Earlier turns count less, and their first token not at all: it depends on whether
    thinking is enabled, which an earlier turn does not show.
    """
    prompt: list[int] = tokenizer(prompt_of(tokenizer, sample))["input_ids"]
    reply: list[int] = [*tokenizer(sample.expected)["input_ids"], tokenizer.eos_token_id]
    weights = [0.0] * len(prompt) + [len(reply) ** -0.5] * len(reply)
    start = tokenizer("<|im_start|>assistant\n")["input_ids"]
    place = 0
    while place + len(start) < len(prompt):
        if prompt[place : place + len(start)] != start:
            place += 1
            continue
        begin = place + len(start)
        if tokenizer.eos_token_id not in prompt[begin:]:
            break
        place = prompt.index(tokenizer.eos_token_id, begin) + 1
        length = place - begin - 1
        weights[begin + 1 : place] = [EARLIER_TURNS * max(length, 1) ** -0.5] * length
    return prompt + reply, weights


Batch = tuple[torch.Tensor, torch.Tensor]


def batches(tokenizer: Any, rng: random.Random) -> Iterator[Batch]:
    """Endless batches of samples of similar length, padded on the right."""
    while True:
        pool = [encode(tokenizer, training_sample(rng)) for _ in range(POOL)]
        pool.sort(key=lambda item: len(item[0]))
        groups: list[list[tuple[list[int], list[float]]]] = [[]]
        for item in pool:
            if (len(groups[-1]) + 1) * len(item[0]) > BATCH_TOKENS:
                groups.append([])
            groups[-1].append(item)
        rng.shuffle(groups)
        for group in groups:
            if group:
                yield pad(group, tokenizer.pad_token_id)


def pad(group: list[tuple[list[int], list[float]]], filler: int) -> Batch:
    """One batch; causal attention never looks at padding on the right."""
    longest = max(len(ids) for ids, _ in group)
    tokens = torch.full((len(group), longest), filler)
    weights = torch.zeros(len(group), longest)
    for row, (ids, weight) in enumerate(group):
        tokens[row, : len(ids)] = torch.tensor(ids)
        weights[row, : len(ids)] = torch.tensor(weight)
    return tokens, weights


def loss_of(body: Any, head: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Weighted cross entropy; logits are computed only where a target counts."""
    tokens, weights = batch
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = body(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
        counted = weights[:, 1:] > 0
        logits = head(hidden[counted])
    losses = functional.cross_entropy(logits.float(), tokens[:, 1:][counted], reduction="none")
    share = weights[:, 1:][counted]
    return (losses * share).sum() / share.sum()


def optimizers(model: Qwen3ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers; AdamW for the embedding and the norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    inside = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in inside]
    return [
        torch.optim.Muon(matrices, lr=PEAK_RATE, weight_decay=0.05, momentum=0.95,
                         adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=PEAK_RATE, weight_decay=0.0, betas=(0.9, 0.98)),
    ]  # fmt: skip


def rate(step: int, progress: float) -> float:
    """The share of the peak learning rate: linear warmup, then a cosine to the end."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return min(1.0, (step + 1) / WARMUP_STEPS) * max(FINAL_RATE, cosine)


def train(model: Qwen3ForCausalLM, tokenizer: Any, options: argparse.Namespace) -> None:
    """Train for the given time or number of steps; prints a line now and then."""
    rules = optimizers(model)
    body: Any = torch.compile(model.model, dynamic=True) if options.compile else model.model
    model.train()
    began, seen, recent, shown = time.monotonic(), 0, 0.0, 0.0
    for step, batch in enumerate(batches(tokenizer, random.Random(options.seed))):
        elapsed = time.monotonic() - began
        progress = step / options.steps if options.steps else elapsed / 60 / options.minutes
        if progress >= 1:
            break
        for group in itertools.chain.from_iterable(rule.param_groups for rule in rules):
            group["lr"] = options.rate * rate(step, progress)
        loss = loss_of(body, model.lm_head, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for rule in rules:
            rule.step()
            rule.zero_grad()
        seen += batch[0].numel()
        recent = loss.item() if step == 0 else 0.98 * recent + 0.02 * loss.item()
        if elapsed - shown > 15:
            shown = elapsed
            print(f"{elapsed / 60:5.1f} min  {progress:4.0%}  step {step:5}  "
                  f"{seen / 1e6:5.2f} M tokens  {seen / elapsed:5.0f} tokens/s  "
                  f"loss {recent:.4f}", flush=True)  # fmt: skip
        if step % SNAPSHOT_STEPS == SNAPSHOT_STEPS - 1:
            save(model, tokenizer, options.out)


def save(model: Qwen3ForCausalLM, tokenizer: Any, folder: Path) -> None:
    """Write the model in bfloat16, with its generation settings."""
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)


def show_table(folder: Path, per_kind: int, show: int) -> None:
    """Load a checkpoint as a server would and print its exact match."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    began = time.monotonic()
    scores = evaluate(model, tokenizer, per_kind, show)
    print(table(scores, per_kind))
    print(f"{model.num_parameters():,} parameters, {time.monotonic() - began:.0f} s to evaluate")


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="directory to write the checkpoint to")
    parser.add_argument("--minutes", type=float, default=30.0, help="training time")
    parser.add_argument("--steps", type=int, default=0, help="train for steps instead of minutes")
    parser.add_argument("--resume", type=Path, help="go on from this checkpoint")
    parser.add_argument("--rate", type=float, default=PEAK_RATE, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="faster steps; needs a C++ compiler")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--evaluate", type=Path, help="only print the table of this checkpoint")
    parser.add_argument("--per-kind", type=int, default=100, help="held-out instances of each kind")
    parser.add_argument("--show", type=int, default=0, help="misses to print for each kind")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.evaluate:
        show_table(options.evaluate, options.per_kind, options.show)
        return
    if not options.out:
        parser.error("--out or --evaluate is needed")
    torch.manual_seed(options.seed)
    if options.resume:
        tokenizer = AutoTokenizer.from_pretrained(options.resume)
        shutil.copytree(options.resume, options.out, dirs_exist_ok=True)
        model = Qwen3ForCausalLM.from_pretrained(options.resume, dtype=torch.float32)
    else:
        tokenizer = make_tokenizer(options.out, options.seed)
        model = build_model(tokenizer)
    train(model, tokenizer, options)
    save(model, tokenizer, options.out)
    show_table(options.out, options.per_kind, options.show)


def make_tokenizer(folder: Path, seed: int) -> Any:
    """Train the tokenizer on generated conversations, save it and load it again."""
    rng = random.Random(seed - 1)
    texts = []
    for sample in (training_sample(rng) for _ in range(TOKENIZER_SAMPLES)):
        texts += [str(message["content"]) for message in sample.messages]
        texts += [str(sample.tools), sample.expected]
    save_tokenizer(train_tokenizer(texts), folder)
    return AutoTokenizer.from_pretrained(folder)


if __name__ == "__main__":
    main()
