"""The pages of the documentation, and what stands in their blocks."""

from __future__ import annotations

import re
from pathlib import Path

HOME = Path(__file__).parents[2]
README = HOME / "README.md"
PAGES = [
    README,
    *(HOME / name for name in ("ARCHITECTURE.md", "SECURITY.md", "CONTRIBUTING.md")),
    HOME / "bench/README.md",
    *sorted((HOME / "docs").rglob("*.md")),
]


def name_of(page: Path) -> str:
    return str(page.relative_to(HOME))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def shell_lines(page: Path) -> list[str]:
    """Each command of the page's blocks of shell, one that is continued as one line."""
    text = re.sub(r"\\\n\s*", "", "".join(blocks(page, "sh")))
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def indented(page: Path) -> list[str]:
    """The lines of the page's indented blocks."""
    unfenced = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    return re.findall(r"(?<=\n\n)((?: {4}\S.*\n)+)", unfenced)
