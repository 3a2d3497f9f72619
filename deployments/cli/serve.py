"""`manta serve`: a Serve config from the command line, run with the right environment."""

import os
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
import yaml

from deployments import local_ray
from deployments.args import APPLICATION, AppArgs
from deployments.local_ray import preflight


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
        asked = preflight.start(AppArgs(**args), host, port)
        os.environ.update(_environment(haproxy))
    elif haproxy:
        os.environ.update(local_ray.HAPROXY)
    from deployments.cli.lifecycle import run_server  # Ray reads the environment now

    preflight.finish(asked)
    run_server(AppArgs(**args), host, port, address)


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
