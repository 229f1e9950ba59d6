"""What another user can put at a path, and what root's processes must then not do.

Each attack is a function of two directories: one like /tmp, and one that only root can write, where
a file with a secret is. Run in a guest with each value of fs.protected_symlinks and its like, and
on the host with those that it has. Knows the package, and nothing of tests.
"""

import os
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from checks import in_child  # type: ignore[import-not-found]

import ivshmem
from ivshmem import Region
from ivshmem import config as ivshmem_config
from ivshmem.cli import pid_file
from ivshmem.config import RegionConfig
from ivshmem.migration import Options, Plan, Step, Vm
from ivshmem.migration.state_file import StateFile
from ivshmem.service import open_region

NOBODY = 65534
SIZE = 4096
SECRET = b"secret".ljust(SIZE, b".")
PLAN = Plan((Vm("a", "/a", "/a2", "unix:/u"),), Options(), (), (Step("migrate", "a"),), ())


def by_nobody(*actions: Callable[[], object]) -> None:
    """Do this as another user, in another process."""

    def child() -> None:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        for action in actions:
            action()

    in_child(child)


@contextmanager
def refused(*words: str) -> Iterator[None]:
    """An error comes, in one line, at once."""
    before = signal.signal(signal.SIGALRM, signal.SIG_DFL)  # what waits is ended
    signal.alarm(20)
    try:
        yield
    except (OSError, ivshmem.IvshmemError) as error:
        text = str(error)
        assert "\n" not in text, text
        for word in words:
            assert word in text, (word, text)
    else:
        raise AssertionError("it was not refused")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def with_pid_file(path: Path) -> None:
    with pid_file.held(str(path)):
        pass


def save(path: Path, **how: object) -> None:
    with Region.create(SIZE) as region:
        ivshmem.save(region, path, **how)  # type: ignore[arg-type]


def create(path: Path) -> None:
    Region.create(SIZE, path=path).close()


def replace(path: Path) -> None:
    Region.create(SIZE, path=path, replace=True).close()


def load(path: Path) -> None:
    with Region.create(SIZE) as region:
        ivshmem.load(region, path)


def served(**config: object) -> None:
    region, _ = open_region.open_memory(RegionConfig("/none", **config))  # type: ignore[arg-type]
    region.close()


# What root does with a path.
USES: dict[str, Callable[[Path], object]] = {
    "attach": lambda path: Region.attach(path=path).close(),
    "read": lambda path: Region.attach(path=path, readonly=True).close(),
    "open": lambda path: Region.open(SIZE, path=path).close(),
    "serve": lambda path: served(file=str(path), size=SIZE),
    "pid file": with_pid_file,
    "load": load,
    "config": ivshmem_config.load,
    "state": StateFile.load,
}
NAME_USES: dict[str, Callable[[str], object]] = {
    "attach": lambda name: Region.attach(name=name).close(),
    "open": lambda name: Region.open(SIZE, name=name).close(),
    "serve": lambda name: served(name=name),
    "grow": lambda name: served(name=name, size=4 * SIZE, existing="grow"),
    "require": lambda name: served(name=name, existing="require"),
}


def another_users_link(shared: Path, private: Path) -> None:
    """To root's file, and to a directory on the way to it."""
    link, way = shared / "link", shared / "way"
    by_nobody(lambda: link.symlink_to(private / "secret"), lambda: way.symlink_to(private))
    for use in [*USES.values(), save, replace]:
        for path in (link, way / "secret"):
            with refused("symbolic link", "uid 65534"):
                use(path)
    with refused("symbolic link", "uid 65534"):
        StateFile.create(way / "new", PLAN)
    assert link.is_symlink()
    assert not (private / "new").exists()


def another_users_link_to_nothing(shared: Path, private: Path) -> None:
    link = shared / "link"
    by_nobody(lambda: link.symlink_to(private / "new"))
    for use in [*USES.values(), save, create]:
        with refused("symbolic link", "uid 65534"):
            use(link)
    assert not (private / "new").exists()


def another_users_file(shared: Path, private: Path) -> None:
    """What it says is not believed, and it is not touched."""
    file = shared / "file"
    by_nobody(lambda: file.write_bytes(SECRET), lambda: file.chmod(0o666))
    for use in USES.values():
        with refused("it belongs to", "uid 65534"):
            use(file)
    assert file.read_bytes() == SECRET
    # Memory is accepted if one asks for that.
    Region.attach(path=file, accept_owner=[str(NOBODY)]).close()
    served(file=str(file), accept_owner=(str(NOBODY),))
    # What replaces it is root's alone.
    save(file)
    status = file.stat()
    assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (0, 0o600)


def another_users_empty_file(shared: Path, private: Path) -> None:
    file = shared / "file"
    by_nobody(lambda: file.touch(), lambda: file.chmod(0o666))
    for use in (USES["open"], USES["serve"], USES["pid file"]):
        with refused("it belongs to", "uid 65534"):
            use(file)
    assert not file.stat().st_size


def a_hard_link_to_roots_file(shared: Path, private: Path) -> None:
    """Which the kernel allows where fs.protected_hardlinks is 0."""
    link = shared / "link"
    with suppress(AssertionError):
        by_nobody(lambda: os.link(private / "secret", link))
    if not link.exists():
        return
    for use in USES.values():
        with refused("2 hard links"):
            use(link)
    save(link)  # the name is replaced, and what it led to stays
    assert (private / "secret").stat().st_nlink == 1


def a_hard_link_to_roots_link(shared: Path, private: Path) -> None:
    (private / "link").symlink_to(private / "secret")
    link = shared / "link"
    with suppress(AssertionError):
        by_nobody(lambda: os.link(private / "link", link, follow_symlinks=False))
    if link.is_symlink():
        for use in [*USES.values(), save]:
            with refused("symbolic link", "several hard links"):
                use(link)
    (private / "link").unlink()


def what_makes_one_wait(shared: Path, private: Path) -> None:
    fifo = shared / "fifo"
    by_nobody(lambda: os.mkfifo(fifo), lambda: fifo.chmod(0o666))
    for name, use in {**USES, "save": save}.items():
        with refused("uid 65534" if name == "pid file" else "it is a FIFO, not a regular file"):
            use(fifo)


def another_users_name(shared: Path, private: Path) -> None:
    """A POSIX name: a file, a link to another file, a link to a file of one's own."""
    name = f"ivshmem-attack-{os.getpid()}"
    place = Path("/dev/shm") / name
    by_nobody(lambda: place.write_bytes(SECRET), lambda: place.chmod(0o666))
    for use in NAME_USES.values():
        with refused("it belongs to", "uid 65534", "--accept-owner"):
            use(name)
    assert place.read_bytes() == SECRET
    served(name=name, accept_owner=(str(NOBODY),))
    place.unlink()
    for target in (private / "secret", shared / "own"):
        by_nobody(lambda target=target: place.symlink_to(target))  # type: ignore[misc]
        for use in NAME_USES.values():
            with refused("it is a symbolic link"):
                use(name)
        assert place.is_symlink()
        place.unlink()


def what_is_allowed(shared: Path, private: Path) -> None:
    """Root's own links and files, anywhere; and what is no file, for a pid."""
    for place in (shared, private):
        for number, use in enumerate((save, with_pid_file, USES["open"], USES["serve"])):
            link = place / f"link{number}"
            link.symlink_to(place / "target")
            for path in (place / "file", link) if use is save else (place / "file",):
                use(path)
                use(path)  # what is there now
            link.unlink()
            for path in (place / "file", place / "target"):
                path.unlink(missing_ok=True)
        save(place / "image")
        (place / "link").symlink_to("image")
        load(place / "link")
        with StateFile.create(place / "state", PLAN):
            pass
        with StateFile.load(place / "state") as state:
            state.remove()
        for path in (place / "link", place / "image"):
            path.unlink()
    with_pid_file(Path("/dev/null"))
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    name = f"ivshmem-attack-{os.getpid()}"
    for _ in range(2):
        served(name=name, size=SIZE, existing="grow")
    Path("/dev/shm", name).unlink()


ATTACKS: list[Callable[[Path, Path], None]] = [
    another_users_link,
    another_users_link_to_nothing,
    another_users_file,
    another_users_empty_file,
    a_hard_link_to_roots_file,
    a_hard_link_to_roots_link,
    what_makes_one_wait,
    another_users_name,
    what_is_allowed,
]


def run(attack: Callable[[Path, Path], None], place: Path) -> None:
    """Try one, in directories below `place`; the secret is as it was, and nothing is left."""
    shared, private = place / "shared", place / "private"
    for directory in (shared, private):
        directory.mkdir()
    shared.chmod(0o1777)
    private.chmod(0o755)
    secret = private / "secret"
    secret.write_bytes(SECRET)
    secret.chmod(0o666)  # or else the kernel would not let everybody link to it
    attack(shared, private)
    assert secret.read_bytes() == SECRET
    assert os.listdir(private) == ["secret"]
    for path in shared.iterdir():
        path.unlink()
    secret.unlink()
    shared.rmdir()
    private.rmdir()
