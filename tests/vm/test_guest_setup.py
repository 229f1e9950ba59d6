"""`guest setup` in a guest with systemd and udev: it holds after a boot, and nothing is left of it.

tests/unit/test_guest_setup.py tries its steps on files.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import debian, unpacked

import ivshmem
from ivshmem.qemu import cmdline

from . import kit
from .installed import COMMAND, InstalledGuest, make_disk, require

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(3000)]

BUNDLE = "/root/ivshmem.pyz"
SYSFS = "/sys/bus/pci/devices"

# All that a set-up can change of files, and the state of the device.
STATE = f"""
cd /
find etc usr/local var/lib -name dpkg -prune -o -path var/lib/systemd -prune -o ! -name '*-' \
    ! -name .pwd.lock ! -name machine-id ! -name .updated -printf '%p %M %u %g %l\\n' | sort
find etc usr/local -type f ! -name '*-' -exec sha256sum {{}} + | sort -k 2
cd {SYSFS}
for d in */; do
    [ "$(cat $d/device)" = 0x1110 ] || continue
    stat -c '%n %a %U %G' $d/resource*
    echo "$(readlink $d/driver) $(cat $d/driver_override) $(cat $d/enable)"
done
ls /dev/vfio 2>/dev/null | grep -v '^vfio$'
true
"""


@pytest.fixture(params=debian.SUITES)
def made(
    tmp_path: Path, server: ivshmem.Server, request: pytest.FixtureRequest
) -> Iterator[Callable[..., InstalledGuest]]:
    """Boots a guest that has the bundle; with users who are called alice and bob."""
    require()
    guests = []

    def make(*, iommu: bool = True) -> InstalledGuest:
        try:
            files = {BUNDLE[1:]: kit.make("pyz", request.param, tmp_path)}
            boot, disk = make_disk(tmp_path, request.param, files)
        except unpacked.CannotError as error:
            pytest.fail(str(error), pytrace=False)
        guest = InstalledGuest(boot, disk, cmdline.doorbell(server.path, 4), iommu=iommu)
        guests.append(guest)
        guest.boot()
        for user in ("alice", "bob"):
            guest.ok("useradd", "--create-home", user)
        return guest

    yield make
    for guest in guests:
        guest.close()


def state(guest: InstalledGuest) -> list[str]:
    """What differs if a set-up left something."""
    return guest.ok("sh", "-c", STATE).splitlines()


def setup(guest: InstalledGuest, *options: str) -> str:
    return guest.ok("python3", BUNDLE, "guest", "setup", "--yes", *options)


def check_in_use(guest: InstalledGuest, host: ivshmem.Client) -> None:
    """A member of the group uses the device, by the service and without it; another user cannot."""
    give_up = time.monotonic() + COMMAND
    while (active := guest.run("systemctl", "is-active", "ivshmem-guest").output) == "activating\n":
        assert time.monotonic() < give_up, "it does not start"
        time.sleep(1)  # this is asked while the guest still boots
    assert active == "active\n"
    said = guest.ok("ivshmem", "connect", user="alice", stdin="ring 0 1\nquit\n")
    assert "rang 1 doorbell" in said
    assert host.wait(1, 60) == 1
    refused = guest.run("ivshmem", "connect", user="bob", stdin="quit\n")
    assert refused.status == 1
    assert "/run/ivshmem.sock (permission denied)" in refused.output
    # Only the device itself is given away, and not by way of root.
    guest.ok("systemctl", "stop", "ivshmem-guest.socket", "ivshmem-guest.service")
    assert "rang 1 doorbell" in guest.ok("ivshmem", "guest", "ring", "0", "2", user="alice")
    assert host.wait(2, 60) == 1
    info = json.loads(guest.ok("ivshmem", "guest", "info", "--json", user="alice"))
    assert (info["access"], info["interrupts"]) == ("vfio", "4 vectors")
    assert guest.run("ivshmem", "guest", "info", user="bob").status == 1
    guest.ok("systemctl", "start", "ivshmem-guest.socket", "ivshmem-guest.service")


def check_cannot_start(guest: InstalledGuest, why: str) -> None:
    """`systemctl start` fails at once, the status says why, and systemd does not try again."""
    assert guest.run("systemctl", "start", "ivshmem-guest.service").status == 1
    status = guest.run("systemctl", "status", "--no-pager", "--full", "ivshmem-guest").output
    assert why in status
    shown = guest.ok(
        "systemctl", "show", "-p", "ExecMainStatus,NRestarts,ActiveState", "ivshmem-guest"
    )
    assert set(shown.split()) == {"ExecMainStatus=78", "NRestarts=0", "ActiveState=failed"}
    guest.ok("systemctl", "stop", "ivshmem-guest.socket")
    guest.ok("systemctl", "reset-failed", "ivshmem-guest.service")


def test_it_survives_a_boot_and_leaves_nothing(
    made: Callable[..., InstalledGuest], host: ivshmem.Client
) -> None:
    guest = made()
    before = state(guest)
    said = setup(guest, "--user", "alice", "--peers", "0")
    assert said.splitlines()[-2].startswith("done; to take it back:")
    check_in_use(guest, host)
    guest.ok("rm", BUNDLE)  # what runs from now on is what was installed
    guest.reset()
    assert guest.ok("sh", "-c", f"readlink {SYSFS}/*/driver | grep -c vfio-pci").strip() == "1"
    check_in_use(guest, host)
    assert "0 loaded units" in guest.ok("systemctl", "--failed", "--no-pager")
    again = guest.ok("ivshmem", "guest", "setup", "--yes", "--user", "alice", "--peers", "0")
    assert again.count(": done already") == again.count("[")
    # A program of the group has the device: nothing is waited for without end.
    guest.ok("systemctl", "stop", "ivshmem-guest.socket", "ivshmem-guest.service")
    guest.ok(
        *("sh", "-c"),
        f"cp /usr/local/lib/ivshmem/ivshmem.pyz {BUNDLE}; (exec ivshmem guest wait 3 --timeout 900"
        " >/root/held 2>&1 & echo $! >/root/pid);"
        " until ls -l /proc/$(cat /root/pid)/fd | grep -q /dev/vfio/[0-9]; do sleep 0.2; done",
    )
    check_cannot_start(guest, "another process has the device open")
    refused = guest.run("ivshmem", "guest", "setup", "--undo", "--yes")
    assert refused.status == 1, refused
    assert "has the device open: stop that first" in refused.output
    guest.ok("sh", "-c", "kill $(cat /root/pid)")
    assert "all is taken back" in setup(guest, "--undo")
    assert state(guest) == before
    assert guest.run("getent", "group", "ivshmem").status == 2
    guest.reboot()
    assert state(guest) == before
    assert "0 loaded units" in guest.ok("systemctl", "--failed", "--no-pager")


def test_killed_in_the_middle(made: Callable[..., InstalledGuest]) -> None:
    """When a file appears; --undo then leaves as little as if nothing had been begun."""
    guest = made()
    before = state(guest)
    kill = "python3 {0} guest setup --yes --user alice >/dev/null 2>&1 & p=$!; until {1}; do sleep"
    kill += " 0.02; done; kill -9 $p; wait $p"
    for moment in (
        "[ -e /etc/udev/rules.d/70-ivshmem.rules ]",
        f"ls {SYSFS}/*/driver/module 2>/dev/null | grep -q . && [ -e /dev/vfio/[0-9]* ]",
        "[ -e /run/ivshmem.sock ]",
    ):
        done = guest.run("sh", "-c", kill.format(BUNDLE, moment))
        assert done.status == 137, done
        assert "all is taken back" in setup(guest, "--undo")
        assert state(guest) == before, moment


def test_without_an_iommu(made: Callable[..., InstalledGuest], host: ivshmem.Client) -> None:
    """Users have memory and rings, and are told what is missing."""
    guest = made(iommu=False)
    before = state(guest)
    said = setup(guest, "--user", "alice")
    assert "without an IOMMU there is memory, and peers can be rung" in said
    assert "no unit for `guest serve`: without an IOMMU" in said
    guest.reboot()
    with memoryview(host.region) as memory:
        memory[:5] = b"hello"
    assert guest.ok("ivshmem", "guest", "hexdump", "0", "5", "--raw", user="alice") == "hello"
    assert "rang 1 doorbell" in guest.ok("ivshmem", "guest", "ring", "0", "1", user="alice")
    assert host.wait(1, 60) == 1
    assert guest.run("ivshmem", "guest", "ring", "0", "1", user="bob").status == 1
    assert "all is taken back" in setup(guest, "--undo")
    assert state(guest) == before
    guest.reboot()
    assert state(guest) == before
