"""Limits on open files, for a while."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator

from .leaks import open_fds


@contextlib.contextmanager
def open_files(limit: int) -> Iterator[None]:
    """The soft limit is `limit`, or the hard limit where that is lower."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def free_fds(count: int) -> Iterator[None]:
    """Exactly `count` more descriptors can be opened.

    Holes among the numbers in use are filled first, so that the limit means what it says.
    """
    fillers = []
    try:
        highest = max(open_fds())
        while (filler := os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)) < highest:
            fillers.append(filler)
        os.close(filler)
        with open_files(highest + 1 + count):
            yield
    finally:
        for filler in fillers:
            os.close(filler)
