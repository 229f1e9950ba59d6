#!/usr/bin/env python3
"""Unpacks the newest QEMU that Debian has into a folder, and prints the path of its program.

    QEMU=$(python3 tests/vm/newest_qemu.py FOLDER) && make test QEMU="$QEMU"

Only the path goes to stdout. `tests/support/unpacked.py` says what happens to the machine (nothing)
and what becomes of an old copy.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # it is run by its path

from support import unpacked


class Qemu(unpacked.Program):
    """qemu-system-x86_64, if it has the device that this is about."""

    name = "newest_qemu"
    packages = ("qemu-system-x86", "qemu-system-data", "seabios", "ipxe-qemu")

    def path(self, root: Path) -> Path:
        return root / "usr/bin/qemu-system-x86_64"

    def version(self, root: Path) -> str:
        program = str(self.path(root))
        if not self.path(root).exists():
            return ""
        shown, devices = unpacked.done(program, "--version"), unpacked.done(program, *DEVICES)
        if shown.returncode or devices.returncode or "ivshmem-doorbell" not in devices.stdout:
            return ""
        return shown.stdout.partition("\n")[0]

    def settle(self, new: Path, target: Path) -> None:
        super().settle(new, target)
        # QEMU looks for firmware and modules below this folder beside the program, if it is there:
        # as it does when it is run from where it was built. Those of the host's QEMU would end it.
        bundle = self.path(new).parent / "qemu-bundle"
        bundle.mkdir()
        (bundle / "usr").symlink_to("../../../usr")


DEVICES = ("-device", "help")


if __name__ == "__main__":
    sys.exit(unpacked.main(Qemu(), sys.argv[1:]))
