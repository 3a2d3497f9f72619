"""The code blocks of the README and the pages, and the rule by which some are not run.

A block whose title begins with "Needs" says what it needs that a test machine has not. All others
are run as they stand, but that localhost:8000 becomes the address of a server of the test's own.
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# All that the site's navigation names.
_NAMED = re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
PAGES = [ROOT / "README.md", *(ROOT / "docs" / name for name in _NAMED)]

_FENCE = re.compile(
    r'^(?P<indent> *)```(?P<language>\w+)(?: title="(?P<title>[^"]*)")?\n'
    r"(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
RUNNABLE = ("bash", "python")


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    title: str
    code: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def need(self) -> str:
        """What it needs that a test machine has not; empty for one that is run."""
        return self.title.removeprefix("Needs ") if self.title.startswith("Needs ") else ""


def blocks() -> list[Block]:
    """All blocks in a language that can be run."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in _FENCE.finditer(text):
            if match["language"] in RUNNABLE:
                line = text.count("\n", 0, match.start()) + 1
                block = Block(
                    page.name, line, match["language"], match["title"] or "", match["code"]
                )
                found.append(block)
    return found


def commands(block: Block) -> list[str]:
    """The command lines of a block of shell: continued ones joined, comments left out."""
    joined = block.code.replace("\\\n", " ")
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in joined.splitlines())
    return [line for line in lines if line]
