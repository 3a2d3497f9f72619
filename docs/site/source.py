"""Pieces of the code for pages, read from the files when the pages are built."""

import ast
import textwrap
from pathlib import Path

_LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".js": "javascript"}


def definition(path: Path, name: str, shown: str) -> str:
    """A code block with the class, function or method; raises LookupError if it is not there."""
    text = path.read_text(encoding="utf-8")
    node = _find(ast.parse(text), name.split("."))
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    code = textwrap.dedent("\n".join(text.splitlines()[first - 1 : node.end_lineno]))
    return f'```python linenums="{first}" title="{shown}"\n{code}\n```'


def whole(path: Path, shown: str) -> str:
    """A code block with the file."""
    language = _LANGUAGES.get(path.suffix, "text")
    return f'```{language} title="{shown}"\n{path.read_text(encoding="utf-8").rstrip()}\n```'


Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _find(tree: ast.AST, names: list[str]) -> Definition:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Definition) and node.name == names[0]:
            return node if len(names) == 1 else _find(node, names[1:])
    raise LookupError(f"there is no {names[0]!r}")
