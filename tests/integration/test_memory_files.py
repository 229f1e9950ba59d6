"""Memory with a name: killed while it is made, removed while it is served, empty, another user's.

Every remedy that a message names is typed here.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import commands
from support.children import NOBODY, python
from support.leaks import SHM
from support.waiting import PATIENCE

import ivshmem
from ivshmem import Region, RegionError
from ivshmem.memory import pages

pytestmark = pytest.mark.usefixtures("commands")

MIB = 1 << 20
ANY = None  # exit status

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user: needs root")
USER = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}


def run(*arguments: object, status: int | None = 0) -> subprocess.CompletedProcess[str]:
    """A command to its end; what it says on stderr is one line, if it fails."""
    done = commands.run(*arguments, env=USER)
    assert status in (ANY, done.returncode), (done.stdout, done.stderr)
    if status and arguments[0] != "doctor":
        assert len(done.stderr.splitlines()) == 1, done.stderr
    return done


# -- killed at any moment -------------------------------------------------------------------------


@pytest.mark.sampled(6)
@pytest.mark.parametrize("source", ["name", "path", "replaced", "directory", "image"])
def test_killed_while_it_makes_one(source: str, directory: Path, shm_name: str) -> None:
    """Nothing is left: neither memory under a hidden name, nor half of something."""
    (directory / "old").write_bytes(b"x" * 4096)
    words = """
        import sys, ivshmem
        source, name, place = sys.argv[1:]
        region = ivshmem.Region.create("4M")
        print("ready", flush=True)
        while True:
            if source == "name":
                ivshmem.Region.create("4M", name=name, replace=True).close()
            elif source == "path":
                made = ivshmem.Region.create("4M", path=f"{place}/new")
                made.unlink()
                made.close()
            elif source == "replaced":
                ivshmem.Region.create("4M", path=f"{place}/old", replace=True).close()
            elif source == "directory":
                ivshmem.Region.create("4M", directory=place).close()
            else:
                ivshmem.save(region, f"{place}/old")
        """
    for number in range(12):
        with python(words, source, shm_name, str(directory)) as child:
            child.expect("ready")
            time.sleep(number * 0.0017)  # the moment of the kill, not a wait
            child.process.kill()
            child.process.wait(PATIENCE)
        hidden = f".ivshmem-{child.pid}-"
        found = {name for name in os.listdir(SHM) if shm_name in name or name.startswith(hidden)}
        found = (found | set(os.listdir(directory))) - {shm_name, "old", "new"}
        # Only between two system calls of replacing has a whole file a second name: the next one
        # for the same target removes it.
        assert found <= {f".{shm_name}.ivshmem-0", ".old.ivshmem-0"}
    if source in ("name", "replaced"):
        with Region.create("4M", **named(source, shm_name, directory), replace=True) as region:  # type: ignore[arg-type]
            region.unlink()
    elif source == "image":
        with Region.create("4M") as region:
            ivshmem.save(region, directory / "old")
    left = [name for name in os.listdir(SHM) if shm_name in name] + os.listdir(directory)
    assert set(left) <= {"old", "new"}


def named(source: str, name: str, directory: Path) -> dict[str, object]:
    return {"name": name} if source == "name" else {"path": directory / "old"}


# -- a name that is gone or another's -------------------------------------------------------------


def test_what_a_name_leads_to(directory: Path) -> None:
    path = directory / "memory"
    with Region.create(4096, path=path) as region:
        assert region.info().name_leads_to == region.name_leads_to() == "this"
        path.rename(directory / "elsewhere")
        assert region.info().name_leads_to == "nothing"
        with Region.create(4096, path=path) as other:
            assert region.info().name_leads_to == "another"
            assert other.info().name_leads_to == "this"
    for made in (Region.create(4096), Region.create(4096, directory=directory)):
        with made:
            assert made.info().name_leads_to is None


@pytest.mark.sampled(2)
@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_a_name_that_is_lost_while_it_is_served(how: str, directory: Path, shm_name: str) -> None:
    """status and doctor say so, and a second server says that it shares another memory."""
    path = directory / "socket"
    with serving("-S", path, "-M", shm_name, "--keep") as server:
        assert "its name" not in run("status", "-S", path).stdout
        (SHM / shm_name).unlink()
        if how == "replaced":
            (SHM / shm_name).write_bytes(bytes(4 * MIB))
        text = {
            "removed": "its name was removed",
            "replaced": "its name now belongs to another file",
        }[how]
        assert text in run("status", "-S", path).stdout
        (shown,) = json.loads(run("status", "-S", path, "--json").stdout)["regions"]
        assert shown["memory_leads_to"] == {"removed": "nothing", "replaced": "another"}[how]
        said = run("doctor", "--host", "-S", path, status=1).stdout
        assert "shares nothing with the server's peers" in said
        said = run("doctor", "--host", "-S", path, "-M", shm_name, status=1).stdout
        assert "shares nothing with" in said
        if how == "removed":
            with serving("-S", directory / "second", "-M", shm_name) as second:
                second.terminate()
                _, log = second.communicate(timeout=PATIENCE)
            assert f"/dev/shm/{shm_name} is new: process {server.pid} still shares" in log


@contextlib.contextmanager
def serving(*options: object) -> Iterator[subprocess.Popen[str]]:
    """A server that says that it serves."""
    with subprocess.Popen(
        [sys.executable, "-m", "ivshmem", "serve", *map(str, options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=USER,
    ) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline(), server.stderr and server.stderr.read()
            yield server
        finally:
            if server.poll() is None:
                server.terminate()
                server.communicate(timeout=PATIENCE)


# -- files of 0 bytes -----------------------------------------------------------------------------


@pytest.mark.sampled(3)
@root_only
@pytest.mark.parametrize("existing", [None, "attach", "grow", "refuse", "replace"])
def test_an_empty_file_is_made(existing: str | None, directory: Path, shm_name: str) -> None:
    """As systemd-tmpfiles makes one: `f /dev/shm/NAME 0660 - kvm`. It keeps owner and mode."""
    (SHM / shm_name).touch()
    (SHM / shm_name).chmod(0o660)
    os.chown(SHM / shm_name, 0, NOBODY)
    inode = (SHM / shm_name).stat().st_ino
    more = [] if existing is None else ["--existing", existing]
    with serving("-S", directory / "socket", "-M", shm_name, *more):
        with Region.attach(name=shm_name) as region:
            region.write(0, b"kept")
        assert run("doctor", "--host", "-S", directory / "socket", "-M", shm_name, status=ANY)
    found = (SHM / shm_name).stat()  # it was not made here, and so it stays
    assert (found.st_size, found.st_gid, found.st_mode & 0o777) == (4 * MIB, NOBODY, 0o660)
    assert found.st_ino == inode
    assert (SHM / shm_name).read_bytes()[:4] == b"kept"


def test_what_is_said_of_an_empty_file(directory: Path) -> None:
    path = directory / "memory"
    path.touch()
    said = run("serve", "-S", directory / "s", "-f", path, "--existing", "require", status=1)
    assert "it is empty, so its memory is not made yet" in said.stderr
    assert "ivshmem serve with --existing attach" in said.stderr
    said = run("doctor", "--host", "-f", path, status=ANY)
    assert f"{path} is empty, and will be grown to" in said.stdout
    with serving("-S", directory / "s", "-f", path, "--existing", "attach"):
        assert path.stat().st_size == 4 * MIB


def test_an_empty_file_that_cannot_be_filled_stays_empty(directory: Path) -> None:
    path = directory / "memory"
    path.touch()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        with pytest.raises(OSError, match="do not fit"):
            Region.create("1M", path=path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.stat().st_size == 0


# -- another user's -------------------------------------------------------------------------------


@pytest.mark.nightly
@root_only
def test_another_users_memory_is_accepted_if_one_asks(directory: Path, shm_name: str) -> None:
    """By the option that the message names, in each command that has it."""
    (SHM / shm_name).write_bytes(bytes(MIB))
    os.chown(SHM / shm_name, NOBODY, NOBODY)
    image = directory / "image"
    with Region.create("1M") as region:
        ivshmem.save(region, image)
    for words in (["save", directory / "new"], ["load", image], ["serve", "-S", directory / "s"]):
        said = run(*words, "-M", shm_name, status=1).stderr
        assert f"/dev/shm/{shm_name}: it belongs to nobody (uid 65534)" in said
        match = re.search(r"--accept-owner \S+", said)
        assert match is not None
        option = shlex.split(match[0])
        if words[0] == "serve":
            with serving(*words[1:], "-M", shm_name, *option):
                pass
        else:
            run(*words, "-M", shm_name, *option)
    said = run("doctor", "--host", "-M", shm_name, status=1).stdout
    assert f"--name {shm_name} --accept-owner nobody" in said
    said = run("doctor", "--host", "-M", shm_name, "--accept-owner", "nobody", status=ANY).stdout
    assert "--accept-owner" not in said
    (directory / "config").write_text(
        f'[region.a]\nsocket = "{directory}/s"\nname = "{shm_name}"\naccept_owner = ["nobody"]\n'
    )
    with serving("--config", directory / "config"):
        pass
    with Region.attach(name=shm_name, accept_owner=["nobody"]) as region:
        assert region.size == MIB


@root_only
def test_memory_that_may_only_be_read(directory: Path) -> None:
    """The error says so, and what it names works."""
    directory.chmod(0o755)
    path = directory / "memory"
    path.write_bytes(bytes(4096))
    path.chmod(0o644)
    with python(
        """
        from ivshmem import Region
        try:
            Region.attach(path=sys.argv[1])
        except PermissionError as error:
            print(error.strerror)
        with Region.attach(path=sys.argv[1], readonly=True) as region:
            print(region.readonly)
        """,
        str(path),
        user=NOBODY,
    ) as child:
        child.expect(
            "Permission denied, for writing; reading is allowed: readonly=True, or serve --readonly"
        )
        child.expect("True")
        child.finish()


# -- what cannot be mapped ------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["create", "attach", "file"])
def test_under_an_address_space_limit(what: str, directory: Path) -> None:
    path = directory / "memory"
    with path.open("wb") as file:
        file.truncate(1 << 32)
    with python(
        """
        import resource, sys
        from ivshmem import Region
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, hard))
        for _ in range(2):
            try:
                if sys.argv[1] == "create":
                    Region.create("1G").close()
                elif sys.argv[1] == "attach":
                    Region.attach(path=sys.argv[2]).close()
                else:
                    Region.from_fd(os.open(sys.argv[2], os.O_RDWR)).close()
                print("mapped")
            except OSError as error:
                print(error.errno, error.filename, error.strerror)
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))  # ulimit -v unlimited
        """.replace("import resource, sys", "import os, resource, sys"),
        what,
        str(path),
    ) as child:
        line = child.line()
        assert line.startswith(f"{errno.ENOMEM} {path if what == 'attach' else None} ")
        assert "may map 1.0G in all" in line
        assert "ulimit -v unlimited" in line
        assert "LimitAS=infinity" in line
        child.expect("mapped")
        child.finish()


@pytest.mark.parametrize("option", ["-M", "-f"])
def test_a_fifo_is_no_memory(option: str, directory: Path, shm_name: str) -> None:
    path = SHM / shm_name if option == "-M" else directory / "fifo"
    os.mkfifo(path)
    place = shm_name if option == "-M" else path
    for words in (
        ["serve", "-S", directory / "s"],
        ["save", directory / "image"],
        ["serve", "-S", directory / "s", "--existing", "refuse"],
        ["serve", "-S", directory / "s", "--existing", "replace"],
        ["serve", "-S", directory / "s", "--readonly"],
    ):
        said = run(*words, option, place, status=1).stderr
        assert str(path) in said
        assert "choose another" in said or "attach to it" in said or "regular file" in said
    path.unlink()


def test_a_kernel_without_huge_pages(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    known = pages._meminfo()
    known = {key: value for key, value in known.items() if not key.startswith("Huge")}
    monkeypatch.setattr(pages, "_meminfo", lambda: known)
    monkeypatch.setattr(pages, "HUGE_PAGES", directory / "none")
    with pytest.raises(
        RegionError, match=r"no huge pages .*CONFIG_HUGETLBFS.*omit hugepages=True, or --hugepages"
    ):
        Region.create("2M", hugepages=True)
    with pytest.raises(RegionError, match="no huge pages of 2M; it offers none"):
        Region.create("2M", hugepages="2M")


# -- images and pid files -------------------------------------------------------------------------


def test_a_whole_image_is_called_whole(directory: Path) -> None:
    with Region.create("4K") as region:
        ivshmem.save(region, directory / "image")
    said = run("load", "--check", directory / "image").stdout
    assert said.rstrip().endswith("; the file is intact, and nothing was loaded")


@root_only
def test_a_pid_for_what_is_no_file(directory: Path) -> None:
    """/dev/null stays, and standard output has the number."""
    before = os.stat("/dev/null")
    with serving("-S", directory / "s", "--pid-file", "/dev/null"):
        pass
    assert os.stat("/dev/null").st_ino == before.st_ino
    with serving("-S", directory / "s", "--pid-file", "/dev/stdout") as server:
        assert server.pid  # its first line, the number, has been read
    (directory / "pid").symlink_to(directory / "target")
    with serving("-S", directory / "s", "--pid-file", directory / "pid") as server:
        assert (directory / "target").read_text() == f"{server.pid}\n"
