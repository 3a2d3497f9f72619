"""Files of object stores, read in many parts at a time."""

import os
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor, as_completed
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from engine.progress import Progress

# Of an object store, one connection gets a part of what a network can: so many reads, of so many
# bytes.
_NUM_READS = 16
_PART = 16 << 20


class RemoteFiles:
    """Those of a checkpoint. Raises OSError, ValueError or ImportError where they cannot be had.

    Args:
        uri: a directory's or a file's, on S3, GCS, or whatever else Arrow or fsspec can open.
        wanted: patterns of a directory's files.
    """

    def __init__(self, uri: str, wanted: Collection[str]) -> None:
        from pyarrow.fs import FileSelector  # takes a while, and few need it

        self._uri = uri
        self._filesystem, path = open_uri(uri)
        info = self._filesystem.get_file_info(path)
        found = [info] if info.is_file else self._filesystem.get_file_info(FileSelector(path))
        found = [each for each in found if each.is_file]
        self._found = sorted(
            (each for each in found if any(fnmatch(each.base_name, name) for name in wanted)),
            key=lambda each: str(each.path),
        )
        if not self._found:
            raise FileNotFoundError(f"none of its {len(found)} files is one of a checkpoint")

    @property
    def identity(self) -> str:
        """What tells whether the files are still the same."""
        files = (f"{each.base_name} {each.size} {each.mtime_ns}" for each in self._found)
        return "\n".join([self._uri, *files])

    def copy_to(self, directory: Path) -> None:
        total = sum(each.size for each in self._found)
        with (
            Progress(total=total, unit="B", unit_scale=True, desc=self._uri) as progress,
            ThreadPoolExecutor(_NUM_READS) as pool,
        ):
            copies = []
            for each in self._found:
                target = directory / each.base_name
                target.touch()
                for start in range(0, each.size, _PART):
                    copies.append(pool.submit(self._copy, each.path, target, start))
            for copy in as_completed(copies):
                progress.update(copy.result())

    def _copy(self, source: str, target: Path, start: int) -> int:
        """Returns how many bytes."""
        with self._filesystem.open_input_file(source) as file:
            part = file.read_at(_PART, start)
        with target.open("r+b") as file:
            return os.pwrite(file.fileno(), part, start)


def open_uri(uri: str) -> tuple[Any, str]:
    """(Arrow's file system, the path on it)"""
    import fsspec
    import pyarrow
    from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem

    try:
        filesystem, path = FileSystem.from_uri(uri)
    except pyarrow.ArrowInvalid:  # not one of Arrow's own
        source, path = fsspec.core.url_to_fs(uri)
        filesystem = PyFileSystem(FSSpecHandler(source))
    return filesystem, path.rstrip("/")
