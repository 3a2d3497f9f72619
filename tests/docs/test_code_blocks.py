"""Every code block of the README and the pages does what it says, in order, on a real server."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __file__ as benchmarks_file
from deployments.args import AppArgs
from deployments.cli.serve import parse_options
from tests.deployments.conftest import wait_until
from tests.deployments.manta_serve import MantaServe
from tests.docs.blocks import ROOT, Block, blocks, commands

BLOCKS = blocks()
# How the environment that runs the tests was made, and what runs them.
_INSTALL = re.compile(
    r"python3 -m venv .venv && (\. \.venv/bin/activate && )?(\.venv/bin/)?pip install"
)
_TESTS = re.compile(r"\.venv/bin/pytest\b")
_SERVE_RUN = re.compile(r"(?:\.venv/bin/)?serve run deployments:app(?P<args>.*)")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PATH on which `manta` is found, also where the package is not installed."""
    scripts = Path(sys.executable).parent
    if not (scripts / "manta").exists():
        directory = tmp_path_factory.mktemp("bin")
        script = f"#!{sys.executable}\nfrom deployments.cli import main\nmain()\n"
        (directory / "manta").write_text(script)
        (directory / "manta").chmod(0o755)
        scripts = Path(f"{directory}{os.pathsep}{scripts}")
    return f"{scripts}{os.pathsep}{os.environ['PATH']}"


@pytest.fixture(scope="module")
def environment(path: str) -> dict[str, str]:
    given = {"PATH": path, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", "COLUMNS": "160"}
    return {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | given


@pytest.fixture(scope="module")
def port(manta_serve: MantaServe) -> int:
    """Of `manta serve`, as the quickstart has it, which says that it serves."""
    log, process = manta_serve.log, manta_serve.process
    wait_until(lambda: "Ctrl-C" in log.read_text() or process.poll() is not None, 120, "it serves")
    said = log.read_text()
    assert process.poll() is None, said
    port = manta_serve.url.rpartition(":")[2]
    for expected in (f"http://localhost:{port}/v1", "manta-demo", "blocks of", "cpu"):
        assert expected in said
    return int(port)


def is_run_elsewhere(block: Block) -> bool:
    """The installation and these tests; servers, which test_serve_run and `port` are."""
    lines = commands(block)
    if lines == ["manta serve"]:
        return True
    return all(_INSTALL.match(s) or _TESTS.match(s) or _SERVE_RUN.fullmatch(s) for s in lines)


RUN = [block for block in BLOCKS if not block.need and not is_run_elsewhere(block)]
RUN_ONCE = {block.code: block for block in reversed(RUN)}  # several pages begin with `manta doctor`


@pytest.mark.ray
@pytest.mark.parametrize("block", reversed(RUN_ONCE.values()), ids=str)
def test_a_block_runs(
    block: Block, port: int, environment: dict[str, str], tmp_path: Path, capsys: Any
) -> None:
    code = block.code.replace("localhost:8000", f"localhost:{port}")
    if block.language == "python":
        space: dict[str, Any] = {}
        exec(compile(code, str(block), "exec"), space)
        if "llm" in space:
            space["llm"].close()
        assert capsys.readouterr().out.strip()
        return
    here = f"--url http://localhost:{port}"
    code = code.replace("manta chat", f"manta chat {here}")
    code = code.replace("manta bench serving", f"manta bench serving {here}")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code.replace("| head -c 300", "|| [ $? = 28 ]")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    if "serve.yaml" in code:
        assert "deployments:app" in (tmp_path / "serve.yaml").read_text()
    elif not code.startswith("export"):
        assert done.stdout.strip() and '"error"' not in done.stdout


def test_the_rule_leaves_out_only_what_cannot_run_here() -> None:
    assert len(RUN) >= 15
    for block in BLOCKS:
        assert block.page != "README.md" or not block.need, f"{block} would not say so on GitHub"
    assert {block.need.split(":")[0].split(",")[0] for block in BLOCKS if block.need} <= {
        "a GPU", "several GPUs", "a Ray cluster", "a Kubernetes cluster", "the network", "a bucket",
        "an idle machine", "an interactive shell", "a terminal of its own",
    }  # fmt: skip


def command_lines() -> list[str]:
    return [line for block in BLOCKS if block.language == "bash" for line in commands(block)]


def test_commands_that_are_not_run_would_be_accepted() -> None:
    """Arguments of servers, names and options of benchmarks."""
    seen = 0
    for line in command_lines():
        if found := _SERVE_RUN.search(line):
            AppArgs.model_validate(dict(arg.split("=", 1) for arg in found["args"].split()))
            seen += 1
        elif found := re.search(r"\bmanta serve(.*)", line):
            words = shlex.split(found[1].split(">")[0])
            words = [word for word in words if not word.startswith("-")]
            words = [
                word for word in words if not re.fullmatch(r"[\d.]+", word)
            ]  # of --host, --port
            parse_options(words[0] if words else "manta-demo", words[1:])
            seen += 1
        elif found := re.search(r"(?:manta bench |python -m benchmarks\.)(\w+)(.*)", line):
            source = Path(benchmarks_file).with_name(f"{found[1]}.py").read_text()
            for option in re.findall(r"--[a-z-]+", found[2]):
                assert f'"{option}"' in source, f"{line}: {option}"
            seen += 1
    assert seen >= 15
