"""What nano-vLLM's host does for a step that decodes, as `benchmarks.host --nano-vllm DIR` has it.

Its scheduler, its preparation of a step, its copies into a graph's tensors and its bookkeeping are
its own, from a checkout; the device is left out: pinned memory and copies to it are what they are
on a CPU, a graph does nothing when it is replayed, and the tokens are all 0.
"""

import gc
import random
import sys
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from torch import Tensor

_EOS = -1
_MAX_LEN = 4096  # its default: the block tables of its graphs are for so many tokens
_BLOCK_SIZE = 256


def measure_nano_vllm(directory: Path, num_rows: int, num_steps: int) -> dict[str, float]:
    """Median milliseconds of a step of the processor's time."""
    sys.path.insert(0, str(directory))
    sys.modules.setdefault("flash_attn", MagicMock())  # imported by it, and never called here
    from nanovllm.engine import model_runner, scheduler, sequence
    from nanovllm.sampling_params import SamplingParams

    sequence.Sequence.block_size = _BLOCK_SIZE
    config = SimpleNamespace(
        max_num_seqs=num_rows,
        max_num_batched_tokens=16384,
        eos=_EOS,
        kvcache_block_size=_BLOCK_SIZE,
        num_kvcache_blocks=num_rows * _MAX_LEN // _BLOCK_SIZE,
    )
    its_scheduler = scheduler.Scheduler(config)
    draw = random.Random(0)
    params = SamplingParams(ignore_eos=True, max_tokens=num_steps + 64)
    for _ in range(num_rows):
        prompt = [draw.randrange(1000) for _ in range(draw.randint(97, 128))]
        its_scheduler.add(sequence.Sequence(prompt, params))
    runner = _without_a_device(model_runner.ModelRunner, num_rows)

    def step() -> bool:
        sequences, is_prefill = its_scheduler.schedule()
        tokens = [0] * len(sequences) if is_prefill else runner.run(sequences, False)
        its_scheduler.postprocess(sequences, tokens, is_prefill)
        # What its loop over generate does besides: who has finished.
        _ = [(s.seq_id, s.completion_token_ids) for s in sequences if s.is_finished]
        return bool(is_prefill)

    of_a_list = torch.tensor

    def unpinned(*args: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        return of_a_list(*args, **options)

    samples = []
    with (
        patch.object(torch, "tensor", unpinned),
        patch.object(Tensor, "cuda", lambda tensor, non_blocking=False: tensor),
    ):
        while step():
            pass
        gc.collect()
        gc.freeze()
        for _ in range(num_steps):
            start = time.thread_time()
            step()
            samples.append(time.thread_time() - start)
        gc.unfreeze()
    return {"step": 1e3 * median(samples)}


def _without_a_device(runner_class: Any, num_rows: int) -> Any:
    runner = runner_class.__new__(runner_class)
    runner.rank, runner.block_size, runner.enforce_eager = 0, _BLOCK_SIZE, False
    runner.model = SimpleNamespace(compute_logits=lambda hidden: hidden)
    runner.sampler = lambda logits, _: torch.zeros(len(logits), dtype=torch.int64)
    runner.graph_bs = [num_rows]
    runner.graphs = {num_rows: SimpleNamespace(replay=lambda: None)}
    of_rows = torch.zeros(num_rows, dtype=torch.int32)
    runner.graph_vars = {
        "input_ids": torch.zeros(num_rows, dtype=torch.int64),
        "positions": torch.zeros(num_rows, dtype=torch.int64),
        "slot_mapping": of_rows,
        "context_lens": of_rows.clone(),
        "block_tables": torch.zeros(num_rows, _MAX_LEN // _BLOCK_SIZE, dtype=torch.int32),
        "outputs": torch.zeros(num_rows, 8),
    }
    return runner
