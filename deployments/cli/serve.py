"""`manta serve`: a Serve config from the command line, run with the right environment."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
import yaml

from deployments import local_ray
from deployments.args import APPLICATION, AppArgs
from engine.config import EngineConfig


def run(
    model: str,
    options: list[str],
    host: str,
    port: int,
    haproxy: bool | None,
    address: str,
    dry_run: bool,
) -> None:
    """Returns when the server has been stopped; raises SystemExit for what cannot be served."""
    args = parse_options(model, options)
    asked = None
    if dry_run:
        print(yaml.safe_dump(serve_config(args, host, port), sort_keys=False), end="")
        return
    if address == "local":
        _check_port(host, port)
        _check_cpus(AppArgs(**args))
        asked = _ask_engine(AppArgs(**args).engine_config)
        os.environ.update(_environment(haproxy))
    elif haproxy:
        os.environ.update(local_ray.HAPROXY)
    from deployments.cli.lifecycle import run_server  # Ray reads the environment now

    if asked is not None and asked.wait() != 0:
        raise SystemExit(1)  # it has said why
    run_server(AppArgs(**args), host, port, address)


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


def _ask_engine(config: EngineConfig) -> "subprocess.Popen[bytes] | None":
    """A process that ends with an error if an engine on this machine would refuse these.

    While it thinks there is more to import. Of a model that is not here yet nothing is known.
    """
    is_path = config.model.startswith((".", "/", "~")) or Path(config.model).exists()
    if not is_path and config.model != "manta-demo":
        return None
    asked = subprocess.Popen(
        [sys.executable, "-m", "engine.runner.preflight"],
        stdin=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert asked.stdin is not None
    asked.stdin.write(config.model_dump_json().encode())
    asked.stdin.close()
    return asked


def _environment(haproxy: bool | None) -> dict[str, str]:
    """
    Args:
        haproxy: whether Ray is to have it; None: where there is one.
    """
    try:
        return local_ray.prepare(haproxy is not False)
    except (ImportError, FileNotFoundError) as error:
        if haproxy:
            raise SystemExit(f"error: {error}") from None
        return local_ray.prepare()


def _check_port(host: str, port: int) -> None:
    """Raises SystemExit for a port in use: Serve's proxies would share it with its owner."""
    try:
        family, *_, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        socket.create_server(where[:2], family=family).close()
    except OSError as error:
        raise SystemExit(f"error: {host}:{port}: {error}; choose another by --port") from None


def parse_options(model: str, options: list[str]) -> dict[str, Any]:
    """The application's arguments; raises SystemExit for what AppArgs refuses."""
    if "=" in model and not Path(model).exists():  # no model was named
        model, options = "manta-demo", [model, *options]
    given: dict[str, Any] = {"model": model}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals:
            raise SystemExit(f"error: {option!r} should be NAME=VALUE, such as max_model_len=4096")
        given[name] = value
    try:
        args = AppArgs.model_validate(given)
    except click.ClickException as error:
        raise SystemExit(f"error: {error.format_message()}") from None
    return args.model_dump(mode="json", exclude_unset=True)


def completions(incomplete: str) -> list[str]:
    """What NAME=VALUE may become: names, then the values of a field that has few."""
    name, equals, begun = incomplete.partition("=")
    if not equals:
        return [f"{field}=" for field in AppArgs.model_fields if field.startswith(name)]
    if name not in AppArgs.model_fields:
        return []
    annotation = AppArgs.model_fields[name].annotation
    parts = [annotation, *get_args(annotation)]
    values = [value for part in parts if get_origin(part) is Literal for value in get_args(part)]
    values += ["true", "false"] if bool in parts else []
    return [f"{name}={value}" for value in values if value.startswith(begun)]


def serve_config(args: dict[str, Any], host: str, port: int) -> dict[str, Any]:
    """What `serve run` and `serve deploy` take."""
    application = {
        "name": APPLICATION,
        "route_prefix": "/",
        "import_path": "deployments:app",
        "args": args,
    }
    return {"http_options": {"host": host, "port": port}, "applications": [application]}
