"""`manta serve`: a Serve config from the command line, run with the right environment."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
import yaml
from rich.console import Console
from rich.table import Table

from deployments.args import AppArgs
from deployments.cli.client import Client, ServerError

# Read by Ray when it is imported, on every node.
HAPROXY = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_INGRESS_REQUEST_ROUTER_FORWARD_BODY": "1",
    # Routers see the client's key, and no body that they would not read.
    "RAY_SERVE_SESSION_ID_HEADER_KEY": "authorization",
    "RAY_SERVE_HAPROXY_INGRESS_REQUEST_ROUTER_BUFSIZE": str(2**20),
    # Half a request is given up.
    "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "60",
}


def run(
    model: str,
    options: list[str],
    host: str,
    port: int,
    haproxy: bool,
    address: str,
    dry_run: bool,
) -> None:
    """Returns when the server has been stopped; raises SystemExit with `serve run`'s status."""
    args = parse_options(model, options)
    config = yaml.safe_dump(serve_config(args, host, port), sort_keys=False)
    if dry_run:
        print(config, end="")
        return
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"} | (HAPROXY if haproxy else {})
    with tempfile.TemporaryDirectory(prefix="manta-") as directory:
        path = Path(directory) / "serve.yaml"
        path.write_text(config)
        # `serve` of this environment, whatever is first on the PATH.
        serve = [sys.executable, "-m", "ray.serve.scripts", "run", "--address", address, str(path)]
        process = subprocess.Popen(serve, env=environment)
        threading.Thread(target=_announce, args=(process, host, port), daemon=True).start()
        sys.exit(_wait(process))


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
        "name": "manta",
        "route_prefix": "/",
        "import_path": "deployments:app",
        "args": args,
    }
    return {"http_options": {"host": host, "port": port}, "applications": [application]}


def _wait(process: "subprocess.Popen[bytes]") -> int:
    """Ctrl-C reaches the child too: it stops the server in its own time."""
    signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGINT))
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


def _announce(process: "subprocess.Popen[bytes]", host: str, port: int) -> None:
    """Once the engine serves: where everything is, and what it runs on."""
    shown = "localhost" if host in ("0.0.0.0", "127.0.0.1", "::") else host
    url = f"http://{shown}:{port}"
    while process.poll() is None and not announce(url, _first_key()):
        time.sleep(0.5)


def _first_key() -> str:
    """One of the keys that the server will take, without its name."""
    entry = os.environ.get("MANTA_API_KEYS", "").split(",")[0].strip()
    return entry.partition(":")[2] or entry


def announce(url: str, key: str) -> bool:
    """Prints the summary if the engine serves; without a key that fits, what can be known."""
    client = Client(url, key)
    try:
        client.get("/health")
    except (ServerError, OSError):
        return False
    try:
        (model,) = client.get("/v1/models")["data"]
        print_summary(url, model, client.first_view(), bool(key))
    except ServerError as error:
        if error.status != 401:
            return False
        print_summary(url, None, None, True)  # its keys are in a file, on other nodes perhaps
    return True


def print_summary(
    url: str, model: dict[str, Any] | None, view: dict[str, Any] | None, has_keys: bool
) -> None:
    table = Table.grid(padding=(0, 3))
    table.add_column(style="bold")
    table.add_row("Playground", url)
    table.add_row("API", f"{url}/v1 (base URL for OpenAI clients), reference at {url}/docs")
    if model is not None:
        table.add_row("Model", f"{model['id']}, window {model['max_model_len']:,} tokens")
    if view is not None:
        ranks = view["tensor_parallel_size"]
        table.add_row(
            "Device", f"{view['device']}{f' x {ranks}' if ranks > 1 else ''}, {view['ops']}"
        )
        tokens = view["num_blocks"] * view["block_size"]
        table.add_row(
            "KV cache",
            f"{view['num_blocks']:,} blocks of {view['block_size']} tokens: {tokens:,} tokens",
        )
    if has_keys:
        table.add_row("API key", "required: one of MANTA_API_KEYS or api_keys_file")
    table.add_row("Try", "MANTA_API_KEY=… " * has_keys + _example(url))
    console = Console(highlight=False)
    console.print()
    console.print(table)
    console.print("\nCtrl-C stops the server.\n", style="dim")


def _example(url: str) -> str:
    return "manta chat" if url == "http://localhost:8000" else f"manta chat --url {url}"
