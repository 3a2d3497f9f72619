"""What is most often wrong on a first GPU, alone and small: steps launched, replayed, and over fp8.

    python -m benchmarks.smoke [--model DIRECTORY]

Prints how many tokens came, how many steps were replayed, and which kernels were compiled while
requests were waiting: there should be none.
"""

import argparse
from typing import Any

import torch

from benchmarks.floor import SHAPE
from engine import LLM, SamplingParams

_CONFIGS: tuple[dict[str, Any], ...] = ({"enforce_eager": True}, {}, {"kv_cache_dtype": "fp8"})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(SHAPE), help="directory of a config.json")
    arguments = parser.parse_args()
    params = SamplingParams(
        temperature=0.6, top_p=0.95, top_k=20, max_tokens=40, ignore_eos=True, logprobs=1
    )
    for config in _CONFIGS:
        llm = LLM(
            arguments.model,
            load_format="dummy",
            max_model_len=512,
            max_num_seqs=8,
            num_blocks=512,
            **config,
        )
        outputs = llm.generate([[5, 6, 7] * 100, [9] * 33], params, use_tqdm=False)
        lengths = [len(output.outputs[0].token_ids) for output in outputs]
        stats, runner = llm.engine.stats(), llm.engine.runner
        print(
            f"{config}: {lengths} tokens, {stats['replayed_steps']} steps replayed, late "
            f"compilations: {runner.late_compilations}, {runner.ops.name}",
            flush=True,
        )
        llm.close()
        del llm, runner
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
