"""How many threads compute on a CPU, and how they wait for each other."""

import os
from pathlib import Path

_CPUS = Path("/sys/devices/system/cpu")
_CGROUP = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


def spin_briefly() -> None:
    """Let OpenMP threads that wait for others sleep after microseconds, not milliseconds.

    The kernels have threads of their own, which do; torch's are OpenMP's, and would keep cores from
    them, and from other processes, after each of its operators. GNU's OpenMP reads the variable
    when torch is first imported; before that is the time to call. What the user has set stays.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "200"


def num_compute_threads(num_ranks: int = 1) -> int:
    """One rank's share of the physical cores that this process may use, at least 1.

    OMP_NUM_THREADS does not count: Ray sets it in every actor, to 1 where no CPUs are reserved.
    Two threads on one core (SMT) only wait for the same arithmetic units.
    """
    cores = _num_allowed_cores()
    quota = _cgroup_cpus()
    if quota is not None:
        cores = min(cores, int(quota))
    return max(cores // num_ranks, 1)


def _num_allowed_cores() -> int:
    """Physical cores in this process' affinity mask."""
    if not hasattr(os, "sched_getaffinity"):  # macOS
        return os.cpu_count() or 1
    return len({_siblings(cpu) for cpu in os.sched_getaffinity(0)})


def _siblings(cpu: int) -> str:
    """What the logical CPUs of one core have in common."""
    try:
        return (_CPUS / f"cpu{cpu}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(cpu)


def _cgroup_cpus() -> float | None:
    """The tightest CPU limit on this process, from cgroup v2 or v1; None without one."""
    limits = [limit for group in _cgroups() if (limit := _limit(group)) is not None]
    return min(limits, default=None)


def _cgroups() -> list[Path]:
    """Where limits may stand: the process' own group and those around it, as far as it sees them.

    A container mostly sees its own as the root.
    """
    groups = [_CGROUP, _CGROUP / "cpu"]
    try:
        lines = _OWN_CGROUPS.read_text().splitlines()  # "0::/user.slice/a", "4:cpu,cpuacct:/a"
    except OSError:
        return groups
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers or "cpu" in controllers.split(","):
            root = _CGROUP / "cpu" if controllers else _CGROUP
            own = root / path.lstrip("/")
            groups += [own, *(group for group in own.parents if root in group.parents)]
    return groups


def _limit(group: Path) -> float | None:
    try:
        limit, period = (group / "cpu.max").read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        pass
    try:
        limit = (group / "cpu.cfs_quota_us").read_text()
        period = (group / "cpu.cfs_period_us").read_text()
        return int(limit) / int(period) if int(limit) > 0 else None
    except (OSError, ValueError):
        return None
