"""What several workers of one run need, and the first of them makes."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest


def folder(factory: pytest.TempPathFactory, name: str) -> Path:
    """A folder of this run that its workers share. Without workers it is the run's own, too."""
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    found = base / f"shared-{name}"
    found.mkdir(exist_ok=True)
    return found


def made_once(path: Path, make: Callable[[Path], object]) -> Path:
    """Return a file or a folder; unless it is there, `make(path beside it)` makes it."""
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            draft = path.with_name(f"{path.name}.draft")
            make(draft)
            draft.rename(path)
    return path
