"""Internal: the library `mcap`, which an extra brings.

Knows: what to say if it is missing, and the choices that a command offers before it is imported.
Does not know: files.
"""

from __future__ import annotations

import importlib.util

BUFFER = 256 << 20  # bytes that wait for the disk
COMPRESSIONS = {"none": None, "lz4": "lz4", "zstd": "zstandard"}  # and the module of each


def check(compression: str = "none") -> None:
    """Check that the library is there, and the one of a compression.

    Raises:
        ValueError: it is not; the message says how to install it.
    """
    for module in ("mcap", COMPRESSIONS[compression]):
        if module is not None and importlib.util.find_spec(module) is None:
            raise ValueError(f"recordings need the library {module}: pip install mcap")
