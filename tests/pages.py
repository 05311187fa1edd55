"""README.md and docs/*.md as tests read them: files, code and commands of a page, in order, and its links."""

import re
from pathlib import Path
from typing import NamedTuple

from tests.conftest import ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"^```(\w+)?(?: title=\"(\S+)\")?\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    title: str
    """Path of the file that the block is, "" for commands and code."""
    text: str


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path) -> list[Block]:
    return [Block(*found) for found in FENCE.findall(path.read_text())]


def shell_lines(path: Path) -> list[str]:
    """Commands of a page without their comments."""
    lines = [line for block in blocks(path) if block.language == "bash" for line in block.text.splitlines()]
    return [re.sub(r"\s+# .*", "", line) for line in lines if line.strip() and not line.startswith("#")]


def write_files(path: Path, folder: Path) -> None:
    """Write the titled blocks of a page below a folder."""
    for block in blocks(path):
        if block.title:
            (folder / block.title).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.title).write_text(block.text)


def anchor(heading: str) -> str:
    """The anchor of a heading as MkDocs makes it."""
    if own := re.search(r"\{#([\w-]+)\}", heading):
        return own[1]
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", re.sub(r"[`*]", "", heading)).strip().lower())


def anchors(path: Path) -> set[str]:
    text = FENCE.sub("", path.read_text())
    return {anchor(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


def links(path: Path) -> list[tuple[Path, str]]:
    """(file, anchor) of each relative link of a page; pictures too."""
    text = FENCE.sub("", path.read_text())
    found = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    return [
        ((path.parent / target.partition("#")[0]).resolve() if target[0] != "#" else path, target.partition("#")[2])
        for target in found
    ]
