"""Where compiled kernels are kept."""

import os
import tempfile
from pathlib import Path


def cache_directory() -> Path:
    """MANTA_CACHE_DIR, or the user's cache directory, or a temporary one where neither works."""
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        directory = Path(os.environ.get("MANTA_CACHE_DIR") or Path(home) / "manta")
        directory.mkdir(parents=True, exist_ok=True)
        if os.access(directory, os.W_OK):
            return directory
    except (OSError, RuntimeError):  # read-only, or a user without a home
        pass
    return Path(tempfile.mkdtemp(prefix="manta-"))
