"""Runs coding agents headless against a server of the demo model, a prompt or two each.

npm install --prefix DIR @anthropic-ai/claude-code @openai/codex
python -m tests.ports.coding_agents DIR/node_modules/.bin claude codex

The demo model understands nothing of what they say; what is looked at is the protocol: that no
request is refused, that the agent ends by itself, and that each turn finds the one before it in the
cache. The model has a window large enough for their prompts, which are some ten thousand tokens.
"""

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from deployments.api.request_log import LOGGER
from engine.demo import DEMO_MODEL
from tests.deployments.local_server import LocalServer, serve_locally

_WINDOW = 98304
_TIMEOUT_S = 400
_PROMPT = "Repeat these words: apple river stone"


def watch_requests() -> list[dict[str, Any]]:
    """What the server's request log says from now on."""
    lines: list[dict[str, Any]] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(json.loads(record.getMessage()))

    logging.getLogger(LOGGER).addHandler(Handler())
    logging.getLogger(LOGGER).setLevel(logging.INFO)
    return lines


def with_long_window(directory: Path) -> Path:
    """The demo model, which answers shortly and takes long prompts."""
    model = directory / "model"
    shutil.copytree(DEMO_MODEL, model)
    for name, change in (
        ("config.json", {"max_position_embeddings": _WINDOW}),
        ("generation_config.json", {"max_new_tokens": 40}),
    ):
        path = model / name
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return model


def claude(server: LocalServer, bin: Path, home: Path) -> None:
    """Twice: the second goes on with the conversation of the first."""
    settings = {
        "ANTHROPIC_BASE_URL": server.url,
        "ANTHROPIC_AUTH_TOKEN": "none",
        "ANTHROPIC_MODEL": "manta-demo",
        "ANTHROPIC_SMALL_FAST_MODEL": "manta-demo",
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": "manta-demo",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }
    for more in ([], ["--continue"]):
        _run([str(bin / "claude"), "-p", _PROMPT, *more], home, settings)


def codex(server: LocalServer, bin: Path, home: Path) -> None:
    provider = f'{{name="manta",base_url="{server.url}/v1",env_key="KEY",wire_api="responses"}}'
    options = ["-c", 'model_provider="manta"', "-c", f"model_providers.manta={provider}"]
    options += ["-c", 'model="manta-demo"', "-c", f"model_context_window={_WINDOW}"]
    command = [str(bin / "codex"), "exec", *options, "--skip-git-repo-check"]
    for more in ([_PROMPT], ["resume", "--last", _PROMPT]):
        _run([*command, *more], home, {"KEY": "none", "CODEX_HOME": str(home / ".codex")})


def _run(command: list[str], home: Path, settings: dict[str, str]) -> None:
    environment = {k: v for k, v in os.environ.items() if k in ("PATH", "LANG", "TERM")}
    (home / ".codex").mkdir(exist_ok=True)
    done = subprocess.run(
        command,
        cwd=home,
        env=environment | {"HOME": str(home)} | settings,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
    )
    print(f"{Path(command[0]).name}: ended with {done.returncode}: {done.stdout.strip()[:300]!r}")
    if done.returncode:
        print(done.stderr[-1500:])


def main() -> int:
    bin, names = Path(sys.argv[1]).resolve(), sys.argv[2:]
    log = watch_requests()
    refused = 0
    with tempfile.TemporaryDirectory() as directory:
        model = with_long_window(Path(directory))
        options: dict[str, Any] = {"num_blocks": _WINDOW // 16 + 64, "max_num_seqs": 4}
        with serve_locally(model=str(model), served_model_name="manta-demo", **options) as server:
            for name in names:
                home = Path(directory) / name
                home.mkdir()
                {"claude": claude, "codex": codex}[name](server, bin, home)
                for line in log:
                    refused += line["status"] is not None and line["status"] >= 400
                    told = ("method", "path", "status", "error", "prompt_tokens", "cached_tokens")
                    print("  ", *(line.get(field) for field in told), line.get("finish_reasons"))
                log.clear()
    print(f"{refused} requests refused")
    return bool(refused)


if __name__ == "__main__":
    sys.exit(main())
