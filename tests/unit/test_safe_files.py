"""Files in directories that others can write: what is followed, opened, made, replaced, removed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ivshmem.native import descriptors
from ivshmem.system import new_files, safe_files

ALICE = 65534  # another user

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user: needs root")


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A directory like /tmp."""
    place = tmp_path / "shared"
    place.mkdir()
    place.chmod(0o1777)
    return place


@pytest.fixture
def private(tmp_path: Path) -> Path:
    """A directory that only root can write."""
    place = tmp_path / "private"
    place.mkdir(mode=0o755)
    return place


def read(path: Path, **how: object) -> bytes:
    """A file's bytes, if it is opened."""
    with safe_files.find(path, **{"accept": (), **how}) as place:  # type: ignore[arg-type]
        file = place.open(os.O_RDONLY)
    data = os.pread(file[0], 100, 0)
    file.close()
    return data


def give(path: Path) -> Path:
    """Make it Alice's."""
    os.lchown(path, ALICE, ALICE)
    return path


def refused(call: Callable[[], object], *words: str, code: int = errno.EPERM) -> None:
    with pytest.raises(OSError) as caught:
        call()
    assert caught.value.errno == code
    assert caught.value.filename is not None
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text


# -- whose links are followed ---------------------------------------------------------------------


@pytest.mark.parametrize("where", ["shared", "private"])
def test_our_own_links_are_followed(where: str, request: pytest.FixtureRequest) -> None:
    place: Path = request.getfixturevalue(where)
    (place / "file").write_bytes(b"ours")
    (place / "relative").symlink_to("file")
    (place / "absolute").symlink_to(place / "relative")
    assert read(place / "relative") == read(place / "absolute") == b"ours"
    # A directory's, and a way that goes up again.
    (place / "up").symlink_to("..")
    assert read(place / "up" / place.name / "file") == b"ours"


def test_links_as_kubernetes_makes_them(private: Path) -> None:
    """A ConfigMap: both the file and the directory of this version are links."""
    (private / "..2026_11_29").mkdir()
    (private / "..2026_11_29" / "config.toml").write_bytes(b"config")
    (private / "..data").symlink_to("..2026_11_29")
    (private / "config.toml").symlink_to("..data/config.toml")
    assert read(private / "config.toml") == b"config"


@pytest.mark.parametrize("where", ["shared", "private"])
@pytest.mark.parametrize("what", ["file", "directory"])
def test_another_users_link_is_not_followed(
    where: str, what: str, request: pytest.FixtureRequest
) -> None:
    place: Path = request.getfixturevalue(where)
    (place / "secret").write_bytes(b"root's")
    link = give(place / "link") if (place / "link").is_symlink() else place / "link"
    link.symlink_to("secret" if what == "file" else ".")
    give(link)
    path = link if what == "file" else link / "secret"
    refused(lambda: read(path), "symbolic link", "nobody (uid 65534)", "--accept-owner nobody")
    assert read(path, accept=["nobody"]) == read(path, accept=[ALICE]) == b"root's"


def test_a_second_name_of_roots_link(shared: Path, private: Path) -> None:
    (private / "secret").write_bytes(b"root's")
    (private / "link").symlink_to(private / "secret")
    os.link(private / "link", shared / "link", follow_symlinks=False)
    refused(lambda: read(shared / "link"), "several hard links")
    assert read(private / "link") == b"root's"


def test_a_link_that_must_not_be(shared: Path) -> None:
    (shared / "file").write_bytes(b"ours")
    (shared / "link").symlink_to("file")
    refused(lambda: read(shared / "link", links=False), "POSIX name", code=errno.ELOOP)
    (shared / "round").symlink_to("round")
    refused(lambda: read(shared / "round"), code=errno.ELOOP)


def test_nothing_there(shared: Path) -> None:
    (shared / "leads-nowhere").symlink_to("nothing")
    (shared / "file").touch()
    for name in ("nothing", "leads-nowhere", "nothing/deeper"):
        refused(lambda name=name: read(shared / name), code=errno.ENOENT)  # type: ignore[misc]
    refused(lambda: read(shared / "file" / "deeper"), code=errno.ENOTDIR)
    refused(lambda: read(Path("")), code=errno.EISDIR)
    with pytest.raises(FileNotFoundError):
        safe_files.find("")


# -- which files are opened -----------------------------------------------------------------------


def test_another_users_file(shared: Path, private: Path) -> None:
    for place in (shared, private):
        (place / "file").write_bytes(b"hers")
        give(place / "file")
        refused(lambda place=place: read(place / "file"), "nobody (uid 65534)", "--accept-owner")  # type: ignore[misc]
        assert read(place / "file", accept=["nobody"]) == b"hers"
    # What only root can have put there may be read, whoever owns it.
    with safe_files.reading(private / "file") as file:
        assert file.read() == b"hers"
    refused(lambda: safe_files.reading(shared / "file").__enter__(), "uid 65534")
    # Where there is no option, none is named.
    with pytest.raises(PermissionError) as caught:
        safe_files.reading(shared / "file").__enter__()
    assert str(caught.value.strerror).endswith(": choose another path")


def test_a_file_with_several_names(shared: Path, private: Path) -> None:
    (private / "secret").write_bytes(b"root's")
    os.link(private / "secret", shared / "name")
    refused(lambda: read(shared / "name"), "2 hard links")
    assert read(private / "secret") == b"root's"  # or else anybody could make it useless
    with safe_files.find(private / "secret") as place:
        refused(lambda: place.open(os.O_RDONLY, lone=True), "2 hard links")


@pytest.mark.parametrize("kind", ["FIFO", "socket", "directory", "device"])
@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY, os.O_RDWR])
def test_what_is_no_file(kind: str, flags: int, shared: Path) -> None:
    path = shared / "it"
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    elif kind == "directory":
        path.mkdir()
    else:
        path = Path("/dev/null")
    with safe_files.find(path) as place:
        code = errno.EISDIR if kind == "directory" else errno.EINVAL
        refused(lambda: place.open(flags), f"a {kind}", "not a regular file", code=code)


def test_standard_output(private: Path) -> None:
    """/dev/stdout is what the process was given, whoever owns it."""
    path = give_file(private / "out")
    words = (
        "import os\nfrom ivshmem.system import safe_files\n"
        "with safe_files.find('/dev/stdout') as place:\n"
        "    file = place.open(os.O_WRONLY | os.O_APPEND)\n"
        "os.write(file[0], b'said')\n"
    )
    with open(path, "wb") as out:
        subprocess.run([sys.executable, "-c", words], stdout=out, check=True, timeout=60)
    assert path.read_bytes() == b"said"


def give_file(path: Path) -> Path:
    path.touch()
    return give(path)


# -- making, replacing, removing ------------------------------------------------------------------


@pytest.fixture(params=["nameless", "named", "no-rename", "no-links"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the file system can do."""
    kind: str = request.param
    if kind != "nameless":
        monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY | os.O_CREAT)  # EINVAL

    def unsupported(*_: object, **__: object) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    if kind in ("no-rename", "no-links"):
        monkeypatch.setattr(descriptors, "rename_exclusive", unsupported)
    if kind == "no-links":
        monkeypatch.setattr(os, "link", unsupported)
    return kind


def test_a_draft_is_published(kind: str, shared: Path) -> None:
    with new_files.NewFile(shared / "it", mode=0o640) as draft:
        os.write(draft.file[0], b"whole")
        assert not (shared / "it").exists()
        assert len(os.listdir(shared)) == (kind != "nameless")
        draft.publish()
    assert os.listdir(shared) == ["it"]
    assert (shared / "it").read_bytes() == b"whole"
    assert (shared / "it").stat().st_nlink == 1
    assert stat.S_IMODE((shared / "it").stat().st_mode) == 0o640
    fcntl.flock(draft.file[0], fcntl.LOCK_EX | fcntl.LOCK_NB)  # still ours, and no longer locked
    draft.file.close()


def test_a_draft_takes_no_name(kind: str, shared: Path) -> None:
    (shared / "it").write_bytes(b"old")
    with new_files.NewFile(shared / "it") as draft:
        refused(draft.publish, code=errno.EEXIST)
    assert len(draft.file) == 0
    assert (shared / "it").read_bytes() == b"old"
    assert os.listdir(shared) == ["it"]


def test_a_draft_replaces(kind: str, shared: Path) -> None:
    for number in (b"1", b"2", b"3"):
        with new_files.NewFile(shared / "it") as draft:
            os.write(draft.file[0], number)
            draft.publish(replace=True)
        draft.file.close()
        assert (shared / "it").read_bytes() == number
        assert os.listdir(shared) == ["it"]
    with contextlib.suppress(ZeroDivisionError), new_files.NewFile(shared / "it") as draft:
        1 / 0  # noqa: B018
    assert os.listdir(shared) == ["it"]
    assert (shared / "it").read_bytes() == b"3"


def test_replacing_follows_only_trusted_links(shared: Path, private: Path) -> None:
    (private / "target").write_bytes(b"old")
    (shared / "ours").symlink_to(private / "target")
    with new_files.NewFile(shared / "ours") as draft:
        draft.publish(replace=True)
    draft.file.close()
    assert (shared / "ours").is_symlink()
    assert (private / "target").read_bytes() == b""
    (private / "target").write_bytes(b"old")
    give(shared / "ours")
    refused(lambda: new_files.NewFile(shared / "ours"), "symbolic link", "nobody (uid 65534)")
    # If she puts it there later, only the link is replaced.
    with new_files.NewFile(shared / "late") as draft:
        (shared / "late").symlink_to(private / "target")
        draft.publish(replace=True)
    draft.file.close()
    assert (private / "target").read_bytes() == b"old"
    assert not (shared / "late").is_symlink()


def test_what_a_killed_process_left_is_swept(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = (
        "import os, signal, sys\nfrom ivshmem.system import new_files\nos.O_TMPFILE = 0x10040\n"
        "draft = new_files.NewFile(sys.argv[1])\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    for _ in range(2):
        killed = subprocess.run([sys.executable, "-c", words, str(shared / "it")], timeout=60)
        assert killed.returncode == -9
        assert os.listdir(shared) == [".it.ivshmem-0"]
    # One that is in use stays, as does what is another user's.
    monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY | os.O_CREAT)
    (shared / ".it.ivshmem-1").touch()
    give(shared / ".it.ivshmem-1")
    with new_files.NewFile(shared / "it") as one, new_files.NewFile(shared / "it") as two:
        assert len(os.listdir(shared)) == 3
        one.publish()
        two.publish(replace=True)
    one.file.close()
    two.file.close()
    assert sorted(os.listdir(shared)) == [".it.ivshmem-1", "it"]


def test_removing_only_what_is_meant(shared: Path) -> None:
    (shared / "it").write_bytes(b"ours")
    with safe_files.find(shared / "it") as place:
        file = place.open(os.O_RDONLY)
        (shared / "it").rename(shared / "elsewhere")
        (shared / "it").write_bytes(b"another")
        assert not place.remove(file[0])
        (shared / "it").unlink()
        assert not place.remove(file[0])
        (shared / "it").symlink_to("elsewhere")
        assert not place.remove(file[0])
        (shared / "elsewhere").replace(shared / "it")
        assert place.remove(file[0])
        file.close()
    assert os.listdir(shared) == []


def test_a_new_file_takes_no_name(shared: Path) -> None:
    (shared / "link").symlink_to("target")
    (shared / "file").touch()
    with safe_files.find(shared / "file") as place:
        refused(lambda: place.create(os.O_RDWR, 0o600), code=errno.EEXIST)
    with safe_files.find(shared / "link") as place:  # ours: its target is meant
        place.create(os.O_RDWR, 0o600).close()
    assert (shared / "target").is_file()
    with safe_files.find(shared / "late") as place:
        (shared / "late").symlink_to("nowhere")
        refused(lambda: place.create(os.O_RDWR, 0o600), code=errno.EEXIST)
    assert not (shared / "nowhere").exists()


def test_in_a_user_namespace() -> None:
    """Root's links are nobody's there: /bin, /var/run."""
    words = (
        "import os\nfrom ivshmem.system import safe_files\n"
        "place = safe_files.find('/bin/sh')\nplace.open(os.O_RDONLY, strict=False).close()\n"
        "place.close()\n"
    )
    made = subprocess.run(["unshare", "--user", sys.executable, "-c", words], timeout=60)
    assert made.returncode == 0
