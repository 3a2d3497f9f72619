"""Compiles the C++ kernels of this directory for a level of instructions.

They are plain C functions, called through ctypes: nothing but a C++ compiler is needed, and the
binary depends on neither torch's nor Python's version. Every level has a library of its own, from
the same sources.

Building a wheel runs this file by itself, so it imports nothing of ours:

    python kernels/cpu/compiler.py DIRECTORY   # all levels of this architecture
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SOURCE_DIR = Path(__file__).parent


@dataclass(frozen=True)
class Level:
    """A set of instructions that the kernels are compiled for."""

    name: str
    needs: frozenset[str]  # what /proc/cpuinfo must list
    flags: tuple[str, ...]  # of the compiler
    bfloat16: str  # how products of it are computed
    bytes: str  # and those of w8a8 and int4


_WIDENED = "widened to float32 in registers"


def _x86_levels() -> tuple[Level, ...]:
    avx2 = ("-mavx2", "-mfma", "-mf16c"), {"avx2", "fma", "f16c"}
    more = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
    avx512 = (*avx2[0], *(f"-m{each}" for each in more)), {*avx2[1], *more}
    vnni = (*avx512[0], "-mavx512vnni"), {*avx512[1], "avx512_vnni"}
    bf16 = (*vnni[0], "-mavx512bf16"), {*vnni[1], "avx512_bf16"}
    avx_vnni = (*avx2[0], "-mavxvnni"), {*avx2[1], "avx_vnni"}
    pairs, dots = "by vpmaddwd and vpmaddubsw", "by vpdpbusd"
    return (
        Level("avx512_bf16", frozenset(bf16[1]), bf16[0], "by vdpbf16ps", dots),
        Level("avx512_vnni", frozenset(vnni[1]), vnni[0], _WIDENED, dots),
        Level("avx512", frozenset(avx512[1]), avx512[0], _WIDENED, pairs),
        Level("avx_vnni", frozenset(avx_vnni[1]), avx_vnni[0], _WIDENED, dots),
        Level("avx2", frozenset(avx2[1]), avx2[0], _WIDENED, pairs),
    )


def _arm_levels() -> tuple[Level, ...]:
    dotprod = frozenset({"asimddp"}), "-march=armv8.2-a+dotprod"
    bf16 = dotprod[0] | {"bf16"}, f"{dotprod[1]}+bf16"
    return (
        Level("neon_bf16", bf16[0], (bf16[1],), "by bfdot", "by sdot"),
        Level("neon_dotprod", dotprod[0], (dotprod[1],), _WIDENED, "by sdot"),
    )


# Of the architecture: SSE2 on x86-64, NEON on arm64.
_DEFAULT = Level("default", frozenset(), (), _WIDENED, "by products of 16 bits")
_X86, _ARM = (*_x86_levels(), _DEFAULT), (*_arm_levels(), _DEFAULT)
# Of every architecture from best to most common.
LEVELS = {"x86_64": _X86, "AMD64": _X86, "aarch64": _ARM, "arm64": _ARM}
# No -ffast-math: masked scores are infinities. Operations are fused where the code says so.
FLAGS = (
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
# A library for other machines finds of a C++ compiler's own libraries only what it brings.
_PORTABLE = ("-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL")


class BuildError(RuntimeError):
    """There is no working compiler; says what to do."""


def levels() -> tuple[Level, ...]:
    """Of the architecture at hand."""
    return LEVELS.get(platform.machine(), (_DEFAULT,))


def find_compiler() -> str:
    for name in filter(None, (os.environ.get("CXX"), "g++", "c++")):
        path = shutil.which(name)
        if path is not None:
            return path
    raise BuildError("no C++ compiler was found; install g++ (apt-get install g++), or set CXX")


def version_of(compiler: str) -> str:
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    return done.stdout


def compile_library(
    compiler: str, flags: tuple[str, ...], library: Path, link_flags: tuple[str, ...] = ()
) -> None:
    """All kernels, with a level's flags."""
    sources = sorted(SOURCE_DIR.glob("*.cpp"))
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        objects = [Path(scratch) / f"{source.stem}.o" for source in sources]
        commands = [
            [compiler, *FLAGS, *flags, "-c", str(source), "-o", str(target)]
            for source, target in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(min(len(commands), os.cpu_count() or 1)) as pool:
            list(pool.map(_run, commands))
        linked = Path(scratch) / library.name
        _run([compiler, "-shared", "-pthread", *link_flags, *map(str, objects), "-o", str(linked)])
        os.replace(linked, library)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        tail = "\n".join(done.stderr.splitlines()[-20:])
        raise BuildError(
            f"{command[0]} failed; GCC 11 or newer is needed (set CXX to choose another)\n{tail}"
        )


def compile_levels(directory: Path) -> None:
    """A library of each level of this architecture, for machines without a compiler."""
    directory.mkdir(parents=True, exist_ok=True)
    compiler = find_compiler()
    link_flags = _PORTABLE if sys.platform == "linux" else ()
    for level in levels():
        print(f"compiling the CPU kernels: {level.name}", file=sys.stderr, flush=True)
        compile_library(compiler, level.flags, directory / f"{level.name}.so", link_flags)


if __name__ == "__main__":
    try:
        compile_levels(Path(sys.argv[1]))
    except BuildError as error:
        sys.exit(f"error: {error}")
