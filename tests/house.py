"""The house in figures: `python -m tests.house` prints them, and fails where one is over its mark.

Rooms are the packages; what may import what is in tests/test_architecture.py.
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WINGS = ("kernels", "engine", "deployments")
MOST_FILES = 14  # in a room
MOST_LINES = 400  # in a file; Triton's kernels are exempt
MOST_FUNCTION_LINES = 60


@dataclass
class Module:
    """One file: its name as it is imported, and the modules of the house that it imports."""

    name: str
    path: Path
    num_lines: int
    functions: dict[str, int]  # lines by name
    imports: set[str] = field(default_factory=set)

    @property
    def room(self) -> str:
        is_room = self.path.name == "__init__.py"
        return self.name if is_room else self.name.rpartition(".")[0]

    @property
    def is_triton(self) -> bool:
        return self.room == "kernels.cuda"


def read_house() -> dict[str, Module]:
    """All modules by name."""
    modules: dict[str, Module] = {}
    trees: dict[str, ast.Module] = {}
    for path in sorted(p for wing in WINGS for p in (ROOT / wing).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        source = path.read_text()
        trees[name] = ast.parse(source)
        modules[name] = Module(name, path, source.count("\n"), dict(_functions(trees[name])))
    for name, tree in trees.items():
        named = {target for node in ast.walk(tree) for target in _imported(node)}
        # `from a.b import c` names the module a.b.c where there is one, else a.b.
        modules[name].imports = {t for t in named if t in modules and t != name}
    return modules


def _functions(tree: ast.Module) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            is_kernel = any("jit" in ast.unparse(d) for d in node.decorator_list)
            if node.end_lineno is not None and not is_kernel:
                yield f"{node.name}:{node.lineno}", node.end_lineno - node.lineno + 1


def _imported(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
        yield node.module
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms(modules: dict[str, Module]) -> dict[str, list[Module]]:
    """The modules of each room, without those that are only a room's `__init__`."""
    found: dict[str, list[Module]] = {}
    for module in modules.values():
        if module.path.name != "__init__.py":
            found.setdefault(module.room, []).append(module)
    return found


def find_circle(modules: dict[str, Module]) -> list[str]:
    """Modules that import each other in a ring, also within functions; [] when there is none."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for target in sorted(modules[name].imports):
            is_room = modules[target].path.name == "__init__.py"
            if not is_room and (circle := visit(target, [*path, name])):
                return circle
        done.add(name)
        return []

    return next((circle for name in sorted(modules) if (circle := visit(name, []))), [])


def longest_chain(modules: dict[str, Module], wing: str) -> list[str]:
    """The longest path of imports within a wing, which has no circle."""
    longest: dict[str, list[str]] = {}

    def chain(name: str) -> list[str]:
        if name not in longest:
            below = [
                chain(target)
                for target in sorted(modules[name].imports)
                if target.startswith(f"{wing}.") and modules[target].path.name != "__init__.py"
            ]
            longest[name] = [name, *max(below, key=len, default=[])]
        return longest[name]

    return max((chain(name) for name in modules if name.startswith(f"{wing}.")), key=len)


def faults(modules: dict[str, Module]) -> list[str]:
    """What is over its mark."""
    found = []
    for module in modules.values():
        if module.num_lines > MOST_LINES and not module.is_triton:
            found.append(f"{module.path.relative_to(ROOT)} has {module.num_lines} lines")
        for function, num_lines in module.functions.items():
            if num_lines > MOST_FUNCTION_LINES and not module.is_triton:
                found.append(f"{module.name}.{function} has {num_lines} lines")
    for room, files in rooms(modules).items():
        if len(files) > MOST_FILES:
            found.append(f"{room} holds {len(files)} files")
    if circle := find_circle(modules):
        found.append("imports go round: " + " > ".join(circle))
    return found


def figures(modules: dict[str, Module]) -> str:
    """In Markdown."""
    table = ["| room | files | lines |", "|---|---|---|"]
    for room, files in sorted(rooms(modules).items()):
        num_lines = sum(f.num_lines for f in files)
        table.append(f"| `{room.replace('.', '/')}/` | {len(files)} | {num_lines:,} |")
    functions = [
        (lines, f"{module.name}.{name}")
        for module in modules.values()
        if not module.is_triton
        for name, lines in module.functions.items()
    ]
    largest = max((m for m in modules.values() if not m.is_triton), key=lambda m: m.num_lines)
    num_lines, longest = max(functions)
    chain = longest_chain(modules, "engine")
    return "\n".join(
        [
            *table,
            "",
            f"{sum(m.num_lines for m in modules.values()):,} lines of Python. The largest file "
            f"is {largest.path.relative_to(ROOT)}, {largest.num_lines} lines; the longest "
            f"function {longest}, {num_lines} lines. The longest chain of imports in `engine/` has "
            f"{len(chain)} files: {' > '.join(chain)}.",
        ]
    )


def main() -> int:
    modules = read_house()
    print(figures(modules))
    over = faults(modules)
    print("\n".join(["", "over the marks:", *over]) if over else "\nnothing is over its mark")
    return bool(over)


if __name__ == "__main__":
    sys.exit(main())
