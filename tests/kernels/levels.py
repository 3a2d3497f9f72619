"""Ops at any level of instructions of any architecture, whatever the processor at hand.

What it has runs as it is. Of x86, what it lacks is compiled with each instruction written out:
emulated_x86.h. ARM's levels are compiled by a cross compiler and run under an emulator of a
processor that has no more than the level does.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from kernels import Ops
from kernels.cache import cache_directory
from kernels.cpu.build import build, cpu_features
from kernels.cpu.compiler import FLAGS, LEVELS, SOURCE_DIR, BuildError, Level, find_compiler
from kernels.cpu.ops import ops_of
from tests.kernels.emulated import emulated_library

_HERE = Path(__file__).parent
ALL = [f"{arch}-{level.name}" for arch in ("x86_64", "aarch64") for level in LEVELS[arch]]
_AVX2 = next(level for level in LEVELS["x86_64"] if level.name == "avx2")
_ARM_PROCESSORS = {"default": "cortex-a53", "neon_dotprod": "neoverse-n1", "neon_bf16": "max"}


@contextmanager
def ops_at(name: str, optimized: bool = True) -> Iterator[Ops]:
    """Of a level in ALL; skips where that takes what is not here.

    Args:
        optimized: as they are compiled for users. Else in a third of the time.
    """
    architecture, _, level_name = name.partition("-")
    level = next(level for level in LEVELS[architecture] if level.name == level_name)
    compile_level = build if optimized else _compile_quickly
    if architecture == "aarch64" != platform.machine():
        with _emulated_arm(level, compile_level) as ops:
            yield ops
        return
    if architecture != platform.machine() or not level.needs <= cpu_features():
        level = _written_out(level)
    try:
        yield ops_of(ctypes.CDLL(str(compile_level(level, find_compiler()))), level)
    except BuildError as error:
        pytest.skip(str(error))


def _written_out(level: Level) -> Level:
    if platform.machine() != "x86_64" or not _AVX2.needs <= cpu_features():
        pytest.skip("takes a processor with its instructions, or AVX2")
    header = _HERE / "emulated_x86.h"
    flags = (f"-DEMULATED_{flag[2:].upper()}" for flag in level.flags if flag not in _AVX2.flags)
    return replace(
        level,
        name=f"{level.name}-written-out-{_digest([header])}",
        flags=(*_AVX2.flags, *flags, "-include", str(header)),
    )


@contextmanager
def _emulated_arm(level: Level, compile_level: Callable[[Level, str], Path]) -> Iterator[Ops]:
    compiler, emulator = map(shutil.which, ("aarch64-linux-gnu-g++", "qemu-aarch64"))
    if compiler is None or emulator is None:
        pytest.skip("takes a cross compiler: apt-get install g++-aarch64-linux-gnu qemu-user")
    source = _HERE / "call_server.cpp"
    server = cache_directory() / f"call-server-{_digest([source])}"
    if not server.exists():
        _run(compiler, "-O1", str(source), "-ldl", to=server)
    command = [emulator, "-cpu", _ARM_PROCESSORS[level.name], "-L", "/usr/aarch64-linux-gnu"]
    command += [str(server), str(compile_level(level, compiler))]
    with emulated_library(command) as library:
        yield ops_of(library, level)  # type: ignore[arg-type]


def _compile_quickly(level: Level, compiler: str) -> Path:
    """All sources as one, whose headers are read once, without optimization."""
    sources = sorted(SOURCE_DIR.glob("*.cpp"))
    digest = _digest([*sources, *sorted(SOURCE_DIR.glob("*.h"))], *level.flags)
    library = cache_directory() / f"{Path(compiler).name}-{level.name}-{digest}.so"
    if not library.exists():
        whole = library.with_suffix(".cpp")
        whole.write_text("".join(f'#include "{source}"\n' for source in sources))
        _run(compiler, *FLAGS, *level.flags, "-O0", "-shared", str(whole), to=library)
    return library


def _run(compiler: str, *arguments: str, to: Path) -> None:
    unfinished = to.with_suffix(f".{os.getpid()}")
    subprocess.run([compiler, "-std=c++20", *arguments, "-o", str(unfinished)], check=True)
    unfinished.replace(to)


def _digest(files: list[Path], *texts: str) -> str:
    digest = hashlib.sha256("\n".join(texts).encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def stub_compiler(directory: Path, make: str) -> None:
    """`g++` in the directory, which notes its `commands` there and makes what -o names."""
    compiler = directory / "g++"
    compiler.write_text(
        f"""#!/bin/sh
[ "$1" = --version ] && exec echo stub
echo "$@" >> "{directory}/commands"
while [ "$1" != -o ]; do shift; done
target=$2
{make}
"""
    )
    compiler.chmod(0o755)
