"""Draw docs/architecture.svg: the package's folders in rows, each above all that it imports.

example:
  python tools/docs/architecture.py
"""

from __future__ import annotations

import ast
import textwrap
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_iwsft"
WIDTH, BOX, GAP, MARGIN = 820, 68, 12, 10
STYLE = """
  svg { font-family: system-ui, sans-serif; }
  .page { fill: #fff; } .box { fill: #eef1fb; stroke: #5c6bc0; }
  .name { font-weight: 600; font-size: 15px; fill: #1a237e; }
  .what { font-size: 12px; fill: #333; } .note { font-size: 12px; fill: #555; }
  @media (prefers-color-scheme: dark) {
    .page { fill: #1e2129; } .box { fill: #2b3043; stroke: #7986cb; } .name { fill: #c5cae9; } .what, .note { fill: #ccc; }
  }
"""


def folders() -> dict[str, str]:
    """Name → the first line of its docstring, of every folder at the top of the package."""
    out = {}
    for path in sorted(PACKAGE.glob("*/__init__.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        out[path.parent.name] = docstring.partition("\n")[0].rstrip(".")
    return out


def imported(folder: str, known: dict[str, str]) -> set[str]:
    """The other folders that its modules import, functions included."""
    found = set()
    for path in (PACKAGE / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found |= {name.split(".")[1] for name in names if name.startswith("megatron_iwsft.")}
    return (found & set(known)) - {folder}


def rows(known: dict[str, str]) -> list[list[str]]:
    """From the top: each folder as low as its imports let it be."""
    graph = {folder: imported(folder, known) for folder in known}
    height: dict[str, int] = {}

    def height_of(folder: str) -> int:
        if folder not in height:
            height[folder] = 1 + max((height_of(below) for below in graph[folder]), default=-1)
        return height[folder]

    for folder in known:
        height_of(folder)
    return [[f for f in sorted(known) if height[f] == level] for level in range(max(height.values()), -1, -1)]


def draw() -> str:
    known = folders()
    out, y = [], MARGIN + 28
    for row in rows(known):
        width = (WIDTH - 2 * MARGIN - GAP * (len(row) - 1)) / len(row)
        for place, folder in enumerate(row):
            x = MARGIN + place * (width + GAP)
            out.append(f'<rect class="box" x="{x:.0f}" y="{y}" width="{width:.0f}" height="{BOX}" rx="6"/>')
            out.append(f'<text class="name" x="{x + 12:.0f}" y="{y + 24}">{escape(folder)}/</text>')
            for i, line in enumerate(textwrap.wrap(known[folder], max(20, int(width / 6.7)))[:4]):
                out.append(f'<text class="what" x="{x + 12:.0f}" y="{y + 42 + 14 * i}">{escape(line)}</text>')
        y += BOX + GAP
    note = "Each folder stands above every folder that it imports. At the bottom of all: errors.py, version.py."
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" role="img" aria-label="The folders of the package">'
    frame = f'<rect class="page" width="{WIDTH}" height="{y}"/><text class="note" x="{MARGIN}" y="{MARGIN + 8}">{note}</text>'
    return "\n".join([head, f"<style>{STYLE}</style>", frame, *out, "</svg>", ""])


if __name__ == "__main__":
    (ROOT / "docs" / "architecture.svg").write_text(draw(), encoding="utf-8")
