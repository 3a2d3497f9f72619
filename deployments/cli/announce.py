"""What `manta serve` says once the server answers."""

import os
from typing import Any

from rich.console import Console
from rich.table import Table

from deployments.cli.client import Client, ServerError


def url_of(host: str, port: int) -> str:
    """As one would type it on this machine."""
    shown = "localhost" if host in ("0.0.0.0", "127.0.0.1", "::") else host
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"


def first_key() -> str:
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
