"""The script for the first hour on a GPU runs: all of it that a CPU can, on a tiny model."""

import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks import floor, gpu_day
from benchmarks.gpu_day import Job, run, table_line
from tests.deployments.conftest import wait_until


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_rehearsal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Measuring takes minutes on some CPUs.
    monkeypatch.setattr(floor, "measure_machine", lambda *_: floor.Machine(1e10, 1e11))
    monkeypatch.setattr(sys, "argv", ["gpu_day", "rehearse", "--directory", str(tmp_path)])
    gpu_day.main()
    printed = capsys.readouterr().out
    assert "late compilations: []" in printed and "batch 2: " in printed
    *_, throughput, latency = printed.splitlines()
    assert throughput.startswith("throughput ") and "of the floor" in throughput
    assert latency.startswith("latency ") and "2: " in latency


def test_every_part_is_a_list_of_jobs_with_names_of_their_own() -> None:
    parts = gpu_day.parts("nano", "vllm")
    jobs = [job for name, part in parts.items() if name != "rehearse" for job in part()]
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names) > 15
    scripts = {job.command[0] for job in jobs if job.is_benchmark}
    assert all(Path(gpu_day.__file__).with_name(f"{name}.py").exists() for name in scripts)


def test_an_engine_to_compare_with_needs_its_interpreter(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_day", "look", "vllm"])
    with pytest.raises(SystemExit):
        gpu_day.main()
    assert "vllm: give its interpreter" in capsys.readouterr().err


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_job_that_takes_too_long_is_killed_with_its_children(tmp_path: Path) -> None:
    job = Job("hangs", 3.0, ("sh", "-c", "sleep 600 & echo $!; wait"))
    status = run(job, tmp_path)
    for child in map(int, (tmp_path / "hangs.log").read_text().split()):
        wait_until(lambda pid=child: is_gone(pid), 10, "killed, and seen to be")
    assert table_line(job, tmp_path, status) == "hangs                  took more than 3.0 s"


def test_a_job_that_fails_says_so(tmp_path: Path) -> None:
    job = Job("fails", 20, (sys.executable, "-c", "print('so far'); raise SystemExit(3)"))
    status = run(job, tmp_path)
    assert (tmp_path / "fails.log").read_text() == "so far\n"
    assert table_line(job, tmp_path, status) == "fails                  failed: 3"
    missing = Job("missing", 20, ("no-such-program",))
    assert run(missing, tmp_path) == 127
