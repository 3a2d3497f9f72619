"""Reinforcement learning in a loop: roll out, reward, step, load the new weights, roll out again.

GRPO (Shao et al., 2024) in its simplest form: each prompt is answered by a group, an answer's
advantage is its reward less the group's mean, and the policy gradient follows. The reward is exact:
whether the sum is right. Rollouts are sampled here; gradients come from transformers, and the
engine goes on with the weights that they lead to.

    python docs/examples/rl_rollout.py --rounds 5
"""

import argparse
import random
import tempfile
import time

import torch
from transformers import AutoModelForCausalLM

from engine import LLM, RequestOutput, SamplingParams
from engine.checkpoint.source import resolve


def reward(question: tuple[int, int], answer: str) -> float:
    return float(answer.strip() == str(sum(question)))


def advantages(rewards: list[float]) -> list[float]:
    mean = sum(rewards) / len(rewards)
    return [value - mean for value in rewards]


def policy_loss(model: torch.nn.Module, output: RequestOutput, gains: list[float]) -> torch.Tensor:
    """Minus the advantage-weighted log-likelihood of a group's answers."""
    losses = []
    for choice, gain in zip(output.outputs, gains, strict=True):
        tokens = torch.tensor([output.prompt_token_ids + choice.token_ids])
        logits = model(tokens).logits[0, len(output.prompt_token_ids) - 1 : -1]
        chosen = logits.log_softmax(-1).gather(1, torch.tensor(choice.token_ids)[:, None])
        losses.append(-gain * chosen.mean())
    return torch.stack(losses).sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=16, help="per round")
    parser.add_argument("--group", type=int, default=8, help="answers per prompt")
    args = parser.parse_args()
    rng = random.Random(0)
    checkpoint = resolve("manta-demo")
    policy = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-5)
    with tempfile.TemporaryDirectory() as directory:
        llm = LLM(str(checkpoint), dtype="float32", num_blocks=512, max_model_len=256)
        for number in range(args.rounds):
            questions = [(rng.randint(20, 49), rng.randint(20, 49)) for _ in range(args.prompts)]
            prompts = [[{"role": "user", "content": f"What is {a} + {b}?"}] for a, b in questions]
            # The group shares its prompt's blocks: it is computed once.
            params = SamplingParams(n=args.group, temperature=1.3, max_tokens=8, seed=number)
            start = time.perf_counter()
            outputs = llm.chat(prompts, params, use_tqdm=False)
            seconds = time.perf_counter() - start
            rewards = [
                [reward(question, choice.text) for choice in output.outputs]
                for question, output in zip(questions, outputs, strict=True)
            ]
            for output, group in zip(outputs, rewards, strict=True):
                if any(gains := advantages(group)):  # equal rewards teach nothing
                    policy_loss(policy, output, gains).backward()
            optimizer.step()
            optimizer.zero_grad()
            start = time.perf_counter()
            policy.save_pretrained(directory)  # in /dev/shm, if there is much of it
            llm.update_weights_from_disk(directory)
            update_s = time.perf_counter() - start
            tokens = sum(len(choice.token_ids) for output in outputs for choice in output.outputs)
            mean = sum(map(sum, rewards)) / (args.prompts * args.group)
            print(
                f"round {number}: reward {mean:.3f}, {tokens / seconds:,.0f} rollout tokens/s, "
                f"new weights after {update_s:.2f} s"
            )
        llm.close()


if __name__ == "__main__":
    main()
