"""The threads of the C++ kernels: who waits for whom."""

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch

from kernels import Ops, select_ops

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="of Linux' scheduler")
# Run by itself: what it does to its threads stays with them.
ABSENT = """
import os, subprocess, sys, time, torch
from kernels import select_ops

torch.set_num_threads(4)
ops, x = select_ops(torch.device("cpu")), torch.randn(64, 2048)
expected = ops.silu_and_mul(x)
(main, *others) = sorted(map(int, os.listdir("/proc/self/task")))
assert len(others) >= 3
for thread in (main, *others):
    os.sched_setaffinity(thread, {min(os.sched_getaffinity(0))})
for thread in others:
    os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])  # on the same CPU
try:
    start = time.monotonic()
    for _ in range(100):
        assert ops.silu_and_mul(x).equal(expected)
    print(time.monotonic() - start)
finally:
    neighbour.kill()
"""

# Likewise: torch's own threads, which other tests may have started, do not survive a fork.
FORK = """
import os, sys, torch
from kernels import select_ops

torch.set_num_threads(4)
ops, x = select_ops(torch.device("cpu")), torch.randn(64, 2048)
expected = ops.silu_and_mul(x).numpy().tobytes()
child = os.fork()
if child == 0:
    same = all(ops.silu_and_mul(x).numpy().tobytes() == expected for _ in range(20))
    os._exit(0 if same and len(os.listdir("/proc/self/task")) == 4 else 1)
sys.exit(os.waitpid(child, 0)[1])
"""


@pytest.fixture(scope="module")
def threaded_ops() -> Iterator[Ops]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    ops = select_ops(torch.device("cpu"))
    yield ops
    torch.set_num_threads(before)
    select_ops(torch.device("cpu"))


def test_a_loop_does_not_wait_for_threads_that_do_not_run(ops: Ops) -> None:
    """Three of four threads get next to nothing of a CPU that a busy process has.

    A barrier would wait for each in every loop: 6 s here. Alone, the caller needs 0.05 s.
    """
    done = subprocess.run(
        [sys.executable, "-c", ABSENT], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 2


def test_loops_of_several_callers_at_once(ops: Ops, threaded_ops: Ops) -> None:
    """One has the threads, the others work alone; each gets its own result."""
    inputs = [torch.randn(64, 2048) for _ in range(4)]
    expected = [ops.silu_and_mul(x) for x in inputs]
    wrong: list[int] = []

    def call(i: int) -> None:
        for _ in range(50):
            if not threaded_ops.silu_and_mul(inputs[i]).equal(expected[i]):
                wrong.append(i)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_the_child_of_a_fork_starts_threads_of_its_own(ops: Ops) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORK], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
