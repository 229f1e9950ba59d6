"""The Debian packages, in new minimal roots of Debian 12 and 13, which have no compiler.

Each root runs a systemd of its own, in namespaces of its own: what is wrong with a configuration
is seen as an administrator sees it.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import debian, unpacked

import ivshmem

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(3600)]

SUITES = pytest.mark.parametrize("suite", debian.SUITES)
FILE = "etc/ivshmem.toml"
GOOD = '[region.web]\nsocket = "/run/ivshmem/web"\nsize = "64K"\n'


def test_one_version() -> None:
    first = (debian.HOME / "debian/changelog").read_text().splitlines()[0]
    assert first.startswith(f"ivshmem ({ivshmem.__version__}) ")


@SUITES
def test_lintian_is_silent(suite: str) -> None:
    assert (_packages(suite) / "lintian").read_text() == ""


@SUITES
def test_two_builds_are_equal(suite: str, tmp_path: Path) -> None:
    """Their files, byte by byte; without the package's tests, which leave nothing."""
    first = _packages(suite)
    with debian.root(debian.cache_folder(), suite, "build") as place:
        debian.build(place, tmp_path, options="nocheck")
    digests = [
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.deb")}
        for folder in (first, tmp_path)
    ]
    assert len(digests[0]) == 3
    assert digests[0] == digests[1]


def _packages(suite: str) -> Path:
    try:
        return debian.packages(suite)
    except unpacked.CannotError as error:
        pytest.fail(str(error), pytrace=False)


@dataclass
class Installed:
    """A machine with the packages, and where its files are."""

    machine: debian.Machine
    place: Path

    def start(self, unit: str) -> tuple[int, dict[str, str]]:
        """The exit status of `systemctl start`, and the unit's state a moment later."""
        status = self.machine.run("systemctl", "start", unit, check=False).returncode
        # Time enough for a second try, if there was one.
        self.machine.run("sleep", "1")
        names = "ActiveState,SubState,NRestarts,ExecMainStatus,StatusText"
        shown = self.machine.run("systemctl", "show", "--property", names, unit).stdout
        return status, dict(line.split("=", 1) for line in shown.splitlines())

    def options(self, text: str) -> None:
        """As `systemctl edit ivshmem@web` does it."""
        folder = self.place / "etc/systemd/system/ivshmem@web.service.d"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "override.conf").write_text(f'[Service]\nEnvironment="OPTIONS={text}"\n')
        self.machine.run("systemctl", "daemon-reload")


@pytest.fixture(scope="module", params=debian.SUITES)
def installed(request: pytest.FixtureRequest) -> Iterator[Installed]:
    suite = request.param
    folder = _packages(suite)
    with debian.root(debian.cache_folder(), suite, "minimal") as place:
        (place / "root/debs").mkdir()
        for deb in debian.debs(folder):
            shutil.copy(deb, place / "root/debs")
        shutil.copytree(debian.HOME / "debian/tests", place / "root/tests")
        inside = [f"/root/debs/{deb.name}" for deb in debian.debs(folder)]
        debian.install(place, *inside)
        try:
            machine = debian.Machine(place)
        except unpacked.CannotError as error:
            pytest.fail(str(error), pytrace=False)
        with machine:
            yield Installed(machine, place)


@pytest.fixture(autouse=True)
def clean(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "installed" in request.fixturenames:
        there: Installed = request.getfixturevalue("installed")
        units = ("ivshmem.service", "ivshmem@web.service", "ivshmem@web.socket")
        there.machine.run("systemctl", "stop", *units)
        there.machine.run("systemctl", "reset-failed")
        (there.place / FILE).unlink(missing_ok=True)


def test_no_compiler(installed: Installed) -> None:
    for name in ("cc", "gcc", "cython3", "pip", "pip3"):
        assert installed.machine.run("which", name, check=False).returncode == 1, name
    assert installed.machine.run("ivshmem", "--version").stdout.startswith("ivshmem ")
    assert installed.machine.run("ivshmem-server", "--version").returncode == 0


def test_nothing_is_enabled(installed: Installed) -> None:
    for unit in ("ivshmem.service", "ivshmem@web.service", "ivshmem@web.socket"):
        shown = installed.machine.run("systemctl", "is-enabled", unit, check=False)
        assert shown.stdout.strip() == "disabled"


def test_pages_and_completions(installed: Installed) -> None:
    listed = installed.machine.run("dpkg", "-L", "python3-ivshmem", "ivshmem-server").stdout
    for name in ("ivshmem", "ivshmem-server"):
        assert f"/usr/share/man/man1/{name}.1.gz" in listed
        completion = f"/usr/share/bash-completion/completions/{name}"
        assert completion in listed
        installed.machine.run("bash", "-c", f". {completion} && complete -p {name}")
        assert f"/usr/share/zsh/vendor-completions/_{name}" in listed


KINDS = {
    "no file": ("", "no such file"),
    "no TOML": ("x y", "not TOML"),
    "no directory": (GOOD.replace("/web", "/missing/web"), "No such file or directory"),
    "a file at the socket's path": (GOOD.replace("/run/ivshmem/web", "/etc/hostname"), "hostname"),
    "another server": (GOOD.replace("/run/ivshmem/web", "/run/taken"), "/run/taken"),
    "no huge pages": (GOOD.replace('"64K"', '"2M"\nhugepages = "2M"'), "huge pages"),
    "no such memory": (f'{GOOD}file = "/root/m"\nexisting = "require"\n', "/root/m"),
    "no such group": (f'{GOOD}group = "nobodys"\n', "nobodys"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_start_fails_at_once(installed: Installed, kind: str) -> None:
    text, reason = KINDS[kind]
    if text:
        (installed.place / FILE).write_text(text)
    if kind == "another server":
        command = ("ivshmem", "serve", "--daemon", "-q", "-p", "/run/pid", "-S", "/run/taken")
        installed.machine.run(*command)
    status, state = installed.start("ivshmem")
    if kind == "another server":
        installed.machine.run("sh", "-c", "kill $(cat /run/pid)")
    assert status != 0
    assert (state["ActiveState"], state["NRestarts"]) == ("failed", "0"), state
    assert state["ExecMainStatus"] == "78"
    assert reason in state["StatusText"], state


@pytest.mark.parametrize(
    ("take", "give", "code"),
    [
        ("userdel ivshmem", "systemd-sysusers", "217"),
        ("groupdel kvm", "systemd-sysusers", "216"),
        ("mv /usr/bin/ivshmem /root", "mv /root/ivshmem /usr/bin", "203"),
    ],
)
def test_what_systemd_itself_lacks(installed: Installed, take: str, give: str, code: str) -> None:
    (installed.place / FILE).write_text(GOOD)
    installed.machine.run("sh", "-c", take)
    try:
        status, state = installed.start("ivshmem")
    finally:
        installed.machine.run("sh", "-c", give)
    assert status != 0
    assert (state["ActiveState"], state["NRestarts"]) == ("failed", "0"), state
    assert state["ExecMainStatus"] == code
    status, state = installed.start("ivshmem")  # the remedy of docs/howto/systemd.md
    assert (status, state["ActiveState"]) == (0, "active")


@pytest.mark.parametrize(("text", "code"), [("--sise 64K", "2"), ("--size 3", "78")])
def test_wrong_options_of_a_template(installed: Installed, text: str, code: str) -> None:
    installed.options(text)
    status, state = installed.start("ivshmem@web")
    assert status != 0
    assert (state["ActiveState"], state["NRestarts"]) == ("failed", "0"), state
    assert state["ExecMainStatus"] == code


def test_wrong_options_behind_a_socket(installed: Installed) -> None:
    """The first peer starts the server. It is cut off when systemd gives up, soon."""
    installed.options("--size 3")
    installed.machine.run("systemctl", "start", "ivshmem@web.socket")
    connect = "import ivshmem\ntry: ivshmem.connect('/run/ivshmem-web.sock', timeout=60)\n"
    connect += "except (OSError, ivshmem.IvshmemError) as error: print('error', error)\n"
    said = installed.machine.run("python3", "-", stdin=connect).stdout
    assert said.startswith("error"), said
    shown = installed.machine.run("systemctl", "is-failed", "ivshmem@web.socket").stdout
    assert shown.strip() == "failed"


def test_a_killed_server_continues(installed: Installed) -> None:
    """Restart= is for this; it must survive all the rest."""
    installed.options("--size 64K")
    status, state = installed.start("ivshmem@web")
    assert (status, state["ActiveState"]) == (0, "active"), state
    program = """if True:
        import subprocess, time, ivshmem
        with ivshmem.connect("/run/ivshmem-web.sock") as a:
            for _ in range(3):
                subprocess.run(["systemctl", "kill", "-s", "KILL", "ivshmem@web"], check=True)
                with ivshmem.connect("/run/ivshmem-web.sock", timeout=60) as b:
                    assert next(iter(a.events(60))) == ivshmem.PeerJoined(b.id)
                    a.ring(b.id, 0)
                    assert b.wait(0, timeout=60)
                assert next(iter(a.events(60))) == ivshmem.PeerLeft(b.id)
        print("continued")
    """
    said = installed.machine.run("python3", "-", stdin=program).stdout
    assert said.endswith("continued\n"), said


def test_an_upgrade_continues(installed: Installed) -> None:
    (installed.place / FILE).write_text(GOOD)
    assert installed.start("ivshmem")[0] == 0
    program = """if True:
        import glob, subprocess, ivshmem
        def pid():
            command = ["systemctl", "show", "--value", "--property", "MainPID", "ivshmem"]
            return subprocess.check_output(command)
        with ivshmem.connect("/run/ivshmem/web") as a:
            before = pid()
            subprocess.run(["dpkg", "-i", *glob.glob("/root/debs/*.deb")], check=True)
            assert pid() != before
            with ivshmem.connect("/run/ivshmem/web", timeout=60) as b:
                assert next(iter(a.events(60))) == ivshmem.PeerJoined(b.id)
        print("continued")
    """
    said = installed.machine.run("python3", "-", stdin=program).stdout
    assert said.endswith("continued\n"), said
    assert "Syntax" not in said
    assert "rror" not in said


def test_the_autopkgtest_of_the_units(installed: Installed) -> None:
    installed.options("")
    said = installed.machine.run("sh", "/root/tests/service").stdout
    assert said.endswith("the units work\n"), said


@SUITES
def test_the_autopkgtest_of_a_guest(suite: str) -> None:
    """A guest with the files of a root in which the packages are: by autopkgtest itself."""
    assert shutil.which("autopkgtest"), "apt-get install autopkgtest"
    folder = _packages(suite)
    (source,) = folder.glob("*.dsc")
    with debian.root(debian.cache_folder(), suite, "minimal") as place:
        debian.install(place)
        command = [
            *("unshare", "--mount", "sh", "-c"),
            'mount -t proc proc "$1/proc" && mount --rbind /dev "$1/dev" && root=$1 && shift'
            ' && exec autopkgtest --no-built-binaries --test-name=guest "$@" -- chroot "$root"',
            *("sh", str(place), *map(str, debian.debs(folder)), str(source)),
        ]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=3000,
            stdin=subprocess.DEVNULL,
        )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "guest                PASS" in done.stderr + done.stdout
