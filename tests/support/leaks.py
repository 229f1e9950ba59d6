"""What a test may not leave behind: descriptors, shared mappings, names in /dev/shm."""

from __future__ import annotations

import gc
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

SHM = Path("/dev/shm")
# Names that tests make carry the process's number, so that two runs do not disturb each other.
OWN = f"ivshmem-test-{os.getpid()}-"


@dataclass(frozen=True)
class Resources:
    """What this process holds, at one moment."""

    fds: Counter[str]
    mappings: Counter[str]
    names: Counter[str]

    def beyond(self, before: Resources) -> list[str]:
        """What is here now and was not before, one line each."""
        return [
            f"{kind}: {name}" + (f" ({count} times)" if count > 1 else "")
            for kind, now, then in (
                ("descriptor", self.fds, before.fds),
                ("mapping", self.mappings, before.mappings),
                ("name in /dev/shm", self.names, before.names),
            )
            for name, count in (now - then).items()
        ]


def open_fds() -> dict[int, str]:
    """Every open descriptor of this process and what it leads to."""
    found = {}
    for entry in os.listdir("/proc/self/fd"):
        try:
            found[int(entry)] = os.readlink(f"/proc/self/fd/{entry}")
        except FileNotFoundError:  # the one that listed the directory
            continue
    return found


# Of a line in /proc/self/maps: the last letter of the permissions, offset, device, inode, path.
# A search that begins at that letter is fast: it is p, for private, in nearly all of the lines.
_SHARED = re.compile(r"s [0-9a-f]{8,} [0-9a-f]+:[0-9a-f]+ \d+ *(.*)")


def shared_mappings() -> Counter[str]:
    """Shared mappings by file, except for the system's own caches."""
    return Counter(
        path or "anonymous"
        for path in _SHARED.findall(Path("/proc/self/maps").read_text())
        if not path.startswith(("/usr/", "/lib"))
    )


def shared_pages() -> int:
    """Pages of the address space that are not private and writable, as heap and stacks are.

    A shared mapping changes this number. To read it takes 30 us, where the list of all mappings
    takes 1 to 3 ms.
    """
    size, _, _, _, _, data, _ = Path("/proc/self/statm").read_text().split()
    return int(size) - int(data)


def names_in(directory: str | os.PathLike[str] = SHM) -> list[str]:
    """Names in a directory, in order, less those that other processes have made there.

    Such a name has another process's number behind its first words, as OWN has this one's. In
    /dev/shm other programs make names, too.
    """
    others = re.compile(rf"\.?iv(?:shmem|t)\b[a-z-]*-(?!{os.getpid()}\b)\d+")
    names = sorted(name for name in os.listdir(directory) if not others.match(name))
    if Path(directory) == SHM:
        names = [name for name in names if re.match(r"\.?iv(?:shmem|t)\b", name)]
    return names


def _names() -> Counter[str]:
    """What this process has made in /dev/shm: such a name has the process's number in it."""
    ours = re.compile(rf"ivshmem\b.*(?<!\d){os.getpid()}(?!\d)")
    return Counter(name for name in os.listdir(SHM) if ours.search(name))


def held() -> Resources:
    """What this process holds, its garbage included."""
    return Resources(Counter(open_fds().values()), shared_mappings(), _names())


def resources() -> Resources:
    """What this process holds now that its garbage is collected."""
    gc.collect()
    return held()


class Guard:
    """Compares what this process holds after a test with what it held before it.

    Garbage is collected, and the list of mappings read, only where that may change the outcome:
    each takes longer than most tests.
    """

    def __init__(self) -> None:
        self._before = self._after = resources()
        self._changed = False
        self._pages = 0  # as of the time when the mappings were read
        self._mappings = self._after.mappings

    def changed(self) -> None:
        """A fixture that lasts for several tests may have taken something."""
        self._changed = True

    def begin(self) -> None:
        """Remember what is held before a test: what was held after the last one, as a rule.

        To look at mappings takes milliseconds, and there are thousands of tests.
        """
        if not self._changed and Counter(open_fds().values()) == self._after.fds:
            self._before = self._after
            return
        self._changed = False
        before = self._held()
        # Where nothing was added since the test before, no garbage holds anything either.
        self._before = before if before == self._after else resources()

    def left(self) -> list[str]:
        """Say what the test left behind, one line each."""
        self._after = self._held()
        if self._after.beyond(self._before):
            self._pages = -1  # as many pages as when they were listed can be other ones
            self._after = self._held()
        for generation in range(3):
            if not self._after.beyond(self._before):
                break
            gc.collect(generation)  # what a test leaves is young as a rule; all takes 50 ms
            self._after = self._held()
        return self._after.beyond(self._before)

    def _held(self) -> Resources:
        if (pages := shared_pages()) != self._pages:
            self._pages, self._mappings = pages, shared_mappings()
        return Resources(Counter(open_fds().values()), self._mappings, _names())
