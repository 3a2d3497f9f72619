"""What MkDocs does to a page before it is rendered: lines that begin with ":::" become content.

    ::: source FILE NAME        the definition of NAME (`Class.method`) as it is in the code
    ::: file FILE               a whole file
    ::: fields MODULE.MODEL     a table of a pydantic model's fields
    ::: house                   the rooms, their files and lines

So nothing here can differ from the code; what is not there any more ends the build.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from docs.site import bars, fields, source  # noqa: E402
from tests import house  # noqa: E402

_DIRECTIVE = re.compile(r"^::: (\w+) ?(.*)$", re.MULTILINE)


def on_config(config: Any, **_: Any) -> Any:
    """Adds the plots; and pages that nobody has put into the navigation, under "More"."""
    fence = {"name": "bars", "class": "bars", "format": bars.draw}
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [fence]
    pages = {path.name for path in Path(config.docs_dir).glob("*.md")}
    if more := sorted(pages - set(_pages(config.nav))):
        config.nav.append({"More": more})
    return config


def _pages(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for item in nav.values() if isinstance(nav, dict) else nav:
            yield from _pages(item)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    return expand(markdown, page.file.src_path)


def expand(markdown: str, page: str) -> str:
    """The page with its directives carried out; raises PluginError naming page and directive."""

    def replace(match: "re.Match[str]") -> str:
        name, rest = match.groups()
        try:
            if name == "source":
                file, definition = rest.split()
                return source.definition(ROOT / file, definition, file)
            if name == "file":
                return source.whole(ROOT / rest, rest)
            if name == "house":
                return house.figures(house.read_house())
            if name == "fields":
                return fields.table(rest)
        except (LookupError, OSError, ValueError, AttributeError, ImportError) as error:
            raise PluginError(f"{page}: {match[0]}: {error}") from error
        raise PluginError(f"{page}: there is no directive {name!r}")

    return _DIRECTIVE.sub(replace, markdown)
