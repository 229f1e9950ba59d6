"""What a guest's messages advise, typed: what was refused then works."""

import pytest

import ivshmem

from .harness import MakeGuest
from .host import SLOW, doorbell

pytestmark = pytest.mark.timeout(2 * SLOW)


@pytest.mark.nightly
def test_each_is_typed(guest: MakeGuest, server: ivshmem.Server, host: ivshmem.Client) -> None:
    """A kernel without PAT, sysfs mounted read-only, a full table of asynchronous I/O, a user."""
    a = guest(
        r"""
        import os, re, subprocess, sys
        from checks import PATIENCE, PCI, driver, in_child, refused
        from ivshmem import guest

        (found,) = guest.devices()
        address = found.address
        assert found.driver == ""

        def typed(line):
            subprocess.run(["sh", "-c", line], check=True)

        def said_by(action, kind=OSError):
            '''One line, which the program that is told can show as it is.'''
            try:
                action().close()
            except kind as error:
                text = str(error)
                assert "\n" not in text, text
                return text
            raise AssertionError(f"{action} was not refused")

        def doctor(status):
            words = [sys.executable, "-m", "ivshmem", "doctor", "--guest", address]
            done = subprocess.run(words, capture_output=True, text=True)
            assert done.returncode == status, done
            return done.stdout

        def works(**how):
            with guest.open(**how) as device:
                device.ring(device.id, 2)
                assert device.wait(2, PATIENCE) == 1, how
            assert driver(address) == ""

        # The kernel was booted with nopat.
        said = said_by(lambda: guest.open(memory="resource2_wc"))
        assert "no PAT: booted with nopat?" in said and "use memory='resource2'" in said, said
        works(memory="resource2")

        # A container's sysfs.
        typed("mount -o remount,ro /sys")
        for access in (None, "vfio", "sysfs"):
            said = said_by(lambda: guest.open(access=access))
            assert said.count("sysfs is mounted read-only, as in a container") == 1, said
            assert "mount -o remount,rw /sys" in said, said
        advice = re.findall("mount -o remount,rw /sys$", doctor(1), re.MULTILINE)
        assert advice, doctor(1)
        typed(advice[0])
        works()
        assert "4 of 4 vectors" in doctor(0)

        # Asynchronous I/O is used up.
        typed("echo 0 > /proc/sys/fs/aio-max-nr")
        with guest.open(memory="resource2") as device:
            said = said_by(lambda: guest.Broker(device, "/tmp/socket"))
            assert not os.path.exists("/tmp/socket")
            (remedy,) = re.findall(r"as root, (echo .*/aio-max-nr)'?$", said)
            typed(remedy)
            with guest.Broker(device, "/tmp/socket"):
                pass

        # Root who may not write the file is told of the container; a user, what root can do.
        override = found.path / "driver_override"
        override.chmod(0o444)
        code = "from ivshmem import guest; print(guest.open(access='vfio').access)"
        without = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override"]
        words = [*without, sys.executable, "-c", code]
        done = subprocess.run(words, capture_output=True, text=True)
        assert "not allowed to root here, perhaps by a container" in done.stderr, done
        assert driver(address) == ""
        override.chmod(0o644)

        def as_user(action):
            def other():
                os.setgroups([])
                os.setresgid(65534, 65534, 65534)
                os.setresuid(65534, 65534, 65534)
                action()
            in_child(other)

        def told():
            said = said_by(lambda: guest.open())
            assert "let root bind vfio-pci and chown its group to you (/dev/vfio/N)" in said, said

        as_user(told)
        typed(f"echo vfio-pci > {override}; echo {address} > {PCI}/drivers_probe")
        typed(f"chown 65534 /dev/vfio/{found.iommu_group}; chmod 666 /dev/vfio/vfio")

        def opens():
            with guest.open() as device:
                device.ring(device.id, 1)
                assert device.wait(1, PATIENCE) == 1

        as_user(opens)
        assert driver(address) == "vfio-pci"
        """,
        args=doorbell(server),
        iommu=True,
        kernel_args=["nopat"],
    )
    assert a.wait(SLOW) == 0
