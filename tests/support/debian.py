"""Roots of Debian 12 and 13, and the packages of `debian/`, built and installed in them.

    python3 tests/support/debian.py [SUITE ...]

builds the packages of each suite into build/debs/SUITE, and runs lintian on them. The roots are
kept for 30 days. Nothing is installed on this machine. Needs root and mmdebstrap.

Knows: how a package is built, in a root where nothing else is; how a root becomes a machine with
a systemd of its own. Does not know: what the packages are for.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support import unpacked

SUITES = ("bookworm", "trixie")  # Debian 12 and 13
HOME = Path(__file__).parents[2]
_FRESH = 30 * 86400.0  # seconds
_LIMIT = 2400.0  # seconds: a build with its tests takes three minutes on two idle processors
_BUILDER = 1000  # the user who builds

# In namespaces of its own: devices, and a loopback that is the only network.
_BUILD = r"""
set -e
root=$1
shift
mount -t proc proc "$root/proc"
for name in null zero full random urandom; do
    touch "$root/dev/$name"
    mount --bind "/dev/$name" "$root/dev/$name"
done
mkdir -p "$root/dev/shm" "$root/dev/pts"
mount -t tmpfs shm "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=666,mode=620 pts "$root/dev/pts"
ln -sfn pts/ptmx "$root/dev/ptmx"
ln -sfn /proc/self/fd "$root/dev/fd"
ip link set lo up 2>/dev/null || true
exec chroot "$root" "$@"
"""

# What a guest has that boots from a disk.
GUEST = ("systemd", "systemd-sysv", "udev", "kmod", "passwd", "python3")
# The same, set up by user data; its image's programs need nothing of what is recommended.
CLOUD = (*GUEST, "cloud-init")
# What a minimal machine has. No compiler, and of Python what the package itself depends on.
MINIMAL = ("systemd", "systemd-sysv", "dbus")
# A command runs in all of the machine's namespaces.
_ENTER = ("-p", "-m", "-u", "-i", "-n", "-C", "-r", "-w")
_CGROUPS = ("/sys/fs/cgroup/unified", "/sys/fs/cgroup")

# In namespaces of its own; `shift` leaves the command in "$@".
_BOOT = r"""
set -e
root=$1
mount --make-rprivate /
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mount -t tmpfs -o mode=755 dev "$root/dev"
for name in null zero full random urandom tty; do
    touch "$root/dev/$name"
    mount --bind "/dev/$name" "$root/dev/$name"
done
ln -s /proc/self/fd "$root/dev/fd"
ln -s pts/ptmx "$root/dev/ptmx"  # which PrivateDevices= copies
mkdir "$root/dev/shm" "$root/dev/pts"
mount -t tmpfs shm "$root/dev/shm"
mount -t tmpfs -o mode=755 run "$root/run"
mount -t tmpfs tmp "$root/tmp"
cd "$root"
mkdir -p .before
pivot_root . .before  # not chroot(2): systemd mounts for its services, which needs a true root
umount -l /.before
exec /usr/bin/env -i container=other PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    /lib/systemd/systemd --system --unit=multi-user.target --log-target=console
"""


def build_depends() -> list[str]:
    """The packages that debian/control needs for a build with its tests."""
    control = (HOME / "debian/control").read_text()
    found = re.search(r"^Build-Depends:\n((?: .*\n)+)", control, re.MULTILINE)
    assert found
    names = [re.split(r"[ (,<]", line.strip())[0] for line in found[1].splitlines()]
    # debhelper provides these two.
    gone = ("debhelper-compat", "dh-sequence-")
    return ["debhelper", *(name for name in names if not name.startswith(gone))]


def tarball(cache: Path, suite: str, kind: str) -> Path:
    """A root of a suite, as a tar: "build", "minimal", "guest", or "cloud".

    Raises:
        unpacked.CannotError: it cannot be made.
    """
    if os.geteuid() != 0:
        raise unpacked.CannotError("this needs root: mounts, and files of several users")
    if not shutil.which("mmdebstrap"):
        raise unpacked.CannotError("apt-get install mmdebstrap")
    included = {
        "build": [*build_depends(), "lintian"],
        "minimal": MINIMAL,
        "guest": GUEST,
        "cloud": CLOUD,
    }
    include = [*included[kind]]
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / f"{suite}-{kind}.tar"
    with (cache / f"{suite}-{kind}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two runs at once: the second finds the first's
        listed = cache / f"{suite}-{kind}.packages"
        known = listed.exists() and listed.read_text().split() == include
        if known and target.exists() and time.time() - target.stat().st_mtime < _FRESH:
            return target
        draft = target.with_suffix(".draft.tar")
        unpacked.run(
            *("mmdebstrap", f"--variant={'buildd' if kind == 'build' else 'minbase'}"),
            f"--include={','.join(include)}",
            '--aptopt=Acquire::Check-Valid-Until "false"',
            '--aptopt=APT::Install-Recommends "false"',
            *(suite, str(draft), unpacked.mirror()),
        )
        draft.rename(target)
        listed.write_text("\n".join(include) + "\n")
    return target


@contextmanager
def root(cache: Path, suite: str, kind: str) -> Iterator[Path]:
    """A new root, removed afterwards."""
    packed = tarball(cache, suite, kind)
    with tempfile.TemporaryDirectory(prefix=f"ivshmem-{suite}-") as place:
        os.chmod(place, 0o755)  # noqa: S103  the builder is not root
        subprocess.run(["tar", "-C", place, "-xf", packed], check=True, timeout=_LIMIT)
        yield Path(place)


_FETCH = r"""
set -e
apt-get update -qq
cd /root
apt-get -qq -o APT::Sandbox::User=root download "$(
    apt-cache depends linux-image-amd64 | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)$/\1/p'
)"
"""


def kernel(cache: Path, suite: str) -> Path:
    """The file of a suite's kernel package.

    Raises:
        unpacked.CannotError: it cannot be fetched.
    """
    folder = cache / f"{suite}-kernel"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two runs at once: the second finds the first's
        for found in folder.glob("*.deb"):
            if time.time() - found.stat().st_mtime < _FRESH:
                return found
            found.unlink()
        with root(cache, suite, "guest") as place:
            shutil.copy("/etc/resolv.conf", place / "etc/resolv.conf")
            unpacked.run("chroot", str(place), "sh", "-c", _FETCH)
            (deb,) = (place / "root").glob("*.deb")
            draft = folder / "draft"
            shutil.copyfile(deb, draft)  # not with its time, which is that of the archive
            return draft.rename(folder / deb.name)


def sources() -> list[str]:
    """What belongs to the package: what git has, or all of an unpacked sdist."""
    if (HOME / ".git").exists():
        listed = subprocess.check_output(["git", "ls-files"], cwd=HOME, text=True, timeout=60)
        return [name for name in listed.splitlines() if (HOME / name).is_file()]
    made = {".venv", "build", ".git"}
    files = (path.relative_to(HOME) for path in HOME.rglob("*") if path.is_file())
    return [str(path) for path in files if not made & set(path.parts)]


def build(place: Path, target: Path, *, options: str = "") -> None:
    """Build source and binary packages in a root, and copy them to a folder.

    Args:
        options: DEB_BUILD_OPTIONS.
    """
    inside = place / "build/ivshmem"
    for name in sources():
        (inside / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(HOME / name, inside / name)
    unpacked.run("chown", "-R", f"{_BUILDER}:{_BUILDER}", str(place / "build"))
    _in_root(place, "dpkg-buildpackage", "-us", "-uc", folder="/build/ivshmem", options=options)
    target.mkdir(parents=True, exist_ok=True)
    for path in [each for each in (place / "build").iterdir() if each.is_file()]:
        shutil.copy(path, target / path.name)


def lint(place: Path) -> str:
    """What lintian says of a build in this root, also what it calls pedantic; "": nothing."""
    changes = next(path.name for path in (place / "build").glob("*.changes"))
    words = ("lintian", "--pedantic", "--fail-on=none", changes)
    return _in_root(place, *words, folder="/build")


def packages(suite: str) -> Path:
    """The folder with the packages of a suite; built if this source was not built yet.

    Its file `lintian` has what lintian said.

    Raises:
        unpacked.CannotError: they cannot be built.
    """
    target = HOME / "build/debs" / suite
    digest = hashlib.sha256()
    for name in sorted(sources()):
        digest.update(f"{name}\0".encode() + hashlib.sha256((HOME / name).read_bytes()).digest())
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two workers at once: the second finds the first's
        known = target / "digest"
        if not (known.exists() and known.read_text() == digest.hexdigest()):
            shutil.rmtree(target, ignore_errors=True)
            with root(cache_folder(), suite, "build") as place:
                build(place, target)
                (target / "lintian").write_text(lint(place))
            known.write_text(digest.hexdigest())
    return target


def debs(folder: Path) -> list[Path]:
    """The packages to install."""
    return sorted(path for path in folder.glob("*.deb") if "-dbgsym" not in path.name)


def install(place: Path, *names: str) -> str:
    """Install packages in a root, by files or by names, with this machine's network."""
    shutil.copy("/etc/resolv.conf", place / "etc/resolv.conf")
    quiet = ("-qq", "-y", "--no-install-recommends")
    lists = 'apt-get update -qq && exec apt-get install "$@"'
    ended = unpacked.done(
        *("chroot", str(place), "env", "DEBIAN_FRONTEND=noninteractive", "LANG=C.UTF-8"),
        *("sh", "-c", lists, "sh", *quiet, *names),
    )
    if ended.returncode:
        raise unpacked.CannotError(f"apt-get: status {ended.returncode}\n{ended.stdout[-2000:]}")
    return ended.stdout


def _in_root(place: Path, *command: str, folder: str, options: str = "") -> str:
    """Run a command in a root as the builder, without a network; return what it printed."""
    user = ("setpriv", f"--reuid={_BUILDER}", f"--regid={_BUILDER}", "--clear-groups")
    environment = ("env", "-i", "HOME=/build", "LANG=C.UTF-8", "PATH=/usr/bin:/bin:/usr/sbin:/sbin")
    ended = subprocess.run(
        [
            *("unshare", "--mount", "--net", "--pid", "--fork", "--kill-child"),
            *("sh", "-c", _BUILD, "sh", str(place), *user, *environment),
            *(f"DEB_BUILD_OPTIONS={options}", "sh", "-c", f'cd {folder} && exec "$@"', "sh"),
            *command,
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
        timeout=_LIMIT,
    )
    if ended.returncode:
        tail = "\n".join(ended.stdout.splitlines()[-60:])
        raise unpacked.CannotError(f"{' '.join(command)}: status {ended.returncode}\n{tail}")
    return ended.stdout


class Machine:
    """A root with a systemd of its own, in namespaces of its own; to be closed.

    Raises:
        unpacked.CannotError: this machine does not allow it.
    """

    def __init__(self, place: Path) -> None:
        self._place = place
        self._pid = ""
        parent = next(Path(path) for path in _CGROUPS if Path(path, "cgroup.procs").exists())
        # systemd must find no others in what it takes for the whole tree.
        self._group = parent / f"ivshmem-test-{os.getpid()}-{place.name}"
        self._group.mkdir()
        self._log = (place / "boot.log").open("w")
        join = f'echo $$ >{self._group}/cgroup.procs && exec "$@"'
        apart = ("unshare", "--pid", "--fork", "--mount", "--uts", "--ipc", "--net", "--cgroup")
        self._process = subprocess.Popen(
            ["sh", "-c", join, "sh", *apart, "--kill-child", "sh", "-c", _BOOT, "sh", str(place)],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def _wait(self) -> None:
        process = self._process.pid
        children = Path(f"/proc/{process}/task/{process}/children")
        give_up = time.monotonic() + 60
        while time.monotonic() < give_up:
            if self._process.poll() is not None:
                break
            found = children.read_text().split()
            if found:
                self._pid = found[0]
                ended = self.run("systemctl", "is-system-running", "--wait", check=False)
                if ended.stdout.strip() in ("running", "degraded"):
                    return
            time.sleep(0.1)
        self._log.flush()
        said = (self._place / "boot.log").read_text().splitlines()[-1:]
        raise unpacked.CannotError(f"systemd does not boot: {' '.join(said) or 'it says nothing'}")

    def run(
        self, *command: str, check: bool = True, stdin: str = "", seconds: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in there; stdout has both outputs."""
        ended = subprocess.run(
            ["nsenter", "-t", self._pid, *_ENTER, "--", *command],
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=seconds,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", "HOME": "/root"},
        )
        assert not check or ended.returncode == 0, f"{command}: {ended.returncode}\n{ended.stdout}"
        return ended

    def close(self) -> None:
        if self._process.poll() is None:
            os.kill(self._process.pid, signal.SIGKILL)  # --kill-child: with all in there
        self._process.wait()
        self._log.close()
        for _ in range(200):  # until the kernel has buried the last one
            try:
                for path in sorted(self._group.rglob("*"), reverse=True):
                    if path.is_dir():
                        path.rmdir()
                self._group.rmdir()
                break
            except OSError:
                time.sleep(0.05)

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def cache_folder() -> Path:
    """Where roots are kept."""
    kept = os.environ.get("IVSHMEM_VM_CACHE") or Path.home() / ".cache" / "ivshmem-vm"
    return Path(kept) / "debian"


def main(arguments: Sequence[str]) -> int:
    """Build the packages; return the exit status."""
    parser = argparse.ArgumentParser(description="Build the Debian packages.")
    parser.add_argument("suites", nargs="*", metavar="SUITE", help="default: bookworm trixie")
    options = parser.parse_args(arguments)
    for suite in options.suites or SUITES:
        try:
            folder = packages(suite)
        except unpacked.CannotError as error:
            print(f"debs: {suite}: {error}", file=sys.stderr)
            return 1
        for deb in debs(folder):
            print(deb)
        if said := (folder / "lintian").read_text():
            print(said, end="", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
