"""Compiles the C++ kernels of this directory, once per machine, and loads them.

They are plain C functions, called through ctypes: nothing but a C++ compiler is needed, and the
binary depends on neither torch's nor Python's version. Every level of instructions has a library of
its own, from the same sources; a machine loads the best that it can run.
"""

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kernels.cache import cache_directory

_SOURCE_DIR = Path(__file__).parent


@dataclass(frozen=True)
class Level:
    """A set of instructions that the kernels are compiled for."""

    name: str
    needs: frozenset[str]  # what /proc/cpuinfo must list
    flags: tuple[str, ...]  # of the compiler


def _x86_levels() -> tuple[Level, ...]:
    avx2 = ("-mavx2", "-mfma", "-mf16c"), {"avx2", "fma", "f16c"}
    more = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
    avx512 = (*avx2[0], *(f"-m{each}" for each in more)), {*avx2[1], *more}
    vnni = (*avx512[0], "-mavx512vnni"), {*avx512[1], "avx512_vnni"}
    return (
        Level("avx512_bf16", frozenset(vnni[1] | {"avx512_bf16"}), (*vnni[0], "-mavx512bf16")),
        Level("avx512_vnni", frozenset(vnni[1]), vnni[0]),
        Level("avx512", frozenset(avx512[1]), avx512[0]),
        Level("avx_vnni", frozenset(avx2[1] | {"avx_vnni"}), (*avx2[0], "-mavxvnni")),
        Level("avx2", frozenset(avx2[1]), avx2[0]),
    )


_DEFAULT = Level("default", frozenset(), ())  # of the architecture: SSE2 on x86-64, NEON on arm64
_X86 = (*_x86_levels(), _DEFAULT)
_ARM = (
    Level("neon_bf16", frozenset({"asimddp", "bf16"}), ("-march=armv8.2-a+dotprod+bf16",)),
    Level("neon_dotprod", frozenset({"asimddp"}), ("-march=armv8.2-a+dotprod",)),
    _DEFAULT,
)
# Of every architecture from best to most common.
LEVELS = {"x86_64": _X86, "AMD64": _X86, "aarch64": _ARM, "arm64": _ARM}
# No -ffast-math: masked scores are infinities. Operations are fused where the code says so.
_FLAGS = (
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",
    "-pthread",
)
_logger = logging.getLogger(__name__)


class BuildError(RuntimeError):
    """There is no working compiler; says what to do."""


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The kernels, compiled if need be; None, after one warning, where that fails."""
    name = instruction_set()
    try:
        return ctypes.CDLL(str(_build(name)))
    except (BuildError, OSError) as error:
        _logger.warning(
            "CPU kernels are not available, so attention and sampling run in plain torch, about "
            "three times slower in all: %s",
            error,
        )
        return None


def instruction_set() -> str:
    """The best level this CPU has, or a lower one asked for by MANTA_CPU_ISA."""
    levels = _levels()
    names = [level.name for level in levels]
    best = next(i for i, level in enumerate(levels) if level.needs <= _cpu_features())
    asked = os.environ.get("MANTA_CPU_ISA", "")
    if asked and asked not in names:
        raise ValueError(f"MANTA_CPU_ISA: {asked!r} is unknown; choose from {', '.join(names)}")
    return names[max(best, names.index(asked) if asked else 0)]


def _levels() -> tuple[Level, ...]:
    return LEVELS.get(platform.machine(), (_DEFAULT,))


def _cpu_features() -> set[str]:
    if sys.platform == "darwin":
        return _apple_features()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    words = (line.split() for line in lines if line.startswith(("flags", "Features")))
    return {word for line in words for word in line}


def _apple_features() -> set[str]:
    """By Linux' names; every arm64 of Apple has dot products, since M2 also of bfloat16."""
    asked = {"asimddp": "hw.optional.arm.FEAT_DotProd", "bf16": "hw.optional.arm.FEAT_BF16"}
    done = subprocess.run(["sysctl", *asked.values()], capture_output=True, text=True, check=False)
    return {feature for feature, name in asked.items() if f"{name}: 1" in done.stdout}


def _build(name: str) -> Path:
    """Path of a level's library. Processes that start at once build it once."""
    compiler = find_compiler()
    level = next(level for level in _levels() if level.name == name)
    flags = repr((_FLAGS, level.flags, platform.machine(), version_of(compiler)))
    digest = hashlib.sha256(flags.encode())
    for path in sorted([*_SOURCE_DIR.glob("*.cpp"), *_SOURCE_DIR.glob("*.h")]):
        digest.update(path.read_bytes())
    directory = cache_directory()
    library = directory / f"cpu-{name}-{digest.hexdigest()[:16]}.so"
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


def find_compiler() -> str:
    for name in filter(None, (os.environ.get("CXX"), "g++", "c++")):
        path = shutil.which(name)
        if path is not None:
            return path
    raise BuildError("no C++ compiler was found; install g++ (apt-get install g++), or set CXX")


def version_of(compiler: str) -> str:
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    return done.stdout


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file releases the lock


def compile_library(compiler: str, flags: tuple[str, ...], library: Path) -> None:
    """All kernels, with a level's flags."""
    sources = sorted(_SOURCE_DIR.glob("*.cpp"))
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        objects = [Path(scratch) / f"{source.stem}.o" for source in sources]
        commands = [
            [compiler, *_FLAGS, *flags, "-c", str(source), "-o", str(target)]
            for source, target in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(min(len(commands), os.cpu_count() or 1)) as pool:
            list(pool.map(_run, commands))
        linked = Path(scratch) / library.name
        _run([compiler, "-shared", "-pthread", *map(str, objects), "-o", str(linked)])
        os.replace(linked, library)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        tail = "\n".join(done.stderr.splitlines()[-20:])
        raise BuildError(
            f"{command[0]} failed; GCC 11 or newer is needed (set CXX to choose another)\n{tail}"
        )
