"""The QEMU that tests start as a process, where no guest has to run."""

from __future__ import annotations

import os
import shutil

import pytest

QEMU = os.environ.get("QEMU") or "qemu-system-x86_64"

needs_qemu = pytest.mark.skipif(
    not shutil.which(QEMU), reason="needs QEMU: apt-get install qemu-system-x86"
)
