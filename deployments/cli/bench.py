"""`manta bench`: the scripts of benchmarks/ by name."""

import ast
import importlib.util
import os
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table


def run(name: str | None, arguments: list[str]) -> None:
    """Becomes the script; raises SystemExit with what there is to choose from."""
    known = benchmarks()
    if name is None or name in ("--help", "-h"):
        table = Table.grid(padding=(0, 3))
        table.add_column(style="bold")
        for each, summary in known.items():
            table.add_row(each, summary)
        Console(highlight=False).print(table)
        print("\nmanta bench NAME --help explains one and lists its options.")
        return
    if name not in known:
        sys.exit(f"error: there is no benchmark {name!r}; choose from: {', '.join(known)}")
    os.execv(sys.executable, [sys.executable, "-m", f"benchmarks.{name}", *arguments])


def benchmarks() -> dict[str, str]:
    """Name and first sentence of every script, read without importing any."""
    package = importlib.util.find_spec("benchmarks")
    assert package is not None and package.submodule_search_locations is not None
    found = {}
    for path in sorted(Path(package.submodule_search_locations[0]).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        if "main" in names:
            found[path.stem] = (ast.get_docstring(tree) or "").split("\n")[0]
    return found
