"""Loading takes the memory of the weights in the layout they end in, and little more."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.random_gguf import write_gguf
from benchmarks.shape import DenseShape
from engine.checkpoint.source import resolve
from tests.conftest import CheckpointFactory

MIB = 1 << 20

# Reports, in bytes of this process alone, what loading took at its peak and what it left.
SCRIPT = """
import json, sys, threading
import torch
from pathlib import Path
from engine.models import loader
from engine.config import EngineConfig
from engine.models.registry import read_config
from engine.models.shape import ModelSpec
from engine.device.memory import MemoryMeter
from engine.ranks.rank_group import RankGroup
from kernels import select_ops

directory, quantization = Path(sys.argv[1]), sys.argv[2] or None
dtype = getattr(torch, sys.argv[3])
shape = read_config(directory)
device = torch.device("cpu")
torch.set_num_threads(1)
ops = select_ops(device)
ops.pack_linear(torch.randn(64, 64), None, quantization)(torch.randn(2, 64))
meter = MemoryMeter(device)
before = peak = meter.in_use()
done = threading.Event()

def watch():
    global peak
    while not done.wait(0.0005):
        peak = max(peak, meter.in_use())

watcher = threading.Thread(target=watch)
watcher.start()
config = EngineConfig(model=str(directory), quantization=quantization)
model = loader.load_model(
    ModelSpec(config, shape, directory, 64, dtype, device, ops, RankGroup())
)
done.set()
watcher.join()
print(json.dumps([peak - before, meter.in_use() - before]))
"""


@pytest.mark.parametrize("quantization, share", [("", 1.0), ("w8a8", 0.25)])
def test_weights_are_never_there_twice(
    checkpoints: CheckpointFactory, quantization: str, share: float
) -> None:
    """Not even the float weights of a model that is quantized when it is loaded."""
    directory = checkpoints("llama3", hidden_size=512, intermediate_size=2048, num_hidden_layers=10)
    weights = sum(path.stat().st_size for path in Path(directory).glob("*.safetensors"))
    assert weights > 150 * MIB
    peak, left = load(directory, quantization, "float32")
    assert abs(left - share * weights) < 25 * MIB
    assert peak < left + 45 * MIB, "more than a layer's linear maps besides"


def test_a_gguf_file_is_packed_some_rows_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its embedding, which is the head as well, is there once, and with the bits of the file."""
    monkeypatch.setattr("engine.checkpoint.derived.cache", lambda: tmp_path / "cache")
    path = tmp_path / "tied.gguf"
    write_gguf(
        DenseShape(32_768, 2048, 2048, 2, 8, 2, 128, 1e-6, 512, True, None, True), path, "Q4_0"
    )
    peak, left = load(resolve(str(path)), "", "bfloat16")
    assert abs(left - path.stat().st_size) < 15 * MIB
    assert peak < left + 45 * MIB, "the head has levels of 64 MiB"


def load(directory: Path, quantization: str, dtype: str) -> tuple[int, int]:
    """Bytes at the peak, and in the end."""
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(directory), quantization, dtype],
        # Else glibc keeps some of what was freed, more or less by chance.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": str(MIB)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    peak, left = json.loads(result.stdout)
    return peak, left
