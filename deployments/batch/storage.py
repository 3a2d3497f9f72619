"""Where inputs and outputs are: a local path, or any URI that Arrow or fsspec can open."""

import secrets
from collections.abc import Iterator
from dataclasses import dataclass

from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem

from engine.checkpoint.remote import open_uri

# Files with this prefix are not yet what they will be; readers of data sets skip it.
_UNFINISHED = "_unfinished-"


@dataclass(frozen=True)
class Location:
    """A file or directory on some file system."""

    filesystem: FileSystem
    path: str

    @classmethod
    def of(cls, uri: str) -> "Location":
        if "://" not in uri:
            return cls(LocalFileSystem(), uri.rstrip("/"))
        return cls(*open_uri(uri))

    def files(self) -> Iterator[tuple[str, int]]:
        """(path, size) of the file, or of all files below the directory, hidden ones left out."""
        info = self.filesystem.get_file_info(self.path)
        if info.type == FileType.File:
            yield info.path, info.size
            return
        selector = FileSelector(self.path, recursive=True, allow_not_found=True)
        for info in sorted(self.filesystem.get_file_info(selector), key=lambda info: info.path):
            if info.type == FileType.File and not info.base_name.startswith((".", "_")):
                yield info.path, info.size

    def names(self) -> set[str]:
        """All that is in the directory; nothing if there is none."""
        selector = FileSelector(self.path, allow_not_found=True)
        return {info.base_name for info in self.filesystem.get_file_info(selector)}

    def has(self, name: str) -> bool:
        return bool(self.filesystem.get_file_info(f"{self.path}/{name}").is_file)

    def read(self, name: str) -> bytes:
        with self.filesystem.open_input_stream(f"{self.path}/{name}") as file:
            return bytes(file.read())

    def write(self, name: str, content: bytes) -> None:
        """Whole or not at all, whenever the process dies."""
        unfinished = f"{self.path}/{_UNFINISHED}{secrets.token_hex(8)}"
        self.filesystem.create_dir(self.path, recursive=True)
        with self.filesystem.open_output_stream(unfinished, compression=None) as file:
            file.write(content)
        self.filesystem.move(unfinished, f"{self.path}/{name}")

    def remove_unfinished(self) -> None:
        """Tidies up after a process that died while it wrote."""
        for name in self.names():
            if name.startswith(_UNFINISHED):
                self.filesystem.delete_file(f"{self.path}/{name}")
