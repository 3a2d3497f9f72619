"""Compiles the C++ kernels of this directory once per machine, and loads them.

They are plain C functions, called through ctypes: nothing but a C++ compiler is needed, and the
binary depends on neither torch's nor Python's version.
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
from pathlib import Path

from kernels.cache import cache_directory

_SOURCE_DIR = Path(__file__).parent
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
# Instruction sets from best to most common: (name, what /proc/cpuinfo must list, compiler flags).
_LEVELS: tuple[tuple[str, frozenset[str], tuple[str, ...]], ...] = (
    (
        "avx512_bf16",
        frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "avx512_vnni"}),
        (*_AVX512, "-mavx512bf16", "-mavx512vnni"),
    ),
    ("avx512", frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"}), _AVX512),
    ("avx2", frozenset({"avx2", "fma", "f16c"}), _AVX2),
    ("default", frozenset(), ()),  # of the architecture: SSE2 on x86-64, NEON on arm64
)
# No -ffast-math: masked scores are infinities. GCC's own headers trip -Wmaybe-uninitialized.
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
)
_logger = logging.getLogger(__name__)


class BuildError(RuntimeError):
    """There is no working compiler; says what to do."""


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The kernels, compiled if need be; None, after one warning, where that cannot be done.

    torch must have been imported: the library is linked without an OpenMP runtime and finds
    torch's, so that a process has one pool of threads.
    """
    try:
        return ctypes.CDLL(str(_build(instruction_set())))
    except (BuildError, OSError) as error:
        _logger.warning(
            "CPU kernels are not available, so attention and sampling run in plain torch, about "
            "three times slower in all: %s",
            error,
        )
        return None


def instruction_set() -> str:
    """The best level this CPU has, or a lower one asked for by MANTA_CPU_ISA."""
    names = [name for name, _, _ in _LEVELS]
    best = next(i for i, (_, needed, _) in enumerate(_LEVELS) if needed <= _cpu_features())
    asked = os.environ.get("MANTA_CPU_ISA", "")
    if asked and asked not in names:
        raise ValueError(f"MANTA_CPU_ISA: {asked!r} is unknown; choose from {', '.join(names)}")
    return names[max(best, names.index(asked) if asked else 0)]


def _cpu_features() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return set()
    return {word for line in lines if line.startswith("flags") for word in line.split()}


def _build(isa: str) -> Path:
    """Path of the library for an instruction set. Processes that start at once build it once."""
    compiler = find_compiler()
    flags = (*_FLAGS, *next(flags for name, _, flags in _LEVELS if name == isa))
    sources = sorted(_SOURCE_DIR.glob("*.cpp"))
    digest = hashlib.sha256(repr((flags, platform.machine(), version_of(compiler))).encode())
    for path in sorted([*sources, *_SOURCE_DIR.glob("*.h")]):
        digest.update(path.read_bytes())
    directory = cache_directory()
    library = directory / f"cpu-{isa}-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        with _lock(directory / f"{library.name}.lock"):
            if not library.exists():
                _compile(compiler, flags, sources, library)
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


def _compile(compiler: str, flags: tuple[str, ...], sources: list[Path], library: Path) -> None:
    print("Building CPU kernels (once, about 15 s) …", file=sys.stderr, end="", flush=True)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        objects = [Path(scratch) / f"{source.stem}.o" for source in sources]
        commands = [
            [compiler, *flags, "-c", str(source), "-o", str(target)]
            for source, target in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(min(len(commands), os.cpu_count() or 1)) as pool:
            list(pool.map(_run, commands))
        linked = Path(scratch) / library.name
        # Without -fopenmp here the symbols of OpenMP stay open, to be found in torch's runtime.
        _run([compiler, "-shared", *map(str, objects), "-o", str(linked)])
        os.replace(linked, library)
    print(f" done in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        tail = "\n".join(done.stderr.splitlines()[-20:])
        raise BuildError(
            f"{command[0]} failed; GCC 10 or newer is needed (set CXX to choose another)\n{tail}"
        )
