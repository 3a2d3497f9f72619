"""A wheel holds the CPU kernels of every level, and needs no compiler where it is installed."""

import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from kernels import Ops, select_ops
from kernels.cpu import build
from kernels.cpu.compiler import LEVELS
from tests.kernels.levels import stub_compiler

ROOT = Path(__file__).resolve().parents[2]


def build_wheel(directory: Path, *options: str, **environment: str) -> tuple[str, Path]:
    """The wheel's name, and what it installs; of a copy, for setuptools writes beside sources."""
    source = directory / "source"
    for package in ("kernels", "engine", "deployments", "benchmarks"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, source / package, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", *options, str(source)]
    subprocess.run(command, cwd=directory, env=os.environ | environment, check=True)
    (wheel,) = directory.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(directory / "installed")
    return wheel.name, directory / "installed"


def assert_holds_every_level(wheel: str, installed: Path) -> None:
    assert "-py3-none-" in wheel and wheel.endswith(f"{platform.machine()}.whl")
    found = {path.name for path in (installed / "kernels/cpu/lib").iterdir()}
    assert found == {f"{level.name}.so" for level in LEVELS[platform.machine()]}


def test_its_library_is_loaded_without_a_compiler(
    ops: Ops, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of a wheel whose levels are all this machine's library."""
    library = build.packaged_library() or build.build(build.choose_level())
    stub_compiler(tmp_path, f'cp "{library}" "$target"')
    wheel, installed = build_wheel(tmp_path, "--no-build-isolation", CXX=str(tmp_path / "g++"))
    assert_holds_every_level(wheel, installed)
    commands = (tmp_path / "commands").read_text()
    assert all(" ".join(level.flags) in commands for level in LEVELS[platform.machine()])
    monkeypatch.setattr(build, "_PACKAGED", installed / "kernels/cpu/lib")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("MANTA_CACHE_DIR", str(tmp_path / "cache"))
    build.load_library.cache_clear()
    try:
        assert select_ops(torch.device("cpu")).name == f"cpu-{build.choose_level().name}"
    finally:
        build.load_library.cache_clear()
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_without_a_compiler_it_is_for_any_machine(tmp_path: Path) -> None:
    wheel, installed = build_wheel(tmp_path, "--no-build-isolation", CXX="", PATH="")
    assert wheel.endswith("-py3-none-any.whl") and (installed / "kernels/cpu/linear.cpp").exists()
    assert not (installed / "kernels/cpu/lib").exists()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_as_a_user_builds_it(tmp_path: Path) -> None:
    wheel, installed = build_wheel(tmp_path)
    assert_holds_every_level(wheel, installed)
    code = "import torch, kernels; print(kernels.select_ops(torch.device('cpu')).name)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=installed,
        env={"PATH": "", "MANTA_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == f"cpu-{build.choose_level().name}"
    assert not (tmp_path / "cache").exists()
