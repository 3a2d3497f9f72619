"""A proxy that breaks connections, for tests of what clients make of that."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def cut_after(url: str, *sizes: int | bytes) -> Iterator[str]:
    """Its URL. Its first connections end after so many bytes of an answer, the others in peace.

    Where bytes are given for a size, they are the proxy's own answer.
    """
    host, _, port = url.removeprefix("http://").partition(":")
    left = list(sizes)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    client, _ = listening.accept()
                    limit = left.pop(0) if left else 2**40
                    if isinstance(limit, bytes):
                        threading.Thread(target=_answer, args=(client, limit)).start()
                        continue
                    server = socket.create_connection((host, int(port)))
                    threading.Thread(target=_copy, args=(client, server, 2**40)).start()
                    threading.Thread(target=_copy, args=(server, client, limit)).start()

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)


def _answer(client: socket.socket, answer: bytes) -> None:
    with suppress(OSError), client:
        client.sendall(answer)
        client.shutdown(socket.SHUT_WR)
        while client.recv(65536):  # what is not read would reset the connection
            pass


def _copy(source: socket.socket, target: socket.socket, limit: int) -> None:
    """Up to so many bytes; then both end."""
    with suppress(OSError):
        while limit > 0 and (received := source.recv(min(limit, 65536))):
            target.sendall(received)
            limit -= len(received)
    for end in (source, target):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
