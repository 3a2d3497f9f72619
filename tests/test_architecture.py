"""Imports run one way, kernels <- engine <- deployments, and the front never loads torch."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house import Module, faults, read_house

ROOT = Path(__file__).resolve().parent.parent
# What is never imported, by the beginning of a module's name; the longest that fits a file counts,
# and those above it too.
FORBIDDEN = {
    "kernels": {"engine", "deployments", "ray", "fastapi"},
    "engine": {"deployments", "ray", "fastapi"},
    "engine.schedule": {"torch", "kernels"},
    "engine.speculation": {"torch", "kernels"},
    "engine.text": {"torch", "kernels"},
    "engine.checkpoint": {"torch", "kernels"},
    "deployments": {"torch", "benchmarks", "tests"},
}
# Which rooms of their wing a room may import from; its own, and files that are in no room, always.
ROOMS: dict[str, set[str]] = {
    "engine.schedule": set(),
    "engine.speculation": {"schedule"},
    "engine.checkpoint": set(),
    "engine.text": {"checkpoint"},
    "engine.ranks": set(),
    "engine.models": {"checkpoint", "ranks"},
    "engine.quantize": {"checkpoint", "models"},
    "engine.device": {"schedule", "models", "ranks"},
    "engine.sampling": {"schedule", "text", "models", "device", "ranks"},
    "engine.runner": {"checkpoint", "schedule", "models", "device", "ranks", "sampling"},
    "deployments.parsing": set(),
    "deployments.observe": set(),
    "deployments.front": {"observe", "parsing"},
    "deployments.shards": {"front"},
    "deployments.routing": {"api"},
    "deployments.relay": {"api"},
    "deployments.api": {"front", "observe", "parsing"},
    "deployments.files": {"api", "front", "observe", "batch"},
    "deployments.batch": {"api", "front", "observe", "shards"},
    "deployments.local_ray": set(),
    "deployments.cli": {"local_ray"},
    "kernels.cpu": set(),
    "kernels.cuda": set(),
}
# Settings and what is above the rooms of the engine: only the first may be imported from a room.
ABOVE = {"engine.engine", "engine.llm", "engine.view", "engine.diagnosis"}


@pytest.fixture(scope="module")
def modules() -> dict[str, Module]:
    return read_house()


def imported_packages(path: Path) -> set[str]:
    packages = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            packages.add(node.module.split(".")[0])
    return packages


@pytest.mark.parametrize("prefix", FORBIDDEN)
def test_imports_run_one_way(prefix: str) -> None:
    files = list(ROOT.joinpath(*prefix.split(".")).rglob("*.py"))
    assert files
    for path in files:
        assert not imported_packages(path) & FORBIDDEN[prefix], path


def room_of(name: str) -> str:
    """ "engine.models" of engine.models.blocks.linear; "" for a file that is in no room."""
    return next((room for room in ROOMS if name.startswith(f"{room}.")), "")


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_as_their_walls_allow(modules: dict[str, Module], room: str) -> None:
    wing = room.split(".")[0]
    allowed = {room, *(f"{wing}.{other}" for other in ROOMS[room])}
    own = [module for name, module in modules.items() if room_of(name) == room]
    assert own
    for module in own:
        of_wing = {target for target in module.imports if target.startswith(f"{wing}.")}
        rooms = {room_of(target) for target in of_wing} - {""}
        assert rooms <= allowed, f"{module.name} imports from {rooms - allowed}"
        assert not of_wing & ABOVE, module.name


def test_every_room_has_walls(modules: dict[str, Module]) -> None:
    unwalled = {"engine.demo", "deployments.playground"}
    named = {".".join(name.split(".")[:2]) for name in modules if name.count(".") >= 2}
    assert named - unwalled == set(ROOMS)


def test_nothing_is_over_its_mark(modules: dict[str, Module]) -> None:
    assert not faults(modules)


def test_the_pages_scripts_import_in_no_circle() -> None:
    scripts = ROOT / "deployments" / "playground"
    imports = {
        path.name: set(re.findall(r'from "\./(\w+\.js)"', path.read_text()))
        for path in scripts.glob("*.js")
    }
    while free := {name for name, others in imports.items() if not others & imports.keys()}:
        imports = {name: others for name, others in imports.items() if name not in free}
    assert not imports


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
front.tokenizer.warm_up()
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
