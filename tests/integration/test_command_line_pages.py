"""Man pages and completions know the command line: each subcommand, and each option of it."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ivshmem.cli import compat, main

HOME = Path(__file__).parents[2]
IN_BASH = """
. "$1"
while read -r count words; do
    COMP_WORDS=($words) COMP_CWORD=$count
    [ ${#COMP_WORDS[@]} -gt $count ] || COMP_WORDS+=("")
    _shtab_${COMP_WORDS[0]//-/_} 2>&1
    echo "${COMPREPLY[@]}"
done
"""


def parsers() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """All commands by their words, each from the parser that runs it."""
    yield "ivshmem", main._parser([])
    for name in main.SUBCOMMANDS:
        (action,) = main._parser([name])._subparsers._group_actions  # type: ignore[union-attr]
        yield from below(f"ivshmem {name}", action.choices[name])  # type: ignore[index]
    yield "ivshmem-server", compat._parser()


def below(
    words: str, parser: argparse.ArgumentParser
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    yield words, parser
    for name, inner in subcommands(parser).items():
        yield from below(f"{words} {name}", inner)


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    found = [each for each in parser._actions if isinstance(each, argparse._SubParsersAction)]
    return dict(found[0].choices) if found else {}


def options(parser: argparse.ArgumentParser) -> set[str]:
    shown = [each for each in parser._actions if each.help != argparse.SUPPRESS]
    return {option for action in shown for option in action.option_strings}


PARSERS = dict(parsers())
# Without the second names of commands: man pages have one section for each command.
FIRST_NAMES = list({id(parser): words for words, parser in reversed(PARSERS.items())}.values())


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in ("argparse_manpage", "shtab"):
        pytest.importorskip(name)
    folder = tmp_path_factory.mktemp("pages")
    command = [sys.executable, "-B", str(HOME / "packages/command_line.py"), str(folder)]
    subprocess.run(command, check=True, timeout=60)
    return folder


def test_the_tree_is_not_empty() -> None:
    assert {"ivshmem serve", "ivshmem guest bundle", "ivshmem channel put"} <= set(PARSERS)
    assert all("--help" in options(parser) for parser in PARSERS.values())
    assert {"-S", "--socket"} <= options(PARSERS["ivshmem channel put"])
    assert set(PARSERS) - set(FIRST_NAMES) == {"ivshmem guest dump"}


def sections(page: str) -> dict[str, str]:
    """The text about each command of a man page."""
    found: dict[str, str] = {}
    for part in re.split(r"^\.SH", page, flags=re.MULTILINE):
        title, _, rest = part.partition("\n")
        named = re.search(r"'(.*)'", title)
        words = named[1] if named else ""
        found[words] = found.get(words, "") + rest
    return {
        words: re.sub(r"\\f.|\\[,/]", "", text).replace("\\-", "-") for words, text in found.items()
    }


@pytest.mark.parametrize("words", FIRST_NAMES)
def test_man_pages(pages: Path, words: str) -> None:
    parser, whole = PARSERS[words], " " not in words
    text = sections((pages / f"{words.split()[0]}.1").read_text())["" if whole else words]
    for option in options(parser) - {"-h", "--help"}:  # in the synopsis alone, as in others' pages
        assert re.search(rf"^(.*, )?{option}\b", text, re.MULTILINE), option


def test_man_reads_the_pages(pages: Path) -> None:
    if not shutil.which("man"):
        pytest.skip("apt-get install man-db")
    for page in pages.glob("*.1"):
        done = subprocess.run(
            ["man", "--warnings", "-l", page],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert done.stderr == ""
        assert done.stdout.count("\n") > 20


def asked(pages: Path, command: str, lines: list[str]) -> list[set[str]]:
    """What bash offers after each of these lines, whose last word is to be completed."""
    numbered = "".join(f"{len(line.split(' ')) - 1} {line}\n" for line in lines)
    done = subprocess.run(
        ["bash", "--norc", "-c", IN_BASH, "bash", pages / f"{command}.bash"],
        input=numbered,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stderr == ""
    return [set(line.split()) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("command", ["ivshmem", "ivshmem-server"])
def test_bash(pages: Path, command: str) -> None:
    mine = {words: parser for words, parser in PARSERS.items() if words.split()[0] == command}
    offered = asked(pages, command, [f"{words} -" for words in mine])
    for (words, parser), there in zip(mine.items(), offered, strict=True):
        assert there == options(parser), words
    offered = asked(pages, command, [f"{words} " for words in mine])
    for (words, parser), there in zip(mine.items(), offered, strict=True):
        assert not subcommands(parser) or there == set(subcommands(parser)), words


def test_bash_completes_files(pages: Path, tmp_path: Path) -> None:
    (tmp_path / "recording").touch()
    lines = [
        f"ivshmem channel record {tmp_path}/rec",
        f"ivshmem channel replay {tmp_path}/rec",
        f"ivshmem serve --pid-file {tmp_path}/rec",
    ]
    assert asked(pages, "ivshmem", lines) == [{f"{tmp_path}/recording"}] * len(lines)


def test_zsh(pages: Path) -> None:
    for words, parser in PARSERS.items():
        text = (pages / f"_{words.split()[0]}").read_text()
        name = re.sub(r"\W", "_", words)
        block = re.search(rf"^_shtab_{name}_options=\(\n(.*?)^\)", text, re.MULTILINE | re.DOTALL)
        assert block, words
        listed = set(re.findall(r"(?<![\w-])-[\w-]+(?=[\[,}])", block[1]))
        assert listed == options(parser), words
        if subcommands(parser):
            block = re.search(
                rf"^_shtab_{name}_commands\(\) \{{\n(.*?)^\}}", text, re.MULTILINE | re.DOTALL
            )
            assert block, words
            assert set(re.findall(r"^ +([\w-]+):'", block[1], re.MULTILINE)) == set(
                subcommands(parser)
            ), words
