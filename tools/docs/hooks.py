"""What mkdocs does for this site besides Markdown: generated parts, pages from outside docs/, links to source files.

A page has a generated part where it says `<!-- generated: NAME -->`; `generated.PARTS` has the function. Links work in a checkout and
on the site alike: one that leaves docs/ for a file of the repository leads to a page with its source, and `file.py#name` to the line that
defines name.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_for_filename
from pymdownx.slugs import slugify

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]  # the package, and the modules beside this one

import formulas  # noqa: E402
import generated  # noqa: E402

# Pages whose source is not in docs/, because people look for it elsewhere.
OUTSIDE = {"slurm/README.md": "slurm.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
PART = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
FENCE = re.compile(r"^(?: *)(`{3,}).*?^(?: *)\1$", re.MULTILINE | re.DOTALL)


def on_config(config: Any) -> Any:
    config.mdx_configs["pymdownx.superfences"] = {
        "custom_fences": [{"name": "math", "class": "math", "format": formulas.block}]
    }
    config.mdx_configs["toc"] = {"permalink": True, "slugify": slugify(case="lower")}  # anchors as GitHub makes them
    return config


def on_files(files: Files, config: Any) -> Files:
    for source, uri in OUTSIDE.items():
        files.append(File.generated(config, uri, content=(ROOT / source).read_text(encoding="utf-8")))
    linked = set()
    for file in list(files.documentation_pages()):
        for target in (link for _, link, _ in LINK.findall(_text_of(file))):
            if (path := _outside(target, file.src_uri)) is not None:
                linked.add(path)
    for path in sorted(linked):
        page = File.generated(config, f"source/{path}.md", content=_source_page(path))
        page.inclusion = type(page.inclusion).NOT_IN_NAV
        files.append(page)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    if page.file.src_uri.startswith("source/"):
        page.meta["search"] = {"exclude": True}
        return markdown
    markdown = PART.sub(lambda match: _generated(match[1]), markdown)
    return _outside_fences(
        markdown, lambda text: LINK.sub(lambda m: m[1] + _rewritten(m[2], page.file.src_uri) + m[3], text)
    )


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """In a table GitHub wants `|` escaped in code, too; Python-Markdown shows the backslash."""
    return re.sub(r"<td>.*?</td>", lambda cell: cell[0].replace("\\|", "|"), html)


def _generated(name: str) -> str:
    return generated.PARTS[name]()


def _text_of(file: File) -> str:
    return FENCE.sub("", file.content_string)


def _outside_fences(markdown: str, change: Any) -> str:
    out, last = [], 0
    for fence in FENCE.finditer(markdown):
        out += [change(markdown[last : fence.start()]), fence[0]]
        last = fence.end()
    return "".join([*out, change(markdown[last:])])


def _origin(uri: str) -> str:
    """Where a page's Markdown is in the repository."""
    return next((source for source, page in OUTSIDE.items() if page == uri), f"docs/{uri}")


def _target(link: str, uri: str) -> str | None:
    """The file of the repository that a relative link leads to."""
    path = link.partition("#")[0]
    if "://" in link or link.startswith("mailto:") or not path:
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(_origin(uri)), path))


def _outside(link: str, uri: str) -> str | None:
    """The same if it is a file without a page of its own."""
    path = _target(link, uri)
    if path is None or path.startswith("docs/") or path in OUTSIDE or not (ROOT / path).is_file():
        return None
    return path


def _rewritten(link: str, uri: str) -> str:
    path = _target(link, uri)
    if path is None:
        return link
    anchor = link.partition("#")[2]
    if path in OUTSIDE:
        page = OUTSIDE[path]
    elif path.startswith("docs/"):
        page = path.removeprefix("docs/")
    elif (ROOT / path).is_file():
        page = f"source/{path}.md"
        anchor = f"line-{line_of(ROOT / path, anchor)}" if anchor else ""
    else:
        return link  # mkdocs reports it
    relative = posixpath.relpath(page, posixpath.dirname(uri) or ".")
    return f"{relative}#{anchor}" if anchor else relative


def line_of(path: Path, name: str) -> int:
    """The line of a Python file that defines `name`, a function, a class or a constant. Raises ValueError if none does."""
    pattern = re.compile(rf"\s*(?:def|class) {re.escape(name)}\b|{re.escape(name)}\b\s*[:=]")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if pattern.match(line):
            return number
    raise ValueError(f"{path}: nothing is called {name}")


def _source_page(path: str) -> str:
    """A file with its lines numbered, each with an anchor that mkdocs knows of: `line-7`."""
    code = highlight(
        (ROOT / path).read_text(encoding="utf-8"), get_lexer_for_filename(path), HtmlFormatter(nowrap=True)
    )
    lines = (f'<a id="line-{n}" data-line="{n}"></a>{line}' for n, line in enumerate(code.rstrip("\n").split("\n"), 1))
    return f'# {path}\n\n<div class="highlight source"><pre><code>' + "\n".join(lines) + "</code></pre></div>\n"
