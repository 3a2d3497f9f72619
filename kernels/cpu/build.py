"""The library of kernels for the processor at hand: from the wheel, or compiled once and kept."""

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kernels.cache import cache_directory
from kernels.cpu.compiler import (
    FLAGS,
    SOURCE_DIR,
    BuildError,
    Level,
    compile_library,
    find_compiler,
    levels,
    version_of,
)

_PACKAGED = SOURCE_DIR / "lib"  # of a wheel: every level's library
_logger = logging.getLogger(__name__)


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The kernels, of the wheel or compiled if need be; None, after one warning, without either."""
    try:
        return ctypes.CDLL(str(packaged_library() or build(choose_level())))
    except (BuildError, OSError) as error:
        _logger.warning(
            "CPU kernels are not available, so attention and sampling run in plain torch, about "
            "three times slower in all: %s",
            error,
        )
        return None


def packaged_library() -> Path | None:
    """What this installation needs no compiler for; None where the kernels are compiled here."""
    library = _PACKAGED / f"{choose_level().name}.so"
    return library if library.exists() else None


def choose_level() -> Level:
    """The best level this CPU has, or a lower one asked for by MANTA_CPU_ISA."""
    found = levels()
    names = [level.name for level in found]
    features = cpu_features()
    best = next(i for i, level in enumerate(found) if level.needs <= features)
    asked = os.environ.get("MANTA_CPU_ISA", "")
    if asked and asked not in names:
        raise ValueError(f"MANTA_CPU_ISA: {asked!r} is unknown; choose from {', '.join(names)}")
    return found[max(best, names.index(asked) if asked else 0)]


def cpu_features() -> set[str]:
    """By the names of Linux."""
    if sys.platform == "darwin":
        return _apple_features()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    words = (line.split() for line in lines if line.startswith(("flags", "Features")))
    return {word for line in words for word in line}


def _apple_features() -> set[str]:
    """Every arm64 of Apple has dot products, since M2 also of bfloat16."""
    asked = {"asimddp": "hw.optional.arm.FEAT_DotProd", "bf16": "hw.optional.arm.FEAT_BF16"}
    done = subprocess.run(["sysctl", *asked.values()], capture_output=True, text=True, check=False)
    return {feature for feature, name in asked.items() if f"{name}: 1" in done.stdout}


def build(level: Level, compiler: str | None = None) -> Path:
    """Path of a level's library. Processes that start at once build it once."""
    compiler = compiler or find_compiler()
    flags = repr((FLAGS, level.flags, platform.machine(), version_of(compiler)))
    digest = hashlib.sha256(flags.encode())
    for path in sorted([*SOURCE_DIR.glob("*.cpp"), *SOURCE_DIR.glob("*.h")]):
        digest.update(path.read_bytes())
    directory = cache_directory()
    library = directory / f"cpu-{level.name}-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        with _lock(directory / f"{library.name}.lock"):
            if not library.exists():
                print(
                    "Building CPU kernels (once, about 20 s) …", file=sys.stderr, end="", flush=True
                )
                start = time.monotonic()
                compile_library(compiler, level.flags, library)
                print(f" done in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return library


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file releases the lock
