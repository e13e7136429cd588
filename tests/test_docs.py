"""Paths, links and anchors in the Markdown files exist."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT

PACKAGE = ROOT / "megatron_iwsft"
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "slurm/*.md")
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md"
)
PATH = re.compile(r"\.?\w[\w.-]*(/[\w.-]+)*/?")
SOURCE = (".py", ".sh", ".sbatch", ".yaml", ".md", ".toml")
# `folder/`: `module`, `module`
MODULES = re.compile(r"`([\w/]+/)`:((?: `\w+/?`,?)+)")
# Placeholders, files of a run, and files of other repositories.
FOREIGN = {
    "CONFIG.yaml",
    "config.yaml",
    "preprocess_data.py",
    "preprocess_data_fast.py",
    "pretrain_gpt.py",
    "run_config.yaml",
}
USERS = {"runs", "models", "corpora", "build", "evaluation"}  # folders that commands of the documents make


def is_folder(part: str) -> bool:
    return ((ROOT / part).is_dir() and part not in USERS) or (PACKAGE / part).is_dir()


def named_paths(text: str) -> Iterator[str]:
    """Every path of the repository that `text` names in backticks or in a code block."""
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    for word in (word for span in (*blocks, *inline) for word in span.split()):
        word = word.strip("'\"(),;")
        if not PATH.fullmatch(word):
            continue
        first, slash, _ = word.partition("/")
        if (slash and is_folder(first)) or (not slash and word.endswith(SOURCE) and word not in FOREIGN):
            yield word
    for folder, modules in MODULES.findall(text):
        yield from (folder + module for module in re.findall(r"`(\w+/?)`", modules))


def exists(path: str, document: Path) -> bool:
    """Whether `path` is one of the repository, of the package (a module also without .py) or beside the document."""
    roots = (ROOT, PACKAGE, document.parent)
    if any((root / name).exists() for root in roots for name in (path, f"{path}.py")):
        return True
    return "/" not in path and any((ROOT / folder / path).exists() for folder in ("configs", "tools"))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    missing = sorted({path for path in named_paths(text) if not exists(path, document)})
    assert not missing, f"{document.relative_to(ROOT)} names paths that do not exist: {', '.join(missing)}"


def anchors(document: Path) -> set[str]:
    """Of the headings of a Markdown file, as GitHub and the site make them, and those that it sets itself."""
    text = re.sub(r"^( *)(`{3,}).*?^ *\2$", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ +(.*?)(?: *\{ *#\S+ *\})? *$", text, re.MULTILINE)
    slugs = (re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings)
    return {*slugs, *re.findall(r"\{ *#(\S+) *\}", text)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    """The file exists. In Markdown the anchor is one of a heading, in Python it is a name that the file defines."""
    missing = []
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        if "://" in link:
            continue
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            missing.append(link)
        elif anchor and target.suffix == ".py":
            defined = rf"^ *(?:def|class) {anchor}\b|^{anchor}\b\s*[:=]"
            missing += [] if re.search(defined, target.read_text(encoding="utf-8"), re.MULTILINE) else [link]
    assert not missing


def test_paths_are_found_in_text() -> None:
    text = "`tests/none.py`, `data/`: `corpus`, `none`; `bash launch/none.sh N` and `path/to/file.py:name`\n```\npython tools/none.py\n```"
    found = set(named_paths(text))
    assert found == {"tests/none.py", "data/", "data/corpus", "data/none", "launch/none.sh", "tools/none.py"}
    assert [path for path in sorted(found) if exists(path, ROOT / "README.md")] == ["data/", "data/corpus"]


def test_the_map_of_the_folders_is_up_to_date() -> None:
    """Otherwise: python tools/docs/architecture.py"""
    draw = runpy.run_path(str(ROOT / "tools" / "docs" / "architecture.py"))["draw"]
    assert (ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8") == draw()
