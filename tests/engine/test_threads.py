"""The number of compute threads follows affinity, cores and the container's limit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.device import threads


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight logical CPUs on four cores, without a cgroup limit."""
    for cpu in range(8):
        topology = tmp_path / f"cpu{cpu}/topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    monkeypatch.setattr(threads, "_CPUS", tmp_path)
    monkeypatch.setattr(threads, "_CGROUP", tmp_path)
    monkeypatch.setattr(threads, "_OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    return tmp_path


def test_physical_cores(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as Ray does
    assert threads.num_compute_threads() == 4


def test_affinity(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 5})
    assert threads.num_compute_threads() == 2


@pytest.mark.parametrize(
    ("limit", "expected"), [("max 100000", 4), ("250000 100000", 2), ("50000 100000", 1)]
)
def test_cgroup_v2(machine: Path, limit: str, expected: int) -> None:
    (machine / "cpu.max").write_text(limit + "\n")
    assert threads.num_compute_threads() == expected


@pytest.mark.parametrize(("quota", "expected"), [("-1", 4), ("300000", 3)])
def test_cgroup_v1(machine: Path, quota: str, expected: int) -> None:
    (machine / "cpu").mkdir()
    (machine / "cpu/cpu.cfs_quota_us").write_text(quota)
    (machine / "cpu/cpu.cfs_period_us").write_text("100000")
    assert threads.num_compute_threads() == expected


@pytest.mark.parametrize(
    ("own", "limited", "file", "text", "expected"),
    [
        ("0::/batch/job\n", "batch/job", "cpu.max", "200000 100000", 2),
        ("0::/batch/job\n", "batch", "cpu.max", "300000 100000", 3),
        ("3:cpu,cpuacct:/job\n2:memory:/x\n", "cpu/job", "cpu.cfs_quota_us", "200000", 2),
        ("3:cpuset:/job\n", "cpu/job", "cpu.cfs_quota_us", "200000", 4),
        ("0::/nowhere\n", ".", "cpu.max", "max 100000", 4),
    ],
)
def test_limits_of_the_groups_around(
    machine: Path, own: str, limited: str, file: str, text: str, expected: int
) -> None:
    """On a host, and in containers that see the host's groups."""
    (machine / "own").write_text(own)
    (machine / limited).mkdir(parents=True, exist_ok=True)
    (machine / limited / file).write_text(text + "\n")
    (machine / limited / "cpu.cfs_period_us").write_text("100000")
    assert threads.num_compute_threads() == expected


def test_ranks_share_the_cores(machine: Path) -> None:
    assert [threads.num_compute_threads(ranks) for ranks in (1, 2, 3, 16)] == [4, 2, 1, 1]


SPIN_BRIEFLY = "import engine, torch"


@pytest.mark.parametrize(("own", "expected"), [({}, "200"), ({"GOMP_SPINCOUNT": "7"}, "7")])
def test_the_openmp_runtime_is_told_to_spin_briefly(own: dict[str, str], expected: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SPIN_BRIEFLY],
        env=_environment_without_policy() | {"OMP_DISPLAY_ENV": "VERBOSE"} | own,
        capture_output=True,
        text=True,
        check=True,
    )
    if "GOMP_" not in done.stderr:
        pytest.skip("torch's OpenMP runtime is not GNU's")
    assert f"GOMP_SPINCOUNT = '{expected}'" in done.stderr


def _environment_without_policy() -> dict[str, str]:
    """The tests' own says how to wait."""
    policy = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
    return {name: value for name, value in os.environ.items() if name not in policy}
