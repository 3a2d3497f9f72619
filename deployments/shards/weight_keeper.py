"""Weights that stay on a node when an engine goes, so that the next one need not read the disk."""

import fcntl
import logging
import os
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

logger = logging.getLogger(__name__)

NAMESPACE = "manta"
# How often the keeper looks whether weights are used, in seconds.
_LOOK_S = 2.0
# How long finding one may take, or starting it; without an answer, the disk is read.
_ANSWER_S = 20.0
# A keeper that has had nothing to keep for so long ends.
_IDLE_S = 600.0
# With less of the node's memory left, what nobody uses goes at once.
_SCARCE = 0.1


@dataclass
class _Kept:
    file: int
    keep_s: float
    last_use: float


@ray.remote(num_cpus=0)
class WeightKeeper:
    """One per node. Holds files that have no name, so with it they go, when nobody maps them.

    Engines fill them (`engine/models/shared.py`), and hold a lock on what they use.
    """

    def __init__(self) -> None:
        self._kept: dict[str, _Kept] = {}
        self._lock = threading.Lock()
        threading.Thread(target=self._watch, daemon=True).start()

    def path(self, name: str, keep_s: float) -> str:
        """Of the file of this name, which is kept for so long when nobody uses it."""
        with self._lock:
            kept = self._kept.get(name)
            if kept is None:
                file = os.memfd_create(f"manta-{name}", os.MFD_CLOEXEC)
                kept = self._kept[name] = _Kept(file, keep_s, 0.0)
            kept.keep_s, kept.last_use = keep_s, time.monotonic()
            return f"/proc/{os.getpid()}/fd/{kept.file}"

    def sizes(self) -> dict[str, int]:
        """Bytes by name."""
        with self._lock:
            return {name: os.fstat(kept.file).st_size for name, kept in self._kept.items()}

    def _watch(self) -> None:
        """Ends the actor when it has had nothing to keep for a while."""
        idle_since = time.monotonic()
        while time.monotonic() - idle_since < _IDLE_S:
            time.sleep(_LOOK_S)
            memory = psutil.virtual_memory()
            with self._lock:
                self._drop_unused(memory.available < _SCARCE * memory.total)
                if self._kept:
                    idle_since = time.monotonic()
        ray.kill(ray.get_runtime_context().current_actor)

    def _drop_unused(self, is_scarce: bool) -> None:
        now = time.monotonic()
        for name, kept in list(self._kept.items()):
            # Who asked a moment ago has not come to lock it yet.
            wait_s = 5 * _LOOK_S if is_scarce else max(kept.keep_s, 5 * _LOOK_S)
            if _is_used(kept.file):
                kept.last_use = now
            elif now - kept.last_use > wait_s:
                logger.info("The weights %s, which nobody uses, are given up", name)
                os.close(kept.file)
                del self._kept[name]


def _is_used(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(file, fcntl.LOCK_UN)
    return False


class KeptWeights:
    """`engine.models.shared.WeightFiles`, of this node's keeper.

    Args:
        keep_s: how long weights stay when nobody uses them.
    """

    def __init__(self, keep_s: float) -> None:
        self._keep_s = keep_s

    def __call__(self, name: str) -> str | None:
        """None, and the log says why, where none can be kept."""
        if not self._keep_s or not hasattr(os, "memfd_create"):
            return None
        answer: Future[str] = Future()
        ask = partial(_answer, answer, name, self._keep_s)
        # In a thread: Ray's control plane, where keepers are found, is asked without a deadline.
        threading.Thread(target=ask, daemon=True).start()
        try:
            path = answer.result(_ANSWER_S)
            with open(path, "rb"):
                return path
        except (RayError, OSError, ValueError) as error:
            logger.warning("Weights are not kept on this node: %r", error)
            return None


def _answer(answer: "Future[str]", name: str, keep_s: float) -> None:
    try:
        answer.set_result(ray.get(_keeper().path.remote(name, keep_s), timeout=_ANSWER_S))
    except Exception as error:
        answer.set_exception(error)


def _keeper() -> Any:
    """This node's, started if it is not there."""
    node = ray.get_runtime_context().get_node_id()
    return WeightKeeper.options(  # type: ignore[attr-defined]
        name=f"weights-{node}",
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
    ).remote()
