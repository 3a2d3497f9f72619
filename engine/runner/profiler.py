"""What a rank's device does over some steps, by torch's profiler."""

import logging
import time
from pathlib import Path

from torch import profiler

logger = logging.getLogger(__name__)


class Profiler:
    """Writes a trace for each profile, which chrome://tracing and Perfetto show."""

    def __init__(self, directory: str | None, rank: int) -> None:
        """Raises OSError for a directory that cannot be made."""
        self._directory = Path(directory) if directory is not None else None
        self._rank = rank
        self._profile: profiler.profile | None = None
        if self._directory is not None:
            self._directory.mkdir(parents=True, exist_ok=True)

    def start(self) -> None:
        """On the thread that launches steps."""
        self._profile = profiler.profile()
        self._profile.start()

    def stop(self) -> str | None:
        """Returns why it could not be written, if it could not: no rank dies of it."""
        assert self._profile is not None and self._directory is not None
        profile, self._profile = self._profile, None
        path = self._directory / f"{time.strftime('%Y%m%d-%H%M%S')}-rank{self._rank}.json.gz"
        try:
            profile.stop()
            profile.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            logger.exception("a profile was not written")
            return f"{path}: {error}"
        return None
