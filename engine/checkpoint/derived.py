"""What is made of files once, and kept: directories, by what they are made of."""

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from engine.checkpoint.files import CheckpointError

_DERIVED = "1"  # version of what is made of files


def cache() -> Path:
    """Where what is made of checkpoints' files is kept: beside the kernels, see `kernels.cache`."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MANTA_CACHE_DIR") or Path(home) / "manta") / "models"


def derived(files: list[Path], module: str) -> Path:
    """What `python -m MODULE FILE… DIRECTORY` makes of files: a directory, made once and kept.

    Raises CheckpointError with the last line that it says.
    """
    identity = [module, _DERIVED, *states(files)]

    def make(made: Path) -> None:
        done = subprocess.run(
            [sys.executable, "-m", module, *map(str, files), str(made)],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise CheckpointError(f"{files[0]} cannot be read: {reason}")

    return made_once("\n".join(identity), make)


def states(files: list[Path]) -> list[str]:
    """What tells whether files are still the same."""
    found = ((file.resolve(), file.stat()) for file in files)
    return [f"{path} {state.st_size} {state.st_mtime_ns}" for path, state in found]


def made_once(identity: str, make: Callable[[Path], None]) -> Path:
    """The directory that `make` has filled, kept for whoever has the same identity."""
    kept = cache()
    directory = kept / hashlib.sha256(identity.encode()).hexdigest()[:24]
    if directory.exists():
        return directory
    kept.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept) as temporary:
        made = Path(temporary) / "made"
        made.mkdir()
        make(made)
        with suppress(OSError):  # another process was faster
            made.rename(directory)
    return directory
