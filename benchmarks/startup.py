"""From a fresh process to the first token: seconds per phase, and the most memory it took.

Memory is the process' own (anonymous) pages, sampled every 10 ms; the checkpoint's pages, which the
kernel can drop at any time, are listed apart. Where the compiled CPU kernels are not in the cache
yet, building them is part of "kernels".

    python -m benchmarks.startup --model DIRECTORY [--quantization w8a8]
"""

import argparse
import functools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

_BEGIN = time.perf_counter()
_T = TypeVar("_T")
_GIB = 2**30


class PeakMemory(threading.Thread):
    """The largest (own, file) memory of this process since the start, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.own = self.files = 0
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.01):
            status = dict(
                line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
            )
            self.own = max(self.own, int(status["RssAnon"].split()[0]) * 1024)
            self.files = max(self.files, int(status["RssFile"].split()[0]) * 1024)

    def stop(self) -> None:
        self._done.set()
        self.join()


class Phases:
    """Seconds by name; `timed` makes a function add to one of them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def timed(self, name: str, function: Callable[..., _T]) -> Callable[..., _T]:
        @functools.wraps(function)
        def call(*arguments: Any, **keywords: Any) -> _T:
            start = time.perf_counter()
            try:
                return function(*arguments, **keywords)
            finally:
                self.seconds[name] = self.seconds.get(name, 0) + time.perf_counter() - start

        return call


def run(model: str, options: dict[str, Any], load_format: str) -> None:
    phases = Phases()
    memory = PeakMemory()
    memory.start()
    from benchmarks.floor import weight_bytes
    from benchmarks.shape import read_shape
    from engine import LLM, SamplingParams, checkpoint
    from engine.models import loader
    from engine.models.decoder import CausalLM
    from engine.runner import model_runner

    phases.seconds["import"] = time.perf_counter() - _BEGIN
    for name, owner, attribute in (
        ("kernels", model_runner, "select_ops"),
        ("load and pack weights", loader, "load_weights"),
        ("load and pack weights", loader, "load_dummy_weights"),
        ("pack head", CausalLM, "pack_head"),
    ):
        setattr(owner, attribute, phases.timed(name, getattr(owner, attribute)))
    llm = phases.timed("LLM", LLM)(model, load_format=load_format, **options)
    phases.timed("first token", llm.generate)(
        [[1, 2, 3]], SamplingParams(max_tokens=1), use_tqdm=False
    )
    total = time.perf_counter() - _BEGIN
    inner = sum(phases.seconds[n] for n in ("kernels", "load and pack weights", "pack head"))
    phases.seconds["rest of LLM"] = phases.seconds.pop("LLM") - inner
    # Fill the pool and a whole step, for the memory that serving takes.
    config, limits = llm.engine.config, llm.engine.limits
    length = min(limits.max_len - 8, config.step_size.tokens)
    prompts = [[i % 100 + 1] * length for i in range(config.step_size.rows)]
    llm.generate(prompts, SamplingParams(max_tokens=8, ignore_eos=True), use_tqdm=False)
    memory.stop()

    runner = llm.engine.runner
    pool = sum(part.nbytes for cache in runner.forward_pass.kv_caches for part in cache.tensors)
    shape = read_shape(checkpoint.resolve(model))
    embedding = shape.vocab_size * shape.hidden_size * runner.dtype.itemsize
    weights = weight_bytes(shape, llm.config.quantization, runner.dtype.itemsize) + embedding
    print(" ".join(f"{name} {seconds:.2f} s;" for name, seconds in phases.seconds.items()))
    print(f"{total:.2f} s to the first token")
    print(
        f"weights {weights / _GIB:.2f} + pool {pool / _GIB:.2f} GiB; peak {memory.own / _GIB:.2f},"
        f" {(memory.own - weights - pool) / _GIB:+.2f} GiB beside them; "
        f"pages of files at most {memory.files / _GIB:.2f} GiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="checkpoint directory or hub id")
    parser.add_argument("--load-format", default="safetensors", choices=["safetensors", "dummy"])
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--max-num-seqs", type=int, default=8)
    parser.add_argument("--quantization", choices=["w8a8", "int4"])
    arguments = parser.parse_args()
    options = {
        "max_model_len": arguments.max_model_len,
        "max_num_seqs": arguments.max_num_seqs,
        "quantization": arguments.quantization,
    }
    run(arguments.model, options, arguments.load_format)


if __name__ == "__main__":
    main()
