"""The QEMU that tests run, with guests and without."""

from __future__ import annotations

import os
import shutil

import pytest

# `make test QEMU=PATH` runs the tests on another one than Debian's.
QEMU = os.environ.get("QEMU") or "qemu-system-x86_64"

needs_qemu = pytest.mark.skipif(
    not shutil.which(QEMU), reason="needs QEMU: apt-get install qemu-system-x86"
)
