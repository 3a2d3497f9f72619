"""Imports run one way, kernels <- engine <- deployments, and the front never loads torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FORBIDDEN = {
    "kernels": {"engine", "deployments", "ray", "fastapi"},
    "engine": {"deployments", "ray", "fastapi"},
    "deployments": {"torch", "benchmarks", "tests"},
}


def imported_packages(path: Path) -> set[str]:
    packages = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            packages.add(node.module.split(".")[0])
    return packages


@pytest.mark.parametrize("wing", FORBIDDEN)
def test_imports_run_one_way(wing: str) -> None:
    files = list((ROOT / wing).rglob("*.py"))
    assert files
    for path in files:
        assert not imported_packages(path) & FORBIDDEN[wing], path


def run_python(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_the_front_does_not_import_torch() -> None:
    code = """
import sys
import deployments.replica
from deployments.args import AppArgs
from deployments.front.front import Front
front = Front(AppArgs())
front.tokenizer.encode_chat([{"role": "user", "content": "hi"}])
print("torch" in sys.modules)
"""
    assert run_python(code) == "False"


def test_all_that_renders_chats_is_imported_before_the_first_one() -> None:
    code = """
import sys
from deployments.args import AppArgs
from deployments.front.front import Front
front = Front(AppArgs())
front.warm_up()
before = set(sys.modules)
front.tokenizer.encode_chat([{"role": "user", "content": "hi"}])
print(sorted(set(sys.modules) - before))
"""
    assert run_python(code) == "[]"


def test_an_engine_does_not_import_torchs_compiler() -> None:
    """That takes seconds, at the first step for which torch thinks of it."""
    code = """
import sys
from engine import LLM, SamplingParams
llm = LLM("manta-demo", num_blocks=64)
llm.generate([[5, 6], [7]], SamplingParams(max_tokens=4, logprobs=1, top_p=0.5), use_tqdm=False)
print("torch._dynamo" in sys.modules)
"""
    assert run_python(code) == "False"


def test_transformers_does_not_take_our_kernels_for_the_hub_package() -> None:
    """Hugging Face publishes a package of the same name; it would be called with its own API."""
    code = "from transformers.utils import is_kernels_available; print(is_kernels_available())"
    assert run_python(code) == "False"
