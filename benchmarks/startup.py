"""From a fresh process to the first token: seconds per phase, and the most memory it took.

Memory is the process' own (anonymous) pages, sampled every 10 ms; the checkpoint's pages, which the
kernel can drop at any time, are listed apart. Where the compiled CPU kernels are not in the cache
yet, building them is part of "kernels".

With --kept, twice more, as on a node that keeps weights: once as the first to load these, which
leaves them in shared memory, and once as the next, which finds them there.

With --update, how long the engine then takes to go on with weights that it reads anew.

    python -m benchmarks.startup --model DIRECTORY [--quantization w8a8] [--kept] [--update]
"""

import argparse
import functools
import os
import subprocess
import sys
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
        self.own = self.files = self.shared = self.all = 0
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.01):
            status = dict(
                line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
            )
            own, shared, files = (
                int(status[f"Rss{kind}"].split()[0]) * 1024 for kind in ("Anon", "Shmem", "File")
            )
            self.own, self.shared = max(self.own, own), max(self.shared, shared)
            self.files = max(self.files, files)
            self.all = max(self.all, own + shared + files)

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


def run(
    model: str, options: dict[str, Any], load_format: str, file: str | None, updates: bool
) -> None:
    phases = Phases()
    memory = PeakMemory()
    memory.start()
    from benchmarks.floor import weight_bytes
    from benchmarks.shape import read_shape
    from engine import LLM, SamplingParams, engine
    from engine import llm as llm_module
    from engine.checkpoint.source import resolve
    from engine.models import loader, shared
    from engine.models.decoder import CausalLM
    from engine.runner import model_runner

    phases.seconds["import"] = time.perf_counter() - _BEGIN
    for name, owner, attribute in (
        ("kernels", model_runner, "select_ops"),
        ("leave in or take from shared memory", shared.SharedFile, "_fill"),
        ("leave in or take from shared memory", shared.SharedFile, "_read"),
        ("load and pack weights", loader, "load_weights"),
        ("load and pack weights", loader, "load_dummy_weights"),
        ("pack head", CausalLM, "pack_head"),
    ):
        setattr(owner, attribute, phases.timed(name, getattr(owner, attribute)))
    if file is not None:
        of_file = functools.partial(engine.Engine, files=lambda _: file)
        setattr(llm_module, "Engine", of_file)  # noqa: B010
    llm = phases.timed("LLM", LLM)(model, load_format=load_format, **options)
    phases.timed("first token", llm.generate)(
        [[1, 2, 3]], SamplingParams(max_tokens=1), use_tqdm=False
    )
    total = time.perf_counter() - _BEGIN
    whole, outside = phases.seconds.pop("LLM"), ("import", "first token")
    inner = sum(seconds for name, seconds in phases.seconds.items() if name not in outside)
    phases.seconds["rest of LLM"] = whole - inner
    # Fill the pool and a whole step, for the memory that serving takes.
    config, limits = llm.engine.config, llm.engine.limits
    length = min(limits.max_len - 8, config.step_size.tokens)
    prompts = [[i % 100 + 1] * length for i in range(config.step_size.rows)]
    llm.generate(prompts, SamplingParams(max_tokens=8, ignore_eos=True), use_tqdm=False)
    memory.stop()

    runner = llm.engine.runner
    pool = sum(part.nbytes for cache in runner.forward_pass.kv_caches for part in cache.tensors)
    shape = read_shape(resolve(model))
    embedding = shape.vocab_size * shape.hidden_size * runner.dtype.itemsize
    weights = weight_bytes(shape, llm.config.quantization, runner.dtype.itemsize) + embedding
    if (file_of_bits := Path(model)).suffix == ".gguf":
        weights = file_of_bits.stat().st_size
        per_gb = phases.seconds["load and pack weights"] / weights * 1e9
        print(f"a file of {weights / _GIB:.2f} GiB, packed in {per_gb:.1f} s for each GB")
    print(" ".join(f"{name} {seconds:.2f} s;" for name, seconds in phases.seconds.items()))
    print(f"{total:.2f} s to the first token")
    if updates:
        begin = time.perf_counter()
        llm.update_weights_from_disk(model)
        print(f"{time.perf_counter() - begin:.2f} s for new weights in this engine")
    print(
        f"weights {weights / _GIB:.2f} + pool {pool / _GIB:.2f} GiB; peak {memory.own / _GIB:.2f},"
        f" {(memory.own - weights - pool) / _GIB:+.2f} GiB beside them; "
        f"in shared memory {memory.shared / _GIB:.2f}, pages of files at most "
        f"{memory.files / _GIB:.2f}, all of it at most {memory.all / _GIB:.2f} GiB"
    )


def run_kept() -> None:
    """Three processes, one after the other."""
    file = os.memfd_create("weights")
    shared = ["--weights", f"/proc/{os.getpid()}/fd/{file}"]
    command = [sys.executable, "-m", "benchmarks.startup", *sys.argv[1:]]
    command.remove("--kept")
    for name, more in (("by itself", []), ("the first", shared), ("the next", shared)):
        print(f"--- {name}", flush=True)
        subprocess.run([*command, *more], check=True, stderr=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="checkpoint directory or hub id")
    parser.add_argument("--load-format", default="safetensors", choices=["safetensors", "dummy"])
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--max-num-seqs", type=int, default=8)
    parser.add_argument("--quantization", choices=["w8a8", "int4"])
    parser.add_argument("--kept", action="store_true", help="and from shared memory")
    parser.add_argument("--update", action="store_true", help="and with other weights")
    parser.add_argument("--weights", help="a file in shared memory, for --kept's own use")
    arguments = parser.parse_args()
    if arguments.kept:
        run_kept()
        return
    options = {
        "max_model_len": arguments.max_model_len,
        "max_num_seqs": arguments.max_num_seqs,
        "quantization": arguments.quantization,
    }
    run(arguments.model, options, arguments.load_format, arguments.weights, arguments.update)


if __name__ == "__main__":
    main()
