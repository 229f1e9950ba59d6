"""In a guest: systemd itself, with the package installed as a distribution would install it.

It runs in a pid namespace of its own, for the guest's init is another; its tree of files is the
guest's. Never to be run on a machine that anybody needs: systemd-tmpfiles clears /tmp and more.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import ivshmem

_SYSTEMD = "/lib/systemd/systemd"
_SITE = Path("/opt/ivshmem")
_PYTHON = Path("/opt/python")  # not where it is: a service cannot look into /root and /home
_UNITS = Path("/etc/systemd/system")
_TIMEOUT = 60.0


def mounted(kind: str, *places: str) -> None:
    for place in places:
        subprocess.run(["mount", "-t", kind, kind, place], check=True)


def install(units: Path) -> None:
    """Install the package, its command, its units and its user."""
    _SITE.mkdir()
    _PYTHON.mkdir()
    subprocess.run(["mount", "--bind", sys.base_prefix, _PYTHON], check=True)
    unneeded = shutil.ignore_patterns("*.c", "*.pyx", "__pycache__")
    shutil.copytree(Path(ivshmem.__file__).parent, _SITE / "ivshmem", ignore=unneeded)
    info = _SITE / "ivshmem.dist-info"
    info.mkdir()
    version = importlib.metadata.version("ivshmem")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: ivshmem\nVersion: {version}\n")
    python = _PYTHON / Path(sys.executable).resolve().relative_to(sys.base_prefix)
    # The machine may have others where systemd looks first: this guest does without them.
    for folder in ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin"):
        Path(folder, "ivshmem").unlink(missing_ok=True)
    for place in (_UNITS, Path("/usr/local/lib/systemd/system")):
        for unit in place.glob("ivshmem*"):
            shutil.rmtree(unit) if unit.is_dir() else unit.unlink()
    command = Path("/usr/bin/ivshmem")
    command.write_text(
        f"#!{python}\nimport sys\nsys.path.insert(0, '{_SITE}')\n"
        "from ivshmem.cli.main import main\nsys.exit(main())\n"
    )
    command.chmod(0o755)
    for unit in (units / "system").iterdir():
        shutil.copy(unit, "/usr/lib/systemd/system")
    for users in (units / "sysusers.d").iterdir():
        subprocess.run(["systemd-sysusers", users], check=True)


class Manager:
    """systemd, as it is in the host's files."""

    def __init__(self) -> None:
        mounted("tmpfs", "/run", "/tmp", "/var/tmp")
        mounted("cgroup2", "/sys/fs/cgroup")
        _UNITS.mkdir(exist_ok=True)
        (_UNITS / "test.target").write_text("[Unit]\nDescription=Nothing yet\n")
        apart = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
        self._process = subprocess.Popen(
            [*apart, _SYSTEMD, "--system", "--unit=test.target", "--log-target=console"],
            env={"container": "other", "PATH": os.environ["PATH"]},
            stdout=subprocess.DEVNULL,
        )
        self.wait_for(Path("/run/systemd/private").exists)
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        self._pid = children.read_text().split()[0]

    def wait_for(self, condition: object) -> None:
        assert callable(condition)
        give_up = time.monotonic() + _TIMEOUT
        while not condition():
            assert time.monotonic() < give_up, "it does not come to pass"
            time.sleep(0.05)

    def run(self, *command: str) -> str:
        """Run a command where systemd is; what it prints."""
        done = subprocess.run(
            ["nsenter", "-t", self._pid, "-p", "-m", "-r", "-w", "--", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=_TIMEOUT,
        )
        assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}"
        return done.stdout

    def ctl(self, *arguments: str) -> str:
        """Run systemctl."""
        return self.run("systemctl", *arguments)

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.ctl("show", unit, "--value", "--property", name).strip()

    def override(self, unit: str, *lines: str) -> None:
        """As `systemctl edit` does it."""
        place = _UNITS / f"{unit}.d"
        place.mkdir(exist_ok=True)
        (place / "override.conf").write_text("\n".join(lines) + "\n")
        self.ctl("daemon-reload")
