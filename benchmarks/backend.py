"""Decoding by transformers' modules beside that by our own blocks: tokens/s of both, in turns.

python -m benchmarks.backend --batch 1 8
python -m benchmarks.backend --model ./SmolLM2.gguf --option load_format=safetensors
"""

import argparse
import time
from statistics import median

from benchmarks.floor import SHAPE
from benchmarks.steps import fill, give_up
from benchmarks.throughput import parse_option
from engine import LLM
from engine.engine import Engine


def rate(engine: Engine, batch: int, steps: int) -> float:
    """Tokens/s of so many steps, in which all requests decode."""
    start = time.perf_counter()
    tokens = sum(len(engine.step()) for _ in range(steps))
    return tokens / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(SHAPE), help="a model that our own blocks compute")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=100, help="tokens of each prompt")
    parser.add_argument("--steps", type=int, default=20, help="decoding steps of each turn")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="any EngineConfig field"
    )
    arguments = parser.parse_args()
    # Chunks of some prompts may be computed while others decode already.
    output = (arguments.turns + 1) * arguments.steps + arguments.prompt
    options = {"load_format": "dummy"} | dict(map(parse_option, arguments.option))
    engines = {
        impl: LLM(
            arguments.model,
            model_impl=impl,
            max_model_len=arguments.prompt + output,
            max_num_seqs=max(arguments.batch),
            kv_cache_memory_bytes=2**29,
            **options,
        ).engine
        for impl in ("auto", "transformers")
    }
    for batch in arguments.batch:
        rates: dict[str, list[float]] = {impl: [] for impl in engines}
        for engine in engines.values():
            fill(engine, batch, arguments.prompt, output)
            rate(engine, batch, arguments.steps)
        for _ in range(arguments.turns):
            for impl, engine in engines.items():
                rates[impl].append(rate(engine, batch, arguments.steps))
        ratios = [theirs / ours for ours, theirs in zip(*rates.values(), strict=True)]
        print(
            f"batch {batch}: own blocks {median(rates['auto']):.1f} tokens/s, transformers' "
            f"{median(rates['transformers']):.1f}; in pairs {median(ratios):.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f})",
            flush=True,
        )
        for engine in engines.values():
            give_up(engine)


if __name__ == "__main__":
    main()
