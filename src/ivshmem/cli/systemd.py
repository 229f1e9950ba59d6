"""`ivshmem systemd install`: units for this installation, wherever it is.

Knows: the units that come with the package, and which of their lines depend on where it is, or on
whose systemd runs them. Does not know: what systemd does with them.

A package for a distribution installs the units itself, with `ivshmem` in systemd's search path. In
a virtual environment it is in no search path, and systemd reads no units there.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

from ..system.systemd import unit_words

_UNITS = ("ivshmem.service", "ivshmem@.service", "ivshmem@.socket")
_SYSUSERS = "ivshmem.conf"

# What a user's own systemd can do of what the units ask for: it is not root, and each sandbox
# option that it cannot set up ends the service.
_USERS_OWN = re.compile(
    r"Type|Exec\w+|Restart\w*|TimeoutStartSec|Watchdog\w+|FileDescriptorStoreMax"
    r"|RuntimeDirectory\w*|UMask"
)
# ProtectHome= and PrivateTmp= of the units hide these from the service.
_HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")  # noqa: S108


def add_to(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "systemd",
        help="install systemd units that run this installation, for instance in a venv",
        description="Write systemd units that run this installation of ivshmem. Their paths are"
        " printed; nothing is started.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    install = commands.add_parser(
        "install",
        help="write the units",
        description="Write the units, and print their paths. An existing file with other content"
        " is not replaced.",
        epilog="Then: systemctl enable --now ivshmem@NAME (one region), or ivshmem (those of"
        " /etc/ivshmem.toml).",
    )
    install.add_argument(
        "--user",
        action="store_true",
        help="install for your own systemd instance, in ~/.config/systemd/user; the sockets are in"
        " XDG_RUNTIME_DIR",
    )
    install.add_argument(
        "--directory",
        metavar="DIR",
        help="write to DIR (default: /etc/systemd/system; with --user: ~/.config/systemd/user)",
    )
    install.add_argument("--force", action="store_true", help="replace files that are different")
    install.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Write the units."""
    program = own_command()
    if not options.user:
        check_place(program)
    folder = Path(options.directory or _default(user=options.user))
    files = {folder / name: unit(_read(name), program, user=options.user) for name in _UNITS}
    if not options.user and options.directory is None:
        files[Path("/etc/sysusers.d") / _SYSUSERS] = _read(_SYSUSERS)
    if not options.force:
        _check_free(files)
    for path, text in files.items():
        print(_write(path, text))
    control = "systemctl --user" if options.user else "systemctl"
    if options.directory is None:
        before = "" if options.user else "systemd-sysusers && "
        print(f"then: {before}{control} daemon-reload")
        print(f"      {control} enable --now ivshmem@NAME")
    return 0


def unit(text: str, program: list[str], *, user: bool) -> str:
    """A unit of the package as it fits one installation; `program` is what runs `ivshmem`."""
    lines = text.splitlines()
    start = f"ExecStart={unit_words(program)} "
    lines = [re.sub("^ExecStart=ivshmem ", start, line) for line in lines]
    if user:
        lines = list(_for_a_user(lines))
    return "\n".join(lines) + "\n"


def _for_a_user(lines: list[str]) -> Iterator[str]:
    section = ""
    for line in lines:
        if line.startswith("["):
            section = line
        setting = re.match(r"(\w+)=", line)
        if section == "[Service]" and setting and not _USERS_OWN.fullmatch(setting[1]):
            continue
        line = line.replace("/etc/ivshmem.toml", "%E/ivshmem.toml")
        line = line.replace("/run/ivshmem-%i.sock", "%t/ivshmem-%i.sock")
        yield line.replace("multi-user.target", "default.target")


def own_command() -> list[str]:
    """What runs this installation, by absolute paths."""
    script = Path(sys.executable).with_name("ivshmem")
    return [str(script)] if os.access(script, os.X_OK) else [sys.executable, "-m", "ivshmem"]


def hidden_place(path: str) -> str:
    """The folder that hides a path from services; "": none."""
    path = os.path.abspath(path)
    return next((place for place in _HIDDEN if path.startswith(f"{place}/")), "")


def check_place(program: list[str]) -> None:
    path = os.path.abspath(program[0])
    if hidden := hidden_place(path):
        raise ValueError(
            f"{path}: the units hide {hidden} from the service. Install ivshmem elsewhere (python3"
            " -m venv /opt/ivshmem && /opt/ivshmem/bin/pip install .), or give --user"
        )


def _default(*, user: bool) -> str:
    if not user:
        return "/etc/systemd/system"
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return os.path.join(home, "systemd/user")


def _read(name: str) -> str:
    """A file that came with the package."""
    for file in distribution("ivshmem").files or ():
        if file.name == name and ("systemd" in file.parts or "sysusers.d" in file.parts):
            return Path(str(file.locate())).read_text()
    source = Path(__file__).parents[3] / "systemd"  # an editable installation
    for folder in ("system", "sysusers.d"):
        if (source / folder / name).exists():
            return (source / folder / name).read_text()
    raise FileNotFoundError(
        f"this installation lacks {name}: a distribution's package installs the units itself"
        " (Debian: ivshmem-server); else install ivshmem again"
    )


def _check_free(files: dict[Path, str]) -> None:
    for path, text in files.items():
        if path.exists() and path.read_text(errors="replace") != text:
            raise FileExistsError(
                f"{path} exists and is different: compare the two (--directory DIR writes"
                " elsewhere), or replace it with --force"
            )


def _write(path: Path, text: str) -> str:
    if path.exists() and path.read_text(errors="replace") == text:
        return f"{path} is up to date"
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "w") as file:
            file.write(text)
        os.replace(draft, path)  # systemd never reads half a unit
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    return f"wrote {path}"
