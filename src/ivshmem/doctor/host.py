"""On a host: the kernel, QEMU, limits and confinement; server.py and memory.py have the rest.

Knows: what QEMU needs of a host, and the commands that give it that.
Does not know: how QEMU is started. Only what is always needed, or was asked for, can fail.
"""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from ..memory.sizes import format_size, parse_size
from ..text import counted
from . import permissions
from .check import Check, CheckStep, Finding, as_root, failed, ok, run, skipped, warning
from .memory import MemorySteps
from .request import DEFAULT_SIZE, Request
from .server import ServerSteps

_SECONDS = 10.0  # for QEMU to list its devices, of which it takes a tenth
_OLDEST = (5, 8)  # Linux: the first whose eventfds know RWF_NOWAIT

# What QEMU has open besides ivshmem's doorbells, generously.
_QEMU_FILES = 100

_ENFORCE = Path("/sys/fs/selinux/enforce")
_APPARMOR = Path("/sys/kernel/security/apparmor/profiles")
_APPARMOR_ENABLED = Path("/sys/module/apparmor/parameters/enabled")
_STATUS = Path("/proc/self/status")

_CAP_IPC_LOCK = 14

_QEMU_NAMES = {"i686": "i386", "armv7l": "arm", "ppc64le": "ppc64"}
# Debian's packages, and what is in them.
_PACKAGES = {"x86_64": "x86", "i386": "x86", "aarch64": "arm", "arm": "arm", "ppc64": "ppc"}
_KERNELS = {"x86_64": "amd64", "aarch64": "arm64"}


def default_qemu() -> str:
    """The name of the QEMU that runs guests of this machine's kind."""
    machine = platform.machine()
    return f"qemu-system-{_QEMU_NAMES.get(machine, machine)}"


def examine_host(request: Request | None = None) -> Iterator[Check]:
    """Check what sharing needs of this host.

    Raises:
        ValueError: the request make no sense: a size that is none, an unknown user.
    """
    request = request or Request()
    if request.user is not None:
        permissions.check_user(request.user)
    host, server = HostSteps(request), ServerSteps(request)
    yield from run("host", [*host.steps(), *server.steps()])
    host.answer = server.answer
    memory = MemorySteps(request, server.answer)
    yield from run("host", [*memory.steps(), *host.last_steps()])


class HostSteps:
    """The checks of the host itself.

    Attributes:
        answer: what a server said that it serves, if there is one that answers.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.qemu = request.qemu or default_qemu()
        self.answer: dict[str, int] = {}

    def steps(self) -> list[CheckStep]:
        return [
            CheckStep("kernel", self._kernel),
            CheckStep("QEMU", self._qemu),
            CheckStep("QEMU's ivshmem", self._devices, ("QEMU",)),
        ]

    def last_steps(self) -> list[CheckStep]:
        return [
            CheckStep("locked memory", self._locked_memory),
            CheckStep("open files", self._open_files),
            CheckStep("confinement", self._confinement),
        ]

    def _kernel(self) -> Finding:
        release = platform.release()
        if tuple(map(int, re.findall(r"\d+", release)[:2])) >= _OLDEST:
            return ok(f"Linux {release}")
        package = f"linux-image-{_KERNELS.get(platform.machine(), platform.machine())}"
        return failed(
            f"Linux {release} is too old, 5.8 or newer is needed; reboot after",
            as_root(f"apt-get install {package}"),
        )

    # -- QEMU -------------------------------------------------------------------------------------

    def _qemu(self) -> Finding:
        path = shutil.which(self.qemu)
        if path is None:
            return failed(f"no program {self.qemu}", self._install())
        try:
            lines = self._ask_qemu("--version").splitlines()
        except OSError as error:
            return failed(f"{path} cannot be run: {error.strerror}", self._install())
        return ok(f"{path}, {lines[0].removeprefix('QEMU emulator ') if lines else 'no version'}")

    def _devices(self) -> Finding:
        try:
            listed = self._ask_qemu("-device", "help")
        except OSError as error:
            return failed(f"{self.qemu} -device help: {error.strerror}", self._install())
        missing = [d for d in ("ivshmem-plain", "ivshmem-doorbell") if f'"{d}"' not in listed]
        if missing:
            return failed(f"{self.qemu} is built without {', '.join(missing)}", self._install())
        return ok("it has ivshmem-plain and ivshmem-doorbell")

    def _install(self) -> str:
        """The command that installs QEMU as Debian has it, with ivshmem."""
        kind = os.path.basename(self.qemu).removeprefix("qemu-system-")
        kind = kind if kind in _PACKAGES else default_qemu().removeprefix("qemu-system-")
        return as_root(f"apt-get install qemu-system-{_PACKAGES.get(kind, 'misc')}")

    def _ask_qemu(self, *arguments: str) -> str:
        """What QEMU prints.

        Raises:
            OSError: it cannot be run, or not in time.
        """
        try:
            return subprocess.run(
                [self.qemu, *arguments],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_SECONDS,
                check=False,
            ).stdout
        except subprocess.TimeoutExpired:
            raise TimeoutError(None, f"no answer in {counted(_SECONDS, 'second')}") from None

    # -- limits -----------------------------------------------------------------------------------

    def _locked_memory(self) -> Finding:
        """It counts only where memory is locked: neither the server nor clients do that."""
        size = self.answer.get("size") or parse_size(self.request.size or DEFAULT_SIZE)
        soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        if _has_capability(_CAP_IPC_LOCK):
            return ok("no limit, because this process has CAP_IPC_LOCK")
        if soft not in range(size):
            return ok("no limit" if soft < 0 else f"{format_size(soft)} may be locked")
        what = f"{format_size(soft)} may be locked, the shared memory has {format_size(size)}"
        fix = f"ulimit -l {-(-size // 1024)}"
        if hard in range(size):
            fix = _for_this_shell("prlimit --memlock=unlimited")
        if self.request.lock:
            return failed(what, fix)
        return warning(f"{what}: only `-overcommit mem-lock=on` and vfio need more", fix)

    def _open_files(self) -> Finding:
        if not self.answer:
            return skipped("unknown: it depends on peers and vectors, and no server answered")
        peers, number = self.answer["peers"] + 1, self.answer["vectors"]
        needed = peers * number + _QEMU_FILES
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        who = f"{counted(peers, 'peer')} of {counted(number, 'vector')}"
        what = f"QEMU opens {needed} with {who}, and {soft} are allowed"
        if soft not in range(needed):
            return ok(what)
        if hard in range(needed):
            return failed(what, _for_this_shell(f"prlimit --nofile={needed}"))
        return failed(what, f"ulimit -n {needed}")

    # -- confinement ------------------------------------------------------------------------------

    def _confinement(self) -> Finding:
        """Of QEMUs that libvirt runs; one that is started by hand is as free as who starts it."""
        what = " and ".join(place for place in (self.request.server, self.request.place) if place)
        if _read(_ENFORCE) == "1":
            return warning(
                f"SELinux is enforcing and may keep libvirt's QEMUs from {what} (as root,"
                " `ausearch -m avc -c qemu` lists denials)"
            )
        profiles = _read(_APPARMOR)
        if profiles is None and _read(_APPARMOR_ENABLED) == "Y":
            return skipped(f"AppArmor is on; only root can read its profiles ({_APPARMOR})")
        if profiles and re.search(r"^\S*(libvirt|virt-aa-helper)", profiles, re.MULTILINE):
            return warning(
                f"AppArmor keeps libvirt's QEMUs from {what}, unless"
                " /etc/apparmor.d/local/abstractions/libvirt-qemu allows it"
            )
        return ok("no restriction of QEMU")


def _for_this_shell(command: str) -> str:
    """A limit that only root can raise, raised for the shell that runs the command."""
    sudo = "sudo " if os.geteuid() and shutil.which("sudo") else ""
    return f"{sudo}{command} --pid $$"


def _has_capability(number: int) -> bool:
    match = re.search(r"^CapEff:\s*([0-9a-f]+)", _read(_STATUS) or "", re.MULTILINE)
    return match is not None and bool(int(match[1], 16) >> number & 1)


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
