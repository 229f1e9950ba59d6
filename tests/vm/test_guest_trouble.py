"""What stands in the way of a guest's device: users, lockdown, other processes, live views, kills.

In each case: a clear word, no hang, and the device as it was.
"""

import importlib.metadata
import shutil
from pathlib import Path

import pytest

import ivshmem
from ivshmem.qemu import cmdline

from .harness import MakeGuest
from .host import SLOW, doorbell


@pytest.mark.nightly
def test_other_processes_and_live_views(guest: MakeGuest, server: ivshmem.Server) -> None:
    """One that has it open, forks that live on, one that is killed; and memory in use at close."""
    a = guest(
        """
        import os, select, signal
        from checks import PATIENCE, driver, in_child, refused
        from ivshmem import ClosedError, guest

        (found,) = guest.devices()
        address = found.address

        def works(**way):
            with guest.open(**way) as device:
                device.ring(device.id, 1)
                assert device.wait(1, PATIENCE) == 1, way

        class Fork:
            '''A child that does something, says so, and then lives until it is told to end.'''

            def __init__(self, action):
                said, say = os.pipe()
                told, self.tell = os.pipe()
                self.pid = os.fork()
                if self.pid == 0:
                    os.close(self.tell)
                    kept = action()
                    os.write(say, b"!")
                    os.read(told, 1)
                    os._exit(0)
                os.close(say)
                os.close(told)
                assert select.select([said], [], [], PATIENCE)[0] and os.read(said, 1)
                os.close(said)

            def end(self):
                os.close(self.tell)
                os.waitpid(self.pid, 0)

        # A second one, of this process and of another.
        with guest.open() as device:
            def second(*texts):
                for access in ("vfio", None):
                    with refused(OSError, *texts):
                        guest.open(access=access)

            second("this process has the device open already", address)
            parent = f"another process has the device open (process {os.getpid()}"
            in_child(lambda: second(parent, "guest serve"))
            with refused(OSError, "the driver vfio-pci has the device"):
                guest.open(access="sysfs")
            device.ring(device.id, 0)
            assert device.wait(0, PATIENCE) == 1, "it goes on working for the first"
        assert driver(address) == ""

        # A view that is alive when the device is closed.
        device = guest.open()
        view = memoryview(device.region)
        for _ in range(2):
            with refused(BufferError, "in use by 1 views"):
                device.close()
            assert device.closed
            assert driver(address) == "vfio-pci", "it is ours as long as the memory is mapped"
        view[0] = 77
        for call in (lambda: device.ring(0), lambda: device.wait(0, 0), device.fileno):
            with refused(ClosedError):
                call()
        view.release()
        device.close()
        assert driver(address) == ""
        device.close()

        # A forked child that lives on, with all descriptors.
        device = guest.open()
        child = Fork(lambda: None)
        device.close()  # does not hang
        assert driver(address) == "vfio-pci", "the child has it open"
        with refused(OSError, "another process has the device open"):
            guest.open()
        child.end()
        works()
        assert driver(address) == "vfio-pci", "it was there before this time"
        (found.path / "driver" / "unbind").write_text(address)
        (found.path / "driver_override").write_text("\\n")

        # A forked child that closes its copy does nothing else to the device.
        with guest.open() as device:
            in_child(device.close)
            device.ring(device.id, 3)
            assert device.wait(3, PATIENCE) == 1
            assert driver(address) == "vfio-pci"
        assert driver(address) == ""

        # One that is killed.
        for _ in range(3):
            child = Fork(guest.open)
            assert driver(address) == "vfio-pci"
            os.kill(child.pid, signal.SIGKILL)
            child.end()
            works()
            assert driver(address) == "vfio-pci", "nobody was left to give it back"
        (found.path / "driver" / "unbind").write_text(address)
        child = Fork(lambda: guest.open(access="sysfs"))
        os.kill(child.pid, signal.SIGKILL)
        child.end()
        with guest.open(access="sysfs") as device:
            device.ring(device.id)
        works()
        assert driver(address) == ""
        """,
        args=doorbell(server),
        iommu=True,
    )
    assert a.wait() == 0


@pytest.mark.nightly
def test_users_who_are_not_root(guest: MakeGuest, server: ivshmem.Server) -> None:
    """They are told what they lack; and who was given the device by its owner can use it."""
    a = guest(
        """
        import os
        from checks import PATIENCE, PCI, driver, in_child, refused
        from ivshmem import NoSuchVector, guest

        (found,) = guest.devices()
        address = found.address
        node = f"/dev/vfio/{found.iommu_group}"

        def as_nobody(action):
            def act():
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
                action()
            in_child(act)

        def refusals():
            (seen,) = guest.devices()
            assert seen.vectors is None, "the kernel shows it to root only"
            assert (seen.size, seen.variant, seen.iommu_group) == (
                found.size, "doorbell", found.iommu_group
            )
            with refused(PermissionError, "only root may: run as root", address):
                guest.open(access="sysfs")
            for access in ("vfio", None):
                with refused(PermissionError, "only root may: run as root, or let root", address):
                    guest.open(access=access)

        as_nobody(refusals)
        assert guest.devices() == [found], "left as it was"

        # It has the driver, but is not theirs.
        (found.path / "driver_override").write_text("vfio-pci")
        (PCI / "drivers_probe").write_text(address)

        def no_group():
            for access in ("vfio", None):
                with refused(PermissionError, "only its owner may open it", f"`chown USER {node}`"):
                    guest.open(access=access)

        as_nobody(no_group)
        assert driver(address) == "vfio-pci"

        # Theirs.
        def use():
            with guest.open() as device, memoryview(device.region) as memory:
                assert (device.access, device.vectors, device.id) == ("vfio", 4, 0)
                memory[0] += 1
                for vector in range(4):
                    device.ring(device.id, vector)
                    assert device.wait(vector, PATIENCE) == 1
                device.ring(7, 2047)
                with refused(NoSuchVector, "vector 2048"):
                    device.ring(7, 2048)
            with refused(PermissionError, "only root may: run as root", "resource2"):
                guest.open(memory="resource2")

        os.chown(node, 65534, 65534)
        for _ in range(2):
            as_nobody(use)
            assert driver(address) == "vfio-pci"
        with guest.open() as device, memoryview(device.region) as memory:
            assert memory[0] == 2
        """,
        args=doorbell(server),
        iommu=True,
    )
    assert a.wait() == 0


@pytest.mark.nightly
def test_lockdown(guest: MakeGuest, server: ivshmem.Server, tmp_path: Path) -> None:
    """As with Secure Boot: sysfs is closed to root, too, and vfio serves both kinds of device."""
    path = tmp_path / "memory"
    path.write_bytes(b"host!" + bytes(4091))
    a = guest(
        """
        import subprocess
        from checks import PATIENCE, refused
        from ivshmem import NoInterrupts, guest
        from ivshmem.guest import pci

        def mount(*command):
            subprocess.run([*command, "/sys/kernel/security"], check=True)

        found = guest.devices()
        doorbell, plain = (d.address for d in found)
        assert [d.variant for d in found] == ["doorbell", "plain"]

        def use():
            with guest.open(doorbell) as device, memoryview(device.region) as memory:
                assert (device.access, device.memory) == ("vfio", "vfio")
                memory[0] = 1
                for vector in range(4):
                    device.ring(device.id, vector)
                    assert device.wait(vector, PATIENCE) == 1
            with guest.open(plain) as device, memoryview(device.region) as memory:
                assert (device.access, device.memory) == ("vfio", "vfio")
                assert bytes(memory[:5]) == b"host!"
                with refused(NoInterrupts, "a plain device"):
                    device.wait(timeout=0)

        # Where nothing tells of the lockdown, it shows.
        assert pci.locked_down() == "unknown"
        with refused(PermissionError, "the kernel is locked down", "use vfio", doorbell):
            guest.open(doorbell, access="sysfs")
        use()
        mount("mount", "-t", "securityfs", "none")
        assert pci.locked_down() == "integrity"
        use()
        for address in (doorbell, plain):
            with refused(
                PermissionError, "the kernel is locked down (integrity)", "use vfio", address
            ):
                guest.open(address, access="sysfs")
            with refused(
                PermissionError, "the kernel is locked down (integrity)", f"{address}/resource2"
            ):
                guest.open(address, access="vfio", memory="resource2")
        assert guest.devices() == found, "given back, after errors, too"
        """,
        args=[*doorbell(server), *cmdline.plain(str(path), 4096)],
        iommu=True,
        kernel_args=["lockdown=integrity"],
    )
    assert a.wait() == 0


@pytest.mark.nightly
def test_a_bare_guest(guest: MakeGuest, server: ivshmem.Server, tmp_path: Path) -> None:
    """Python's own library and the files of the package are enough."""
    package = Path(ivshmem.__file__).parent
    sources = shutil.ignore_patterns("__pycache__", "*.pyx", "*.pxd", "*.c")
    shutil.copytree(package, tmp_path / "bare" / package.name, ignore=sources)
    for file in importlib.metadata.distribution("ivshmem").files or []:
        if file.parts[0].endswith(".dist-info"):
            copy = tmp_path / "bare" / file
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(str(file.locate()), copy)
    a = guest(
        """
        import subprocess, sys

        program = '''if True:
            import sys
            import ivshmem
            from ivshmem import guest
            with guest.open() as device, memoryview(device.region) as memory:
                memory[0] += 1
                device.ring(device.id, 1)
                assert device.wait(1, 30) == 1
            ours = [name for name in sys.modules if name.partition(".")[0] == "ivshmem"]
            for name in ours:
                assert sys.modules[name].__file__.startswith(sys.argv[1]), name
            assert "ivshmem.guest.vfio" in ours
            assert "ivshmem.cli" not in ours
            files = [name for name, m in sys.modules.items() if getattr(m, "__file__", None)]
            others = {name.partition(".")[0] for name in files} - {"ivshmem"}
            assert "os" in others
            assert others <= sys.stdlib_module_names, others - sys.stdlib_module_names
        '''
        folder = sys.argv[1]

        def python(*arguments):
            # -S: no site-packages, neither the system's nor those of a virtual environment.
            done = subprocess.run(
                [sys._base_executable, "-S", "-s", "-B", *arguments],
                env={"PYTHONPATH": folder}, cwd="/", capture_output=True, text=True,
            )
            assert done.returncode == 0, done.stderr
            return done.stdout

        assert "site-packages" not in python("-c", "import sys; print(sys.path)")
        python("-c", program, folder)
        print(python("-m", "ivshmem", "--version"), end="")
        print(python("-m", "ivshmem", "guest", "list"), end="")
        """,
        argv=[str(tmp_path / "bare")],
        args=doorbell(server),
        iommu=True,
    )
    assert a.wait(SLOW) == 0
    version = importlib.metadata.version("ivshmem")
    assert a.lines[0] == f"ivshmem {version}"
    assert "doorbell" in a.lines[-1]
