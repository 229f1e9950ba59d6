"""Where measurements have their memory. Knows: its name. Does not know: what is in it."""

from __future__ import annotations

import os
import tempfile


def folder() -> tempfile.TemporaryDirectory[str]:
    """Make a folder in memory; its name tells whose it is, for tests look at what is left there."""
    prefix = f"ivshmem-bench-{os.getpid()}-"
    return tempfile.TemporaryDirectory(prefix=prefix, dir="/dev/shm")
