"""What drafts bring: the same requests with and without, in pairs, and what a longer step costs.

On the shape of Qwen3-0.6B, whose weights here are random, tokens follow a script: the model
computes all that it would, and the sampler takes the script's token at each position.

(a) a file of the prompt is written again with small changes    (d) random tokens
On the bundled demo model, with its own tokens:
(b) fields extracted as JSON, under a schema                    (c) chats that quote

    python -m benchmarks.speculation

All rows have one file, whose blocks they share, so that a batch of 32 takes no more memory and no
longer to begin than one request; and larger batches write less. Each has its own changes.

Prints what a step of several tokens costs over one of one; then, by case and batch, tokens per row
and step, the share of drafts accepted, and the speed-up.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.floor import SHAPE
from engine.config import EngineConfig
from engine.demo.tasks import draw
from engine.engine import Engine
from engine.llm import LLM
from engine.sampling_params import SamplingParams
from engine.schedule.request import Request
from engine.schedule.step import StepPlan
from engine.structured_outputs import StructuredOutputs
from kernels.types import SamplingTable

_LEAST = 48  # tokens of an output, in however large a batch


class Scripted:
    """Sampling that costs what it costs, and brings the script's tokens: request `seed`'s."""

    def __init__(self, sampling: Any, num_scripts: int, max_len: int) -> None:
        self._sampling = sampling
        self.tokens = torch.zeros(num_scripts, max_len, dtype=torch.int64)

    def sample(
        self, logits: Tensor, table: SamplingTable, rows: Tensor, positions: Tensor
    ) -> Tensor:
        self._sampling.sample(logits, table, rows, positions)
        return self.tokens[table.seeds[rows], positions]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampling, name)


@dataclass
class Run:
    seconds: float  # from when all rows decode
    num_tokens: int
    num_steps: int
    drafted: int
    accepted: int
    texts: list[list[int]]


def run(engine: Engine, requests: Sequence[Request]) -> Run:
    """All at once; timed from when the prompts have been computed."""
    texts: dict[str, list[int]] = {request.id: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.stats()["waiting"] or any(s.num_uncomputed > 1 for s in engine.scheduler.running):
        for delta in engine.step():
            texts[delta.request_id] += delta.token_ids
    before, counts = sum(map(len, texts.values())), _counts(engine)
    steps, start = engine.num_steps, time.perf_counter()
    while engine.has_work:
        for delta in engine.step():
            texts[delta.request_id] += delta.token_ids
    seconds = time.perf_counter() - start
    drafted, accepted = (now - then for now, then in zip(_counts(engine), counts, strict=True))
    num_tokens = sum(map(len, texts.values())) - before
    num_steps = engine.num_steps - steps
    return Run(seconds, num_tokens, num_steps, drafted, accepted, list(texts.values()))


def _counts(engine: Engine) -> tuple[int, int]:
    assert engine.speculator is not None
    drafted, accepted = engine.speculator.num_draft_tokens, engine.speculator.num_accepted
    return drafted.total(), accepted.total()


def pair(engine: Engine, make: Callable[[], list[Request]]) -> tuple[Run, Run]:
    """The same requests without drafts and with, which knows nothing of the first run.

    Both find their prompts in the cache and their grammars compiled, so all rows begin together.
    """
    requests = make()
    speculation, engine.scheduler.speculation = engine.scheduler.speculation, None
    run(
        engine, [replace(r, params=r.params.model_copy(update={"max_tokens": 1})) for r in requests]
    )
    without = run(engine, requests)
    engine.scheduler.speculation = speculation
    return without, run(engine, requests)


def report(case: str, batch: int, pairs: list[tuple[Run, Run]]) -> None:
    speed_ups = [without.seconds / with_.seconds for without, with_ in pairs]
    with_ = [b for _, b in pairs]
    per_step = sum(r.num_tokens for r in with_) / sum(r.num_steps for r in with_) / batch
    accepted = sum(r.accepted for r in with_) / max(sum(r.drafted for r in with_), 1)
    equal = all(a.texts == b.texts for a, b in pairs)
    each = " ".join(f"{s:.2f}" for s in speed_ups)
    print(
        f"({case}) batch {batch:2}: {per_step:5.2f} tokens per row and step, "
        f"{100 * accepted:3.0f} % of drafts accepted, "
        f"{median(speed_ups):.2f} times as fast ({each}), texts {'equal' if equal else 'DIFFER'}",
        flush=True,
    )


# --- The 0.6B shape -----------------------------------------------------------------------------


class Scripts:
    """Requests of the cases (a) and (d), each with its script."""

    num_pairs = 1  # for each that is asked for

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._draw = random.Random(arguments.seed)
        self.num_made = 0
        self.max_len = arguments.file + arguments.output + 64
        config = EngineConfig(
            model=str(SHAPE),
            load_format="dummy",
            dtype=arguments.dtype,
            max_num_seqs=max(arguments.batches),
            max_model_len=self.max_len,
            num_blocks=-(-arguments.file // 32)
            + max(arguments.batches) * (-(-(arguments.output + 64) // 32) + 1),
            speculation="suffix",
        )
        self.engine = Engine(config)
        num_scripts = 64 * max(arguments.batches)
        sampler = self.engine.runner.sampler
        self.script = Scripted(sampler._ops.sampling, num_scripts, self.max_len)
        object.__setattr__(sampler._ops, "sampling", self.script)
        self._file = self._random(arguments.file)

    def make(self, case: str, batch: int) -> list[Request]:
        draw, prompt = self._draw, self._file
        length = min(self._arguments.output, max(2 * self._arguments.output // batch, _LEAST))
        requests = []
        params = SamplingParams(max_tokens=length, ignore_eos=True)
        for _ in range(batch):
            output = self._random(length)
            if case == "a":
                output = edited(draw, prompt, self._random)[:length]
            seed = self.num_made % len(self.script.tokens)
            self.num_made += 1
            text = [*prompt, *output][: self.max_len]
            self.script.tokens[seed, : len(text)] = torch.tensor(text)
            requests.append(Request(f"{case}{self.num_made}", prompt, params, seed))
        return requests

    def _random(self, count: int) -> list[int]:
        return [self._draw.randrange(100_000) for _ in range(count)]


def edited(draw: random.Random, file: list[int], new: Callable[[int], list[int]]) -> list[int]:
    """The file with one change in about 50 tokens: some of them replaced by some others."""
    text, at = [], 0
    while at < len(file):
        kept = draw.randint(20, 80)
        text += file[at : at + kept] + new(draw.randint(1, 6))
        at += kept + draw.randint(0, 4)
    return text


def show_floor(scripts: Scripts) -> None:
    """What a step of a row costs by its tokens, over a context of the file's length."""
    runner, context = scripts.engine.runner, scripts._arguments.file
    times: dict[int, float] = {}
    for length in (1, 2, 4, 8, 16):
        plan = StepPlan()
        plan.add(0, context - length, length, length)
        samples = []
        for _ in range(4):
            start = time.perf_counter()
            runner.launch(plan).result()
            samples.append(time.perf_counter() - start)
        times[length] = min(samples)
    shown = ", ".join(f"{n}: {times[n] / times[1]:.2f}" for n in times)
    print(f"a step of n tokens, over the {1e3 * times[1]:.0f} ms of one: {shown}", flush=True)


# --- The demo model -----------------------------------------------------------------------------


def schema_of(answer: str) -> dict[str, Any]:
    """An object with the answer's fields, in its order."""
    kinds = {name: type(value).__name__ for name, value in json.loads(answer).items()}
    return {
        "type": "object",
        "properties": {
            name: {"type": {"str": "string", "int": "integer"}[kind]}
            for name, kind in kinds.items()
        },
        "required": list(kinds),
        "additionalProperties": False,
    }


class Chats:
    """Requests of the cases (b) and (c)."""

    num_pairs = 6  # they are short

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.llm = LLM(
            "manta-demo",
            dtype="float32",
            max_num_seqs=max(arguments.batches),
            speculation="suffix",
            num_threads=arguments.threads,
        )
        self.engine = self.llm.engine
        self._draw = random.Random(arguments.seed)
        self._max_tokens = arguments.output
        self._num_made = 0

    def make(self, case: str, batch: int) -> list[Request]:
        kinds = {"b": ["extract"], "c": ["repeat", "recall"]}[case]
        requests = []
        for _ in range(batch):
            sample = draw(self._draw.choice(kinds), self._draw, held_out=True, thinking=False)
            rules: dict[str, Any] = {}
            if case == "b":
                rules["structured_outputs"] = StructuredOutputs(json=schema_of(sample.answer))
            prompt = self.llm.get_tokenizer().encode_chat(sample.messages, enable_thinking=False)
            params = SamplingParams(temperature=0, max_tokens=self._max_tokens, **rules)
            self._num_made += 1
            requests.append(Request(str(self._num_made), prompt, params, seed=0))
        return requests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=list("abcd"), default=list("abcd"))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--file", type=int, default=2000, help="tokens of the file of (a) and (d)")
    parser.add_argument("--output", type=int, default=128, help="tokens of an output, alone")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=None, help="of the demo model")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for cases, source in (("ad", Scripts), ("bc", Chats)):
        chosen = [case for case in cases if case in arguments.cases]
        if not chosen:
            continue
        with torch.inference_mode():
            made = source(arguments)
            if isinstance(made, Scripts):
                show_floor(made)
            for batch in arguments.batches:
                for case in chosen:
                    pairs = [
                        pair(made.engine, lambda: made.make(case, batch))  # noqa: B023
                        for _ in range(made.num_pairs * arguments.pairs)
                    ]
                    report(case, batch, pairs)
        made.engine.close()


if __name__ == "__main__":
    main()
