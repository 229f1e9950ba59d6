"""On a host: the memory to be shared, its size, who may use it, and whether there is room for it.

Knows: files, mounts, huge pages. Does not know: who serves the memory.

Invariant: no command here makes a file smaller, or takes its contents away: others may use it.
"""

from __future__ import annotations

import errno
import os
import re
from dataclasses import replace
from pathlib import Path

from ..errors import RegionError, WrongKind
from ..memory import pages
from ..memory.region import posix_path
from ..memory.sizes import check_size, format_size, parse_size, roughly, round_up
from ..qemu import cmdline
from ..system import safe_files
from ..system.accounts import user_option
from ..text import quoted
from . import permissions
from .check import CheckStep, Finding, as_root, failed, ok, skipped
from .request import DEFAULT_SIZE, Request

_MOUNTS = Path("/proc/self/mountinfo")

_SERVED = "the server has it"

_ALONE = (
    "it was removed or replaced while it was served, or it is not the server's. A process"
    " that opens it now shares nothing with the server's peers: end the server and its"
    " guests, and start them again"
)


class MemorySteps:
    """The checks of the memory.

    Args:
        answer: what a server said that it serves; empty if there is none that answers.
    """

    def __init__(self, request: Request, answer: dict[str, int]) -> None:
        self.request, self.answer = request, answer
        self.target: str | None = None  # the file, or the directory to put one into
        if request.name is not None:
            self.target = posix_path(request.name)
        elif request.place is not None:
            self.target = os.path.abspath(request.place)
        self._status: os.stat_result | None = None  # of the file, if it exists and is not empty
        self._is_empty = False

    def steps(self) -> list[CheckStep]:
        return [
            CheckStep("memory", self._memory),
            CheckStep("memory permission", self._permission, ("memory",)),
            CheckStep("huge pages", self._huge_pages, ("memory",)),
            CheckStep("space", self._space, ("memory", "huge pages")),
        ]

    @property
    def _folder(self) -> str:
        """Where a file is to be made."""
        assert self.target is not None
        return self.target if self.request.directory else os.path.dirname(self.target)

    @property
    def _page(self) -> int:
        """The page size of the memory, by where it is."""
        if self.target is None or not os.path.isdir(self._folder):
            return pages.PAGE
        return pages.page_size_of(self._folder)

    @property
    def _size(self) -> int:
        """Of memory that is to be made."""
        return parse_size(self.request.size or max(parse_size(DEFAULT_SIZE), self._page))

    # -- what it is -------------------------------------------------------------------------------

    def _memory(self) -> Finding:
        if self.request.size is not None:
            size = parse_size(self.request.size)
            try:
                check_size(size, self._page)
            except RegionError as error:
                nearest = format_size(max(round_up(size), self._page))
                return failed(str(error), self.request.serve_command(size=nearest))
        if self.target is None:
            return ok(_SERVED if self.answer else f"anonymous, {format_size(self._size)}")
        if not os.path.isdir(self._folder) and _is_visible(self._folder):
            return self._no_directory()
        if self.request.directory:
            return ok(f"an unlinked file in {self.target}, {format_size(self._size)}")
        return self._file(self.target)

    def _no_directory(self) -> Finding:
        if not (place := permissions.obstacle(self._folder)):
            return failed(f"no directory {self._folder}", f"mkdir -p {quoted(self._folder)}")
        free = permissions.free_beside(place)
        if self.request.directory:
            fix = f"mkdir -p {quoted(free)} && {self.request.serve_command(directory=free)}"
        else:
            fix = self.request.serve_command(name=None, path=free)
        return failed(f"{place} is not a directory", fix)

    def _file(self, path: str) -> Finding:
        beside = self.request.serve_command(name=None, path=permissions.free_beside(path))
        accept, links = self.request.accept_owner, self.request.name is None
        try:
            with safe_files.find(path, accept=accept, links=links) as place:
                self._status = place.status()
                if self._status is not None and not self._is_served():
                    place.check(self._status)
        except WrongKind as error:
            return failed(f"{path}: {error.strerror}", beside)
        except PermissionError as error:
            if error.errno == errno.EACCES:
                return skipped(
                    f"{path} is in a directory without access, so it cannot be checked"
                )  # next: why
            return failed(f"{path}: {error.strerror}", self._accepting() or beside)
        except FileNotFoundError:
            return ok(f"{path} will be created, {format_size(self._size)}")
        except OSError as error:
            return failed(f"{path}: {error.strerror}", beside)
        if not self._status:
            if "inode" in self.answer:
                return failed(
                    f"{path} was removed, but the server still has its memory: {_ALONE}",
                    self.request.serve_command(),
                )
            return ok(f"{path} will be created, {format_size(self._size)}")
        if not self._status.st_size:
            self._is_empty = True
            self._status = None
            return ok(f"{path} is empty, and will be grown to {format_size(self._size)}")
        if "inode" in self.answer and not self._is_served():
            return failed(
                f"{path} is not the server's memory: {_ALONE}",
                self.request.serve_command(),
            )
        size, wanted = self._status.st_size, self.request.size
        try:
            check_size(size, self._page, what=path)
        except RegionError as error:
            larger = max(round_up(size), self._page) if size else self._size
            return failed(str(error), _grow(path, max(larger, parse_size(wanted or 0))))
        if wanted is None or parse_size(wanted) == size:
            return ok(f"{path}, {format_size(size)}")
        what = f"{path} has {format_size(size)}, not the {wanted} asked for"
        if size < parse_size(wanted):
            return failed(what, _grow(path, parse_size(wanted)))
        # Never shrink it: that would kill each process that uses the rest.
        return failed(f"{what}: give QEMU its size", cmdline.shell(cmdline.plain(path, size)))

    def _is_served(self) -> bool:
        """Whether what is there is the memory that the server says it has."""
        assert self._status is not None
        here = (self._status.st_dev, self._status.st_ino)
        return here == (self.answer.get("device"), self.answer.get("inode"))

    def _accepting(self) -> str:
        """The command that serves a file of another user; "" if that is not what is wrong."""
        if self._status is None or self._status.st_uid in (0, os.geteuid()):
            return ""
        owner = user_option(self._status.st_uid)
        return self.request.serve_command(accept_owner=(*self.request.accept_owner, owner))

    def _permission(self) -> Finding:
        if self.target is None:
            return skipped("anonymous memory: every process that may connect to the socket gets it")
        if self._status is None and not self._is_empty and _is_visible(self.target):
            return permissions.permission(self._folder, "wx", self.request.user)
        return permissions.permission(self.target, "rw", self.request.user)

    # -- what it takes ----------------------------------------------------------------------------

    def _huge_pages(self) -> Finding:
        request, page = self.request, self._page
        if not request.hugepages and page == pages.PAGE:
            return skipped("not asked for")
        try:
            wanted = pages.huge_page_size(request.hugepages) or page
        except RegionError as error:
            offered = bool(pages.huge_page_sizes())
            return failed(str(error), request.serve_command(hugepages=offered))
        if self.target is not None and page != wanted:
            anonymous = replace(request, name=None, path=None, directory=None)
            return failed(
                f"{self.target} has pages of {format_size(page)}, not of {format_size(wanted)};"
                " anonymous memory can have them",
                anonymous.serve_command(),
            )
        if self._status is not None or self.answer.get("page_size") == wanted:
            return ok("allocated when the memory was created")
        size = max(self._size, wanted)
        try:
            check_size(size, wanted)
        except RegionError as error:
            return failed(str(error), request.serve_command(size=format_size(round_up(size))))
        numbers, fix = pages.huge_pages_for(size, wanted)
        return failed(numbers, as_root(fix)) if fix else ok(numbers)

    def _space(self) -> Finding:
        if self.answer and self.target is None:
            return skipped(_SERVED)
        if self.request.hugepages or self._page > pages.PAGE:
            return skipped("huge pages are checked above")
        size = self._size
        if self._status is not None:
            # The blocks that a sparse file lacks are missed only when a process touches them.
            size = max(self._status.st_size - self._status.st_blocks * 512, 0)
        mount, kind = ("", "tmpfs") if self.target is None else _mount(self._folder)
        if kind == "tmpfs" and not _fits(size):
            smaller = self._size
            while not _fits(smaller):
                smaller //= 2
            return failed(
                f"{format_size(size)} does not fit into this machine's memory",
                self.request.serve_command(size=format_size(smaller)),
            )
        if self.target is None:
            return ok("the machine has enough memory")
        status = os.statvfs(self._folder)
        free, total = (blocks * status.f_frsize for blocks in (status.f_bavail, status.f_blocks))
        what = f"{format_size(size)} needed, {roughly(free)} of {roughly(total)} free on {mount}"
        if size <= free:
            return ok(what)
        if kind == "tmpfs":
            room = -(-(total - free + size) // 2**20)
            return failed(what, as_root(f"mount -o remount,size={room}M {quoted(mount)}"))
        named = replace(self.request, name=os.path.basename(self.target), path=None, directory=None)
        return failed(f"{what}; /dev/shm may have space", named.serve_command())


def _is_visible(path: str) -> bool:
    """Whether we may know if there is such a file."""
    return os.access(os.path.dirname(path), os.X_OK, effective_ids=True) or not os.path.isdir(
        os.path.dirname(path)
    )


def _fits(size: int) -> bool:
    try:
        pages.check_memory(size, now=True)
    except OSError:
        return False
    return True


def _grow(path: str, size: int) -> str:
    """The command that makes a file larger, and reserves its space."""
    line = f"fallocate -l {size} {quoted(path)}"
    return line if os.access(path, os.W_OK, effective_ids=True) else as_root(line)


def _mount(path: str) -> tuple[str, str]:
    """The mount that a directory is on, and the type of its file system (proc(5), mountinfo)."""
    found = ("/", "")
    for line in _MOUNTS.read_text(errors="surrogateescape").splitlines():
        fields = line.split()
        place = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4])
        inside = os.path.commonpath([place, os.path.realpath(path)]) == place
        if inside and len(place) >= len(found[0]):  # of two on each other, the later one
            found = place, fields[fields.index("-") + 1]
    return found
