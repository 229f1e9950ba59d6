"""The user data of `ivshmem qemu --cloud-init`, run by cloud-init in a new guest.

tests/unit/test_cloud_init.py compares it with cloud-init's schema.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import unpacked

import ivshmem
from ivshmem.cli import disk_image, main
from ivshmem.qemu import cmdline

from . import kit
from .installed import BOOT, InstalledGuest, make_disk, require

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(3000)]

# What GRUB would do with what it finds: this guest's kernel is started by QEMU, and has no GRUB.
UPDATE_GRUB = b"""#!/bin/sh
set -e
for file in /etc/default/grub.d/*.cfg; do . "$file"; done
echo "$GRUB_CMDLINE_LINUX" >/root/grub
"""

SUITE = "bookworm"
FILES = {
    "usr/sbin/update-grub": UPDATE_GRUB,
    # The image has no other locale: cloud-init fails to make the one that it would like.
    "etc/cloud/cloud.cfg.d/90_test.cfg": b"locale: C.UTF-8\n",
}

# NoCloud, as the pages of cloud-init have it: a disk with this label.
LABEL = "CIDATA"


def disk(path: Path) -> list[str]:
    return ["-drive", f"file={path},if=virtio,readonly=on,format=raw"]


@pytest.fixture
def started(
    tmp_path: Path,
    server: ivshmem.Server,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Callable[..., InstalledGuest]]:
    """Starts a guest that has the user data and the disk image with the kit."""
    require()
    guests = []

    def start(*options: str) -> InstalledGuest:
        iommu = "--iommu" in options
        capsys.readouterr()
        assert main.main(["qemu", "--cloud-init", *options]) == 0
        data = capsys.readouterr().out.encode()
        seed, image = tmp_path / "seed.iso", tmp_path / "ivshmem.iso"
        files = {"user-data": data, "meta-data": b"instance-id: one\nlocal-hostname: one\n"}
        seed.write_bytes(disk_image.image(LABEL, files))
        try:
            image.write_bytes(kit.make("iso", SUITE, tmp_path))
            boot, root = make_disk(tmp_path, SUITE, FILES, "cloud")
        except unpacked.CannotError as error:
            pytest.fail(str(error), pytrace=False)
        args = [*cmdline.doorbell(server.path, 4), *disk(seed), *disk(image)]
        guest = InstalledGuest(boot, root, args, iommu=iommu)
        guests.append(guest)
        guest.boot()
        return guest

    yield start
    for guest in guests:
        guest.close()


def done(guest: InstalledGuest) -> None:
    """cloud-init has ended, and nothing failed of what it was told."""
    for _ in range(12):  # a command may take so long, and this one more
        guest.run("timeout", "100", "cloud-init", "status", "--wait")
        said = guest.run("cloud-init", "status", "--long").output
        if "status: running" not in said:
            break
    log = guest.ok("cat", "/var/log/cloud-init-output.log")
    assert "Invalid cloud-config" not in log, guest.run("cloud-init", "schema", "--system").output
    assert "status: done" in said, f"{said}\n{log}"
    result = json.loads(guest.ok("cat", "/run/cloud-init/result.json"))
    assert result["v1"]["errors"] == [], log
    assert "NoCloud" in result["v1"]["datasource"]


def test_it_sets_a_guest_up(started: Callable[..., InstalledGuest], host: ivshmem.Client) -> None:
    """For a user whom cloud-init makes, and without a service: that needs an IOMMU."""
    guest = started("--guest-user", "debian")
    done(guest)
    for boot in range(2):
        if boot:
            guest.reboot()
        assert "rang 1 doorbell" in guest.ok("ivshmem", "guest", "ring", "0", "1", user="debian")
        assert host.wait(1, 60) == 1
        assert guest.run("ivshmem", "guest", "ring", "0", "1", user="nobody").status == 1
        assert guest.run("mountpoint", "-q", "/run/ivshmem-kit").status != 0


def test_it_sets_a_guest_with_an_iommu_up(
    started: Callable[..., InstalledGuest], host: ivshmem.Client
) -> None:
    guest = started("--guest-user", "debian", "--iommu", "--guest-peers", "0")
    guest.boot(3 * BOOT)  # again, by itself, when it is set up
    done(guest)
    assert "intel_iommu=on" in guest.ok("cat", "/root/grub").split()
    assert guest.ok("systemctl", "is-active", "ivshmem-guest.service") == "active\n"
    # The service answers the user, and knows the peer that the user data names.
    said = guest.ok("ivshmem", "connect", user="debian", stdin="ring 0 1\nquit\n")
    assert host.wait(1, 60) == 1, said
    guest.ok("systemctl", "stop", "ivshmem-guest.socket", "ivshmem-guest.service")
    assert "rang 1 doorbell" in guest.ok("ivshmem", "guest", "ring", "0", "1", user="debian")
    assert host.wait(1, 60) == 1
