"""Files that clients have sent, and records of them, in a directory or at any URI of storage."""

import hashlib
import json
import re
import secrets
import time
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from deployments.batch.storage import Location

Record = dict[str, Any]

_PIECE = 1 << 20  # bytes
_ID = re.compile(r"(file|batch)-[0-9a-f]{24}")


class FileStore:
    """What belongs to a tenant is nobody else's. Names are ours: no client's is part of a path.

    Blocks: call it off the event loop.
    """

    def __init__(self, uri: str) -> None:
        self._root = Location.of(uri)

    def tenants(self) -> list[str]:
        """The directories of all, by name."""
        return sorted(name for name in self._root.names() if name.startswith("of-"))

    @staticmethod
    def directory_of(tenant: str) -> str:
        return f"of-{hashlib.sha256(tenant.encode()).hexdigest()[:24]}"

    def place(self, directory: str, kind: str) -> Location:
        return Location(self._root.filesystem, f"{self._root.path}/{directory}/{kind}")

    def put(self, directory: str, pieces: Iterable[bytes], filename: str, purpose: str) -> Record:
        """A new file, whole once it is told of."""
        files, file_id, size = self.place(directory, "files"), new_id("file"), 0
        files.filesystem.create_dir(files.path, recursive=True)
        path = f"{files.path}/{file_id}.data"
        with files.filesystem.open_output_stream(path, compression=None) as file:
            for piece in pieces:
                size += len(piece)
                file.write(piece)
        record = {
            "id": file_id,
            "object": "file",
            "bytes": size,
            "created_at": int(time.time()),
            "filename": filename,
            "purpose": purpose,
            "status": "processed",
        }
        self.write(directory, record)
        return record

    def write(self, directory: str, record: Record) -> None:
        kind = "files" if record["object"] == "file" else "batches"
        self.place(directory, kind).write(f"{record['id']}.json", json.dumps(record).encode())

    def read(self, directory: str, kind: str, record_id: str) -> Record | None:
        """The record of that id; None if there is none."""
        if not _ID.fullmatch(record_id):
            return None
        try:
            found: Record = json.loads(self.place(directory, kind).read(f"{record_id}.json"))
        except FileNotFoundError:
            return None
        return found

    def ids(self, directory: str, kind: str) -> list[str]:
        names = self.place(directory, kind).names()
        return [name.removesuffix(".json") for name in names if name.endswith(".json")]

    def all(self, directory: str, kind: str) -> list[Record]:
        """The newest first."""
        found = (self.read(directory, kind, record_id) for record_id in self.ids(directory, kind))
        records = [record for record in found if record is not None]
        return sorted(records, key=lambda r: (-r["created_at"], r["id"]))

    def cancel(self, directory: str, batch_id: str) -> None:
        """A mark beside the record, which its runner may be writing at this moment."""
        self.place(directory, "batches").write(f"{batch_id}.cancel", b"")

    def is_cancelled(self, directory: str, batch_id: str) -> bool:
        return self.place(directory, "batches").has(f"{batch_id}.cancel")

    def source(self, directory: str, file_id: str) -> Location:
        """A file's content."""
        files = self.place(directory, "files")
        return Location(files.filesystem, f"{files.path}/{file_id}.data")

    def pieces(self, directory: str, file_id: str) -> Iterator[bytes]:
        source = self.source(directory, file_id)
        with source.filesystem.open_input_stream(source.path, compression=None) as file:
            yield from pieces_of(file)

    def delete(self, directory: str, file_id: str) -> None:
        files = self.place(directory, "files")
        files.filesystem.delete_file(f"{files.path}/{file_id}.json")
        files.filesystem.delete_file(f"{files.path}/{file_id}.data")


def new_id(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(12)}"


def pieces_of(file: BinaryIO) -> Iterator[bytes]:
    while piece := file.read(_PIECE):
        yield piece
