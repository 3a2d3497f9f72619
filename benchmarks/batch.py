"""The batch job against `LLM.generate`: a submitted job, killed halfway and resumed.

Starts a Ray cluster of its own, submits a job, kills its driver when --kill-at of the rows are
done, submits it again, and checks that the output has each row once with the text that
`LLM.generate` gives. The speed is that of the resumed job, once its engine was ready.

    python -m benchmarks.batch --model manta-demo --num-prompts 2000
"""

import argparse
import json
import random
import re
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.job_cluster import JobCluster, kill_driver
from engine import LLM, SamplingParams

_SUMMARY = re.compile(r"([\d,]+) output tokens in ([\d.]+) s after ([\d.]+) s of start-up")


@dataclass(frozen=True)
class Workload:
    """Greedy completions of many lengths; a fixed number of tokens each."""

    prompts: list[str]
    max_tokens: list[int]

    @classmethod
    def draw(cls, num_prompts: int, longest: int, seed: int) -> "Workload":
        rng = random.Random(seed)
        prompts = [
            f"{i}: " + " ".join(str(rng.randrange(1000)) for _ in range(rng.randint(4, 32)))
            for i in range(num_prompts)
        ]
        return cls(prompts, [rng.randint(longest // 8, longest) for _ in prompts])

    def write(self, path: Path) -> None:
        """As an OpenAI Batch file."""
        with path.open("w") as file:
            for index, (prompt, length) in enumerate(
                zip(self.prompts, self.max_tokens, strict=True)
            ):
                body = {"prompt": prompt, "max_tokens": length, "ignore_eos": True}
                row = {"custom_id": str(index), "method": "POST", "url": "/v1/completions"}
                file.write(json.dumps(row | {"body": body}) + "\n")

    @property
    def params(self) -> list[SamplingParams]:
        return [
            SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
            for length in self.max_tokens
        ]


def run_jobs(arguments: argparse.Namespace, workload: Workload, directory: Path) -> dict[str, Any]:
    """Submit, kill, submit again; the speed and the start-up of the second run."""
    source, output = directory / "in.jsonl", directory / "out"
    workload.write(source)
    options = [
        *("--model", arguments.model, "--input", str(source), "--output", str(output)),
        *("--temperature", "0", "--dtype", arguments.dtype),
        *("--max-num-seqs", str(arguments.max_num_seqs)),
        *("--rows-per-part", str(arguments.rows_per_part)),
    ]
    with JobCluster() as cluster:
        first = cluster.submit(*options)
        done = _wait_for_rows(first, output, round(arguments.kill_at * arguments.num_prompts))
        kill_driver(output)
        first.communicate()
        print(f"killed with {done} rows done")
        printed = cluster.run(*options, timeout_s=arguments.timeout)
    print("\n".join(line for line in printed.splitlines() if line.startswith("batch:")))
    found = _SUMMARY.search(printed)
    assert found, printed
    tokens, seconds, start_up = (float(number.replace(",", "")) for number in found.groups())
    return {
        "rows_done_when_killed": done,
        "texts": _read_texts(output),
        "tokens_per_s": tokens / seconds,
        "start_up_s": start_up,
    }


def _wait_for_rows(job: "subprocess.Popen[str]", output: Path, num_rows: int) -> int:
    while (done := sum(_count_lines(part) for part in output.glob("part-*"))) < num_rows:
        if job.poll() is not None:
            raise RuntimeError(f"the job ended before it could be killed:\n{job.communicate()[0]}")
        time.sleep(0.1)
    return done


def _count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n")


def _read_texts(output: Path) -> list[tuple[str, str]]:
    """(custom_id, text) of every row in the output."""
    rows = [json.loads(line) for part in sorted(output.glob("part-*")) for line in part.open()]
    return [(r["custom_id"], r["response"]["body"]["choices"][0]["text"]) for r in rows]


def run_llm(
    arguments: argparse.Namespace, workload: Workload, num_done: int
) -> tuple[list[str], float]:
    """(the texts, output tokens per second of the rows that the resumed job had to answer)"""
    llm = LLM(arguments.model, dtype=arguments.dtype, max_num_seqs=arguments.max_num_seqs)
    prompts, params = workload.prompts, workload.params
    outputs = llm.generate(prompts[:num_done], params[:num_done])
    start = time.perf_counter()
    outputs += llm.generate(prompts[num_done:], params[num_done:])
    seconds = time.perf_counter() - start
    llm.close()
    texts = [output.outputs[0].text for output in outputs]
    return texts, sum(workload.max_tokens[num_done:]) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="manta-demo", help="checkpoint directory or hub id")
    parser.add_argument("--num-prompts", type=int, default=2000)
    parser.add_argument("--max-tokens", type=int, default=128, help="the longest output")
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--rows-per-part", type=int, default=32)
    parser.add_argument("--dtype", default="float32", help="in bfloat16 near-ties may differ")
    parser.add_argument("--kill-at", type=float, default=0.4, help="share of the rows")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for the resumed job")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    arguments = parser.parse_args()

    workload = Workload.draw(arguments.num_prompts, arguments.max_tokens, arguments.seed)
    with tempfile.TemporaryDirectory() as directory:
        job = run_jobs(arguments, workload, Path(directory))
    expected, llm_speed = run_llm(arguments, workload, job["rows_done_when_killed"])
    texts = job.pop("texts")
    result = job | {
        "rows": len(texts),
        "distinct_rows": len({custom_id for custom_id, _ in texts}),
        "equal_rows": sum(expected[int(custom_id)] == text for custom_id, text in texts),
        "llm_tokens_per_s": llm_speed,
        "ratio": job["tokens_per_s"] / llm_speed,
    }
    for name, value in result.items():
        print(f"{name}: {value:.3f}" if isinstance(value, float) else f"{name}: {value}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
