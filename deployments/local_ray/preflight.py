"""What a Ray of this machine alone could not serve, refused in one line before it starts."""

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

from deployments.args import AppArgs
from engine.checkpoint.directory import directory_of
from engine.config import EngineConfig
from engine.models.early import refuse_early

Asked = subprocess.Popen[bytes] | None


def start(args: AppArgs, host: str, port: int) -> Asked:
    """What `finish` waits for: meanwhile there is more to import. Raises SystemExit."""
    _check_port(host, port)
    _check_cpus(args)
    return _ask_engine(args.engine_config)


def finish(asked: Asked) -> None:
    """Raises SystemExit if an engine would refuse its settings or its checkpoint."""
    if asked is not None and asked.wait() != 0:
        raise SystemExit(1)  # it has said why


def _check_cpus(args: AppArgs) -> None:
    """Raises SystemExit for more than this machine has: Ray would wait for them for ever."""
    if args.device == "cuda" or any(Path("/dev").glob("nvidia[0-9]*")):
        return
    needed = args.num_replicas * args.num_ranks * args.num_cpus_per_shard
    if needed > (os.cpu_count() or needed):
        raise SystemExit(
            f"error: num_replicas ({args.num_replicas}) of {args.num_ranks} ranks with "
            f"num_cpus_per_shard ({args.num_cpus_per_shard:g}) take {needed:g} CPUs, this machine "
            f"has {os.cpu_count()}"
        )


def _ask_engine(config: EngineConfig) -> Asked:
    """A process that ends with an error if an engine on this machine would refuse these.

    While it thinks there is more to import. Of a model that is not here yet nothing is known.
    """
    is_here = Path(config.model).expanduser().exists() or config.model == "manta-demo"
    if not is_here and config.model.startswith((".", "/", "~")):
        raise SystemExit(f"error: model: there is no directory or GGUF file {config.model!r}")
    if not is_here:
        return None
    if not config.model.endswith(".gguf"):  # that is yet to be unpacked
        try:
            refuse_early(config, directory_of(config))
        except ValueError as error:
            raise SystemExit(f"error: {error}") from None
    asked = subprocess.Popen(
        [sys.executable, "-m", "engine.runner.preflight"],
        stdin=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert asked.stdin is not None
    asked.stdin.write(config.model_dump_json().encode())
    asked.stdin.close()
    return asked


def _check_port(host: str, port: int) -> None:
    """Raises SystemExit for an address that is not ours to listen on.

    A port in use, too: Serve's proxies would share it with its owner.
    """
    try:
        family, *_, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        socket.create_server(where[:2], family=family).close()
    except OSError as error:
        option = "--port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "--host"
        raise SystemExit(f"error: {host}:{port}: {error}; choose another by {option}") from None
