"""A fenced block ```bars as a plot: a line for each bar, drawn in the page's own colours.

    title: Output tokens/s, Qwen3-0.6B shape
    Manta | 171
    vLLM | 119 | lighter

The numbers stand in the page, beside the command that made them; nobody draws an image anew.
"""

import re
from html import escape
from typing import Any

_ROW, _BAR, _LABEL, _WIDTH = 30, 18, 210, 720


def draw(text: str, language: str, class_name: str, options: Any, md: Any, **_: Any) -> str:
    """An SVG. Raises ValueError for a line that is neither a title nor a bar."""
    title, bars = "", []
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.startswith("title:"):
            title = line.removeprefix("title:").strip()
            continue
        found = re.fullmatch(r"([^|]+)\|\s*([\d,.]+)\s*([^|]*)(\|\s*lighter)?", line)
        if found is None:
            raise ValueError(f"a bar is 'LABEL | NUMBER UNIT', not {line!r}")
        label, number, unit, lighter = found.groups()
        bars.append((label.strip(), number, unit.strip(), bool(lighter)))
    longest = max(float(number.replace(",", "")) for _, number, _, _ in bars)
    scale = (_WIDTH - _LABEL - 110) / longest
    rows = []
    for i, (label, number, unit, lighter) in enumerate(bars):
        y, width = i * _ROW, max(float(number.replace(",", "")) * scale, 1)
        rows.append(
            f'<text x="{_LABEL - 10}" y="{y + 14}" text-anchor="end">{escape(label)}</text>'
            f'<rect x="{_LABEL}" y="{y}" width="{width:.1f}" height="{_BAR}" rx="3"'
            f' class="{"lighter" if lighter else "bar"}"/>'
            f'<text x="{_LABEL + width + 8:.1f}" y="{y + 14}">{number} {escape(unit)}</text>'
        )
    height = len(bars) * _ROW
    spoken = "; ".join(f"{label}: {number} {unit}".strip() for label, number, unit, _ in bars)
    return (
        f'<figure class="bars"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(spoken)}">'
        f"{''.join(rows)}</svg></figure>"
    )
