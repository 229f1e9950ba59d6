"""Sphinx's settings: `make docs` builds the pages of this directory into build/docs."""

from __future__ import annotations

import contextlib
import io
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from docutils import nodes
from docutils.parsers.rst import Directive

import ivshmem
from ivshmem.cli import compat
from ivshmem.cli import main as cli

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "ivshmem"
author = "the ivshmem authors"
project_copyright = "the ivshmem authors"
version = release = ivshmem.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["conf.py"]
myst_enable_extensions = ["deflist", "colon_fence"]
myst_heading_anchors = 3
highlight_language = "text"  # of blocks that name none
python_use_unqualified_type_names = True
default_role = "code"  # docstrings have `names` in single backticks
nitpicky = False

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_title = f"ivshmem {release}"
html_copy_source = False
html_show_sphinx = False

autodoc_preserve_defaults = True  # `_nothing`, not where that is in memory
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_type_aliases = {"Gate": "Gate", "Users": "Users"}
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
suppress_warnings = ["ref.python"]  # several classes have an attribute `vectors`


HOME = Path(__file__).parents[1]
# Pages that stand elsewhere in the repository, and where they are here.
PLACES = {
    HOME / "README.md": HOME / "docs/index.md",
    HOME / "ARCHITECTURE.md": HOME / "docs/explanation/architecture.md",
    HOME / "SECURITY.md": HOME / "docs/explanation/security.md",
    HOME / "bench/README.md": HOME / "docs/explanation/measurements.md",
    HOME / "examples/README.md": HOME / "docs/howto/examples.md",
    HOME / "CONTRIBUTING.md": HOME / "docs/contributing.md",
    HOME / "CHANGELOG.md": HOME / "docs/changelog.md",
}


class HelpOf(Directive):
    """`{help-of} serve`: what `ivshmem serve --help` prints, 90 columns wide."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        words = self.arguments[0].split()
        command = cli.main
        if words[0] == "ivshmem-server":
            command = compat.main
            del words[0]
        with (
            mock.patch.dict(os.environ, {"COLUMNS": "90", "HOME": "/root"}),
            contextlib.redirect_stdout(io.StringIO()) as said,
            contextlib.suppress(SystemExit),
        ):
            command([*words, "--help"])
        text = said.getvalue()
        assert text.startswith("usage: "), self.arguments[0]
        block = nodes.literal_block(text, text)
        block["language"] = "text"
        return [block]


def _take_in(app: Sphinx, name: str, source: list[str]) -> None:
    """Put the file that a page includes in its place, and let links lead to such places.

    The directive `include` of MyST leaves links between such files as they are.
    """
    folder = (HOME / "docs" / name).parent

    def linked(text: str, home: Path) -> str:
        def link_of(link: re.Match[str]) -> str:
            target = (home / link[1]).resolve()
            return f"]({os.path.relpath(PLACES.get(target, target), folder)}{link[2]})"

        return re.sub(r"\]\(([^)#\s:]+)((?:#[^)]*)?)\)", link_of, text)

    def text_of(match: re.Match[str]) -> str:
        file = (folder / match[1]).resolve()
        app.env.note_dependency(str(file), docname=name)
        return linked(file.read_text(), file.parent)

    include = re.compile(r"^```{include} (\S+)\n```$", re.MULTILINE)
    if include.search(source[0]):
        source[0] = include.sub(text_of, source[0])
    else:
        source[0] = linked(source[0], folder)


def _named_as_known(*arguments: Any) -> None:
    """Give the sections of docstrings the names that napoleon knows."""
    lines = arguments[-1]
    if arguments[1] in ("attribute", "property") and lines:
        lines[0] = lines[0].replace(": ", " \N{EN DASH} ")  # what is before it is no type
    lines[:] = ["Raises:" if line == "Raises, in all calls:" else line for line in lines]
    lines[:] = [part for line in _entries(lines) for part in line]


def _entries(lines: list[str]) -> list[list[str]]:
    """Give each attribute an entry of its own, where several share one (`read, write: ..`)."""
    found: list[list[str]] = []
    inside = False
    for line in lines:
        if line and not line.startswith(" "):
            inside = line == "Attributes:"
        several = re.fullmatch(r"    (\w+(?:, \w+)+): (.*)", line) if inside else None
        if several:
            found += [[f"    {name}: {several[2]}"] for name in several[1].split(", ")]
            shared = found[-several[1].count(",") - 1 :]
        elif inside and line.startswith("     ") and found and found[-1][0].startswith("    "):
            for entry in shared:
                entry.append(line)
        else:
            found.append([line])
            shared = found[-1:]
    return found


def _as_rst(*arguments: Any) -> None:
    """Make what docstrings of this package have in plain text good RST, in place."""
    lines: list[str] = arguments[-1]
    result: list[str] = []
    literal = table = False
    for line in lines:
        indent = len(line) - len(line.lstrip())
        row = re.fullmatch(r"\s*\|(.*)\|\s*", line)
        if row:
            if not table:
                result += ["", ".. list-table::", "    :header-rows: 1", ""]
            cells = [cell.strip() for cell in row[1].split(" | ")]
            if cells[0].strip("-|"):  # else it is the line below the head
                result += [f"    {'  ' if n else '* '}- {cell}" for n, cell in enumerate(cells)]
        elif table and line.strip():
            result.append("")
        table = row is not None
        if table:
            continue
        # An indented block after an empty line is an example.
        if indent >= 4 and result and not result[-1].strip() and not literal and _is_text(result):
            result += ["::", ""]
            literal = True
        elif line.strip() and indent == 0:
            literal = False
        result.append(line)
    lines[:] = result


def _is_text(before: list[str]) -> bool:
    """Whether the last line that is not empty is text at the left edge, and no directive."""
    last = next((line for line in reversed(before) if line.strip()), "")
    return bool(last) and not last.startswith((" ", "..", ":"))


def setup(app: Sphinx) -> None:
    app.add_directive("help-of", HelpOf)
    app.connect("source-read", _take_in)
    app.connect("autodoc-process-docstring", _named_as_known, priority=100)
    app.connect("autodoc-process-docstring", _as_rst, priority=900)  # after napoleon
