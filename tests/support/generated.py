#!/usr/bin/env python3
"""Which C files have been generated from the present Cython files, by the digests in a file.

    python3 tests/support/generated.py unknown _core native/bell   prints those that no digest knows
    python3 tests/support/generated.py know _core native/bell      writes the digests anew

To generate all takes 16 seconds of a processor, and `make test` does that only for modules that are
unknown here. `make nightly` generates all, whatever the file says.

Knows: what Cython reads and what comes out. Does not know: Cython.
Invariant: a digest is that of one state of all that is read and of the C file that it made. So a
line too many, after a merge for example, vouches for nothing that is wrong.
"""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path

HOME = Path(__file__).parents[2]
SOURCES = HOME / "src/ivshmem"
DIGESTS = SOURCES / "generated.sha256"


def digest(module: str) -> str:
    """Of Cython's version, the module's source, all declarations, and the C file."""
    pinned = re.search(r'"Cython==[^"]+"', (HOME / "pyproject.toml").read_text())
    assert pinned is not None
    declarations = sorted(SOURCES.rglob("*.pxd"))
    read = hashlib.sha256(pinned[0].encode())
    for path in (*declarations, SOURCES / f"{module}.pyx", SOURCES / f"{module}.c"):
        data = path.read_bytes()
        read.update(f"{path.relative_to(SOURCES)} {len(data)}\n".encode() + data)
    return read.hexdigest()


def unknown(modules: list[str]) -> list[str]:
    known = DIGESTS.read_text().splitlines() if DIGESTS.exists() else []
    return [module for module in modules if f"{digest(module)}  {module}" not in known]


def main() -> None:
    what, *modules = sys.argv[1:]
    if what == "know":
        DIGESTS.write_text("".join(f"{digest(module)}  {module}\n" for module in sorted(modules)))
    else:
        print(*unknown(modules))


if __name__ == "__main__":
    main()
