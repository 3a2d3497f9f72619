"""What this machine offers an engine, and which kernels it will run with, with the reasons."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from engine.config import EngineConfig
from engine.device.cpu_speed import measure
from engine.device.memory import available_bytes
from engine.device.threads import num_compute_threads
from kernels import AttentionNeeds, Ops, select_ops
from kernels.cache import cache_directory

_HEAD_DIM = 128  # of most models


@dataclass(frozen=True)
class Finding:
    """One line of a diagnosis."""

    state: Literal["ok", "note", "bad"]  # "note": it works, but something could be better
    what: str
    text: str
    fix: str = ""  # the command that changes it


def examine() -> list[Finding]:
    """Devices, drivers, compilers and the ops that are chosen because of them."""
    found = [Finding("ok", "PyTorch", torch.__version__), *_gpus(), _cpu(), _memory()]
    if shadowed := _other_kernels():
        return [*found, shadowed]
    found.append(_compiler())
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    return [*found, *(each for device in devices for each in _ops(torch.device(device)))]


def _gpus() -> list[Finding]:
    if torch.cuda.is_available():
        found = []
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            free, total = (size / 2**30 for size in torch.cuda.mem_get_info(index))
            text = (
                f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
                f"{free:.0f} of {total:.0f} GiB free; CUDA {torch.version.cuda}"
            )
            found.append(Finding("ok", f"GPU {index}", text))
        return found
    if shutil.which("nvidia-smi") is None and not any(Path("/dev").glob("nvidia[0-9]*")):
        return [Finding("ok", "GPU", "none; engines run on the CPU")]
    if torch.version.cuda is None:
        text = "there is one, but this PyTorch was built without CUDA"
        return [Finding("bad", "GPU", text, "pip install --force-reinstall torch")]
    text = f"there is one, but PyTorch's CUDA {torch.version.cuda} cannot use it: {_driver()}"
    return [Finding("bad", "GPU", text, "nvidia-smi   # compare the driver's CUDA version")]


def _driver() -> str:
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi fails ({error})"
    return f"driver {done.stdout.strip().splitlines()[0]}"


def _attention(properties: Any) -> Finding:
    """Which kernels attend, for what models usually need; `properties` are a CUDA device's."""
    from kernels.cuda import flash_attention

    dtype, block_size = torch.bfloat16, EngineConfig.model_fields["block_size"].default
    needs = AttentionNeeds("auto", dtype, dtype, _HEAD_DIM, block_size)
    capability = (properties.major, properties.minor)
    found = flash_attention.find(needs, capability, properties.multi_processor_count)
    if not isinstance(found, str):
        text = f"{found.name} for prompts (tensor cores), Triton for decoding (bound by memory)"
        return Finding("ok", "Attention", text)
    text = f"Triton for prompts and decoding, for {found}"
    if "cannot be imported" in found:
        return Finding("note", "Attention", text, "pip install -e '.[cuda]'")
    return Finding("ok", "Attention", text)


def _cpu() -> Finding:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(
            (x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), "CPU"
        )
    except OSError:
        name = "CPU"
    threads = num_compute_threads(1)
    text = f"{name}; {os.cpu_count()} logical CPUs, an engine computes on {threads}"
    return Finding("ok", "CPU", text)


def _memory() -> Finding:
    free = available_bytes() / 2**30
    total = psutil.virtual_memory().total / 2**30
    text = f"{free:.1f} of {total:.1f} GiB available"
    if free < 2:
        return Finding("note", "Memory", f"{text}; a small model needs about 2", "free -h")
    return Finding("ok", "Memory", text)


def _other_kernels() -> Finding | None:
    """Hugging Face has a package `kernels` too; where that one is found, no engine can load."""
    spec = find_spec("kernels")
    origin = Path(spec.origin) if spec is not None and spec.origin else None
    if origin is not None and (origin.parent / "ops.py").exists():
        return None
    text = f"{origin} is not Manta's package of that name; the two cannot share an environment"
    fix = "pip uninstall -y kernels && pip install --force-reinstall --no-deps manta-llm"
    return Finding("bad", "kernels", text, fix)


def _compiler() -> Finding:
    from kernels.cpu import build, compiler

    if build.packaged_library() is not None:
        return Finding("ok", "C++ compiler", "not needed, for this wheel holds the kernels")
    try:
        found = compiler.find_compiler()
    except compiler.BuildError as error:
        text = (
            f"{error}; without one, attention and sampling run in plain torch, about 3 times slower"
        )
        return Finding("note", "C++ compiler", text, "apt-get install g++")
    return Finding("ok", "C++ compiler", compiler.version_of(found).splitlines()[0])


def _ops(device: torch.device) -> list[Finding]:
    """Builds the CPU kernels if they have not been built yet."""
    if device.type == "cpu":
        before = torch.get_num_threads()
        torch.set_num_threads(num_compute_threads())
        try:
            return _cpu_ops(select_ops(device))
        finally:
            torch.set_num_threads(before)
    return _cuda_ops(torch.cuda.get_device_properties(device))


def _cuda_ops(properties: Any) -> list[Finding]:
    """For a CUDA device of these properties."""
    what, install = "Ops on CUDA", "pip install -e '.[cuda]'"
    if find_spec("triton") is None:
        return [Finding("bad", what, "none, for Triton is not installed", install)]
    from kernels.cuda import ops

    if (refused := ops.refusal(properties, None)) is not None:
        return [Finding("bad", what, f"none: {refused}", "manta serve … device=cpu")]
    if (lacking := ops.lacking()) is not None:
        text = f"Triton needs {lacking} when it launches its first kernel"
        return [Finding("bad", what, text, "apt-get install gcc python3-dev")]
    return [Finding("ok", what, "Triton's"), _attention(properties)]


def _cpu_ops(ops: Ops) -> list[Finding]:
    from kernels.cpu import build

    if ops.name == "cpu-torch":
        text = "plain torch, for the kernels could not be compiled (see the warning above)"
        return [Finding("note", "Ops on CPU", text, "apt-get install g++")]
    why = "as MANTA_CPU_ISA says" if os.environ.get("MANTA_CPU_ISA") else "the best this CPU has"
    where = "the wheel" if build.packaged_library() is not None else str(cache_directory())
    text = f"{ops.name}: all in C++, at level {build.choose_level().name}, {why}; in {where}"
    return [Finding("ok", "Ops on CPU", text), *_cpu_speed(ops)]


def _cpu_speed(ops: Ops) -> list[Finding]:
    speed = measure(ops)
    how = {kind: ops.products.get(getattr(torch, kind, kind)) for kind in speed.flops_per_s}
    rates = ", ".join(
        f"{kind} {rate / 1e9:.0f}" + (f" ({how[kind]})" if how[kind] else "")
        for kind, rate in speed.flops_per_s.items()
    )
    text = f"reads {speed.bytes_per_s / 1e9:.0f} GB/s; products in GFLOP/s: {rates}"
    dtype = speed.fastest(("bfloat16", "float32"), (1, 8, 32))
    best = "dtype=auto, the checkpoint's" if dtype == "bfloat16" else f"dtype={dtype}"
    many, one = (speed.fastest(("w8a8", "int4"), tokens) for tokens in ((1, 8, 32), (1,)))
    best += f"; for speed quantization={many}"
    if one != many:
        best += f", or {one} where requests mostly come one at a time"
    return [Finding("ok", "Speed of the CPU", text), Finding("ok", "Best on the CPU", best)]
