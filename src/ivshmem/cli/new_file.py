"""A command's FILE that is made: only with --force in the place of another.

Knows: the option, and what to say without it. Does not know: what the file is.
"""

from __future__ import annotations

import contextlib

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator


def add_force(parser: argparse.ArgumentParser) -> None:
    """Add the option by which a file that is there is written over."""
    parser.add_argument("--force", action="store_true", help="write over a FILE that is there")


@contextlib.contextmanager
def told() -> Iterator[None]:
    """In the error for a file that is there, name the option."""
    try:
        yield
    except FileExistsError as error:
        text = "file exists: choose another path, or write over it with --force"
        raise FileExistsError(error.errno, text, error.filename) from None
