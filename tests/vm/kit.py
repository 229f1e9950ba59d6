"""The guest kit for a guest with Debian: of the package that is tested, or of its wheel.

Knows: which Python a suite has. Does not know: what a kit consists of.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support import wheels

from ivshmem.cli import guest_bundle as bundle

PYTHONS = {"bookworm": "3.11", "trixie": "3.13"}


def make(form: str, suite: str, folder: Path) -> bytes:
    """A kit that fits the Python of a suite.

    The modules that are tested fit this Python alone. For another one, a wheel is unpacked in the
    folder, and built if it must be, which takes minutes.

    Raises:
        unpacked.CannotError: it cannot be built.
    """
    if bundle.fits() in ("", PYTHONS[suite]):
        return bundle.make(form)
    package = wheels.extracted("cp310-abi3-*_x86_64", folder / "wheel")
    file = folder / f"kit.{form}"
    subprocess.run(
        [sys.executable, "-m", "ivshmem", "guest", "bundle", "-o", str(file)],
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(package)},
    )
    return file.read_bytes()
