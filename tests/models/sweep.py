"""Every decoder that transformers knows, served or refused: `python -m tests.models.sweep`.

With `--write` the table in docs/models.md is made of it, and that of what is refused at once; of
some kinds only, if they are named: `python -m tests.models.sweep --write mamba jamba`.

A tiny random checkpoint of each is made, and greedy text must be that of transformers: in chunks,
in a pool that preempts, and again with cached prefixes.
"""

import json
import sys
import tempfile
import time
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from threading import Barrier, Lock, Thread
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from engine.checkpoint.files import CheckpointError
from engine.config import EngineConfig
from engine.models.config import ModelConfig
from engine.models.early import TABLE, UNSERVED
from engine.models.registry import read_config
from engine.models.transformers import load
from engine.ranks.rank_group import RankGroup, Ranks
from engine.runner.model_runner import ModelRunner
from tests.checkpoints import load_oracle
from tests.engine.helpers import new_engine, new_requests, prompt_logits, run, tokens_of
from tests.engine.oracle import GreedyText, greedy_text, random_prompts
from tests.models.tiny import KINDS, save_random, tiny_config

NUM_PROMPTS, MAX_PROMPT, NUM_OUTPUT = 8, 60, 10
# Prompts of up to 60 tokens in steps of 24, beyond windows of 24, in a pool that some do not fit.
ENGINE: dict[str, Any] = dict(
    block_size=4, num_blocks=40, max_num_seqs=8, max_num_batched_tokens=24
)
DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "models.md"
MARK = "<!-- made by python -m tests.models.sweep --write -->\n"
State = Literal["served", "refused", "refused after loading", "wrong", "not made"]


@dataclass
class Outcome:
    kind: str
    state: State
    path: str = ""  # who computes it
    ranks: str = ""  # whether it runs on 2
    reason: str = ""


def oracle_text(directory: Path) -> GreedyText:
    prompts = random_prompts(24, MAX_PROMPT)[-NUM_PROMPTS - 6 :]
    text = greedy_text(load_oracle(directory), prompts, NUM_OUTPUT)
    return GreedyText(text.prompts[:NUM_PROMPTS], text.outputs[:NUM_PROMPTS])


def examine(kind: str, directory: Path, with_ranks: bool = True) -> Outcome:
    try:
        config = tiny_config(kind)
        config.save_pretrained(directory)
        shape = read_config(directory)  # there are no weights that it could read
    except CheckpointError as error:
        return Outcome(kind, "refused", reason=str(error))
    except Exception as error:  # of transformers
        return Outcome(kind, "not made", reason=f"{type(error).__name__}: {error}")
    try:
        save_random(kind, config, directory)
        text = oracle_text(directory)
    except Exception as error:  # of transformers
        return Outcome(kind, "not made", reason=f"{type(error).__name__}: {error}")
    path = "native" if isinstance(shape, ModelConfig) else "transformers"
    try:
        with new_engine(directory, **ENGINE) as engine:
            for attempt in ("first", "cached"):
                outputs = run(
                    engine, new_requests(text.prompts, max_tokens=NUM_OUTPUT, ignore_eos=True)
                )
                if tokens_of(outputs) != text.outputs:
                    return Outcome(kind, "wrong", path, reason=f"other text ({attempt})")
            preempted = engine.scheduler.stats.preemptions
    except CheckpointError as error:
        return Outcome(kind, "refused after loading", path, reason=str(error))
    except Exception as error:
        return Outcome(kind, "wrong", path, reason=f"{type(error).__name__}: {error}")
    reason = "" if preempted and len(text.prompts) >= 3 else f"{len(text.prompts)} clear texts"
    ranks = on_two_ranks(directory) if with_ranks else ""
    return Outcome(kind, "served", path, ranks, reason)


class ThreadedGroup(RankGroup):
    """Ranks as threads of one process, exchanging through a list."""

    def exchange(self, x: Tensor) -> list[Tensor]:
        barrier, mailbox = self.group  # type: ignore[misc]
        mailbox[self.rank] = x.clone()
        barrier.wait()
        received = list(mailbox)
        barrier.wait()
        return received

    def agree_on_minimum(self, value: int) -> int:
        return int(torch.stack(self.exchange(torch.tensor(value))).min())

    def all_reduce(self, x: Tensor) -> Tensor:
        return torch.stack(self.exchange(x)).sum(0)

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.cat(self.exchange(x), dim=-1)


def on_two_ranks(directory: Path) -> str:
    """ "equal" when two ranks compute the logits of one, else why not."""
    config = EngineConfig(
        model=str(directory), num_blocks=8, device="cpu", num_threads=1, max_num_seqs=1
    )
    tokens = random_prompts(11, MAX_PROMPT)[-1]
    logits: dict[int, Tensor] = {}
    failures: list[BaseException] = []

    @torch.inference_mode()
    def run_rank(key: int, parallel: RankGroup) -> None:
        try:
            ranks = Ranks(parallel, parallel)
            runner = ModelRunner(config, read_config(directory), directory, ranks=ranks)
            logits[key] = prompt_logits(runner, tokens, [2, 0])
        except BaseException as error:
            failures.append(error)
            if parallel.size > 1:
                group[0].abort()

    group: Any = (Barrier(2, timeout=60), [None] * 2)
    one_by_one, read = Lock(), load._read_module  # transformers loads with states of the process

    def read_module(*arguments: Any) -> Any:
        with one_by_one:
            return read(*arguments)

    load._read_module = read_module
    run_rank(-1, RankGroup())
    threads = [Thread(target=run_rank, args=(r, ThreadedGroup(r, 2, group))) for r in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    load._read_module = read
    if failures:
        first = next((f for f in failures if isinstance(f, ValueError)), failures[0])
        return f"{type(first).__name__}: {first}"
    error = max(float((logits[rank] - logits[-1]).abs().max()) for rank in range(2))
    return "equal" if error < 1e-3 else f"wrong by {error:.2g}"


def is_for_the_kind(outcome: Outcome) -> bool:
    """Whether it is refused, and would be with any other sizes."""
    of_config = outcome.reason.startswith(("transformers cannot build", "config.json"))
    return outcome.state.startswith("refused") and not of_config


def table(outcomes: list[Outcome], before: str) -> str:
    """For docs/models.md, in place of the one before, of which other kinds are kept."""
    now = {o.kind for o in outcomes}
    kept = [line for line in before.splitlines() if line[:2] == "| " and line.split()[1] not in now]
    refused = [line for line in kept if line.count("|") == 3 and "because" not in line]
    served = [line for line in kept if line.count("|") == 4 and "model_type" not in line]
    whose = {"native": "own blocks", "transformers": "transformers' modules"}
    for o in outcomes:
        if o.state == "served":
            ranks = "yes" if o.ranks == "equal" else "no"
            served.append(f"| {o.kind} | {whose[o.path]} | {ranks} |")
        elif o.state.startswith("refused"):
            refused.append(f"| {o.kind} | {o.reason[:160].replace('|', ' ')} |")
    lines = [
        f"Of {len(served) + len(refused)} kinds of decoders, {len(served)} are served and "
        f"{len(refused)} refused.",
        "",
        "| model_type | computed by | tensor parallelism |",
        "|---|---|---|",
        *sorted(served),
        "",
        "| refused | because |",
        "|---|---|",
        *sorted(refused),
    ]
    return "\n".join(lines) + "\n"


def main(kinds: list[str]) -> int:
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    unserved = dict(UNSERVED)
    UNSERVED.clear()  # who knows
    outcomes = []
    write = "--write" in kinds
    for kind in [kind for kind in kinds if kind != "--write"] or KINDS:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as directory, redirect_stderr(StringIO()):
            outcome = examine(kind, Path(directory))
        outcomes.append(outcome)
        seconds = time.perf_counter() - start
        about = [outcome.path, outcome.ranks and f"2 ranks: {outcome.ranks}", outcome.reason]
        text = "; ".join(part for part in about if part).replace("\n", " ")
        print(f"{kind:<24} {outcome.state:<10} {seconds:4.1f} s  {text[:300]}", flush=True)
    counts: dict[str, int] = {}
    for outcome in outcomes:
        name = f"{outcome.state} ({outcome.path})" if outcome.path else outcome.state
        counts[name] = counts.get(name, 0) + 1
    print(", ".join(f"{count} {name}" for name, count in sorted(counts.items())))
    if write:
        text, before = DOCUMENT.read_text().split(MARK)
        DOCUMENT.write_text(text + MARK + "\n" + table(outcomes, before))
        refused = {o.kind: o.reason for o in outcomes if is_for_the_kind(o)}
        others = unserved.keys() - {o.kind for o in outcomes}
        refused = dict(sorted((refused | {kind: unserved[kind] for kind in others}).items()))
        TABLE.write_text(json.dumps(refused, indent=2) + "\n")
    return any(outcome.state == "wrong" for outcome in outcomes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
