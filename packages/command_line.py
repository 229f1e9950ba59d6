"""The command line as man pages, and as completions for bash and zsh.

    python3 packages/command_line.py FOLDER

Writes ivshmem.1, ivshmem-server.1, and for each command a file for bash and one for zsh. Needs the
package itself, argparse-manpage and shtab (Debian: python3-argparse-manpage, python3-shtab). Only
builds of packages and wheels need it: the package at run time has no use for these two.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from pathlib import Path

import shtab

from ivshmem.cli import compat, main

try:
    from argparse_manpage.manpage import Manpage
except ImportError:  # version 1, of Debian 12
    from build_manpages.manpage import Manpage


def commands() -> dict[str, argparse.ArgumentParser]:
    """The parsers of all commands, with all subcommands."""
    whole = main._parser([])
    (action,) = (each for each in whole._actions if isinstance(each, argparse._SubParsersAction))
    summaries = {each.dest: each for each in action._choices_actions}
    action._choices_actions.clear()
    action.choices.clear()
    for module, _ in dict.fromkeys((module, None) for module, _ in main.SUBCOMMANDS.values()):
        importlib.import_module(f"ivshmem.cli.{module}").add_to(action)
    # Some modules have no help of their own there: `ivshmem --help` takes it from the table.
    action._choices_actions[:] = [summaries[name] for name in main.SUBCOMMANDS]
    return {"ivshmem": whole, "ivshmem-server": compat._parser()}


def man_page(name: str, parser: argparse.ArgumentParser) -> str:
    """The page in section 1, the same on each day."""
    parser.man_short_description = parser.description.partition(".")[0]  # type: ignore[union-attr, attr-defined]
    page = Manpage(parser)
    page.manual = "ivshmem"  # the title above each page
    text = str(page)
    # argparse wraps the lines of a usage, and man would wrap them again.
    text = re.sub(r"^usage: .*(?:\n +.*)*", _in_one_line, text, flags=re.MULTILINE)
    # Version 1 has the name alone here, without what apropos shows.
    summary = f"{name} \\\\- {parser.man_short_description}"  # type: ignore[attr-defined]
    return re.sub(r"(?<=^\.SH NAME\n).*", summary, text, count=1, flags=re.MULTILINE)


def _in_one_line(found: re.Match[str]) -> str:
    return re.sub(r"\n +", " ", found[0])


_FILES = {"FILE": shtab.FILE, "PATH": shtab.FILE, "DIR": shtab.DIRECTORY}


def _name_files(parser: argparse.ArgumentParser) -> None:
    """Say which arguments are files: for these, shells complete the names of files."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                _name_files(inner)
        elif isinstance(action.metavar, str) and action.metavar in _FILES:
            action.complete = _FILES[action.metavar]  # type: ignore[attr-defined]  # for shtab


def _shorten(parser: argparse.ArgumentParser) -> None:
    """Describe subcommands in a line each, as zsh lists them."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for listed in action._choices_actions:
                action.choices[listed.dest].description = listed.help
            for inner in action.choices.values():
                _shorten(inner)


def write(folder: Path) -> None:
    """Write all files."""
    for name, parser in commands().items():
        (folder / f"{name}.1").write_text(man_page(name, parser))
        _shorten(parser)
        _name_files(parser)
        for shell, file in (("bash", f"{name}.bash"), ("zsh", f"_{name}")):
            (folder / file).write_text(shtab.complete(parser, shell))


if __name__ == "__main__":
    # What it says must not depend on who builds it: default paths, the terminal, the date.
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "0")
    os.environ.update(COLUMNS="100", HOME="/root", NO_COLOR="1", SOURCE_DATE_EPOCH=epoch)
    os.environ.pop("XDG_RUNTIME_DIR", None)
    write(Path(sys.argv[1]))
