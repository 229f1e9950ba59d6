"""Where shared memory comes from: anonymous, a POSIX name, a file, a directory, huge pages.

Knows: creating, attaching, sizing, sealing and reserving the file behind a region.
Does not know: which processes share it; native/mapping.pyx maps and accesses it.

Invariants:
1. A region that exists has its space. If tmpfs, a file system or hugetlbfs cannot give it, creation
   fails, so that no later access ends in SIGBUS. (Anonymous memory is ordinary memory, limited by
   the machine's; only `prealloc` takes it at once.)
2. An error leaves nothing behind: no name, no descriptor, no mapping.
3. A path is removed only if it still leads to the file that this object opened.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import warnings
from collections.abc import Iterable, Iterator

from ..errors import ClosedError, RegionError, WrongKind
from ..native import descriptors, mapping
from ..system import locks, new_files, safe_files
from ..system.named_tuple import NamedTuple
from ..system.uncopied import Uncopied
from . import pages
from .pages import PAGE
from .sizes import check_size, format_size, parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Literal, SupportsIndex, TypeAlias

    Source: TypeAlias = Literal["anonymous", "posix", "file", "directory", "descriptor", "device"]
    _Parts: TypeAlias = tuple[int, int, Source, str]  # size, page size, source, name or path

SHM = "/dev/shm"  # noqa: S108 - where glibc's shm_open(3) keeps POSIX names

MFD_NOEXEC_SEAL = 0x0008  # memfd_create(2), since Linux 6.3; Python does not name it yet
MFD_HUGE_SHIFT = 26  # the flags from this bit on are the base-2 logarithm of the page size

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

# Seconds that another process may take to make a region in an empty file.
_PATIENCE = 2.0


class RegionInfo(NamedTuple):
    """Facts about a region, at one moment.

    Attributes:
        size: bytes.
        page_size: bytes of one page of its file: a huge page's for hugetlbfs.
        source: how this process got it.
        name: the path, POSIX name or directory; None for an anonymous region or a descriptor.
        resident: bytes that are in memory, whichever process touched them. (A guest cannot know
            this of a device's memory: there it is the whole size.)
        huge: how many of these bytes are in huge pages; of transparent ones only those that this
            process mapped.
        readonly: this process may only read.
        name_leads_to: what a process that opens the name gets, as this process sees the place.
            "this": this memory. "nothing": the name is gone; systemd's RemoveIPC= removes it at a
            logout. "another": another file, whose memory is not shared with this one. None: there
            is no name.
        sealed: no process can shrink or grow the file. (A peer that can write can still punch
            holes, which read as zeros, as if it had written them. In hugetlbfs a hole gives the
            huge page back; if another process takes it, the next access is a SIGBUS. No seal
            forbids holes.)
    """

    size: int
    page_size: int
    source: Literal["anonymous", "posix", "file", "directory", "descriptor", "device"]
    name: str | None
    resident: int
    huge: int
    readonly: bool
    sealed: bool
    name_leads_to: Literal["this", "nothing", "another"] | None = None


class Region(Uncopied, mapping.Mapping):
    """Shared memory, mapped into this process. `memoryview(region)` is the memory itself.

    Made by `create`, `attach`, `open` or `from_fd`. A context manager: the end of the block calls
    `close()`, which unmaps, and which raises BufferError while a memoryview or an array of the
    memory is alive. A name or file outlives the region until `unlink()`.

    Calls may come from several threads. What untrusted peers can write should be read once, by
    `read` or the atomics, and then checked: it can change at any time.

    Attributes:
        source, name, page_size: as in RegionInfo.
        offset: of the region in the file behind it, bytes; only a device's memory has one.
        created: whether `create` or `open` made it; else it was there before.
        adopted: whether it was made in an empty file that was there.
    """

    # What __del__ and __repr__ find if `_over` was interrupted.
    source: Literal["anonymous", "posix", "file", "directory", "descriptor", "device"] = (
        "descriptor"
    )
    name: str | None = None
    # The one owner of the descriptor, made before it was opened.
    _fd: descriptors.FdArray | None = None
    created = False
    adopted = False

    def __new__(cls, *_: object, **__: object) -> Region:
        raise TypeError("a Region is made by Region.create, attach, open or from_fd")

    @classmethod
    def _over(
        cls,
        fd: int,
        size: int,
        *,
        owner: descriptors.FdArray,
        readonly: bool = False,
        offset: int = 0,
        source: Source,
        name: str | None = None,
        path: str | None = None,
        page_size: int,
    ) -> Region:
        """Map `size` bytes of an open file; the region then has its descriptor, in `owner`."""
        self = mapping.Mapping.__new__(cls, fd, size, readonly=readonly, offset=offset)
        assert isinstance(self, Region)
        self._begin(owner, offset, source, name, path, page_size)
        return self

    def _begin(
        self,
        owner: descriptors.FdArray,
        offset: int,
        source: Source,
        name: str | None,
        path: str | None,
        page_size: int,
    ) -> None:
        self._fd = owner
        self.source = source
        self.name = name
        self.page_size = page_size
        self.offset = offset
        self._path = path

    # -- making one -------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        size: SupportsIndex | str,
        *,
        name: str | None = None,
        path: str | os.PathLike[str] | None = None,
        directory: str | os.PathLike[str] | None = None,
        hugepages: bool | SupportsIndex | str = False,
        prealloc: bool = False,
        replace: bool = False,
        mode: int = 0o600,
        accept_owner: Iterable[SupportsIndex | str] = (),
    ) -> Region:
        """Make a new region of `size` bytes (or "4M", "1.5G", "0x100000"), zeroed.

        Args:
            name: a POSIX name, as for shm_open(3): it appears in /dev/shm.
            path: a file, as QEMU's memory-backend-file takes it for `mem-path`.
            directory: an unlinked file inside it, as hugetlbfs mount points are used.
                With none of the three the region is anonymous: a memfd, sealed against shrinking,
                growing and unsealing.
            hugepages: True (the default huge page size), "2M" or "1G": an anonymous region in huge
                pages. A name, path or directory is in huge pages if its file system is hugetlbfs.
            prealloc: take all pages now, as QEMU's `prealloc=on`.
            replace: make a new region even if a file of that name exists. The old file goes only
                when the new one is ready, and processes that have it open keep it.
            mode: permissions of a new name or path, less the umask.
            accept_owner: other users, by name or uid, whose symbolic links are followed on the way
                to a path, and whose empty file is taken.

        A file that exists and is empty, as systemd-tmpfiles makes one, is used, and keeps its owner
        and its mode.

        Raises:
            RegionError: the size is not a power of two, or less than one (huge) page.
            FileExistsError: the name or path exists and `replace` is false.
            PermissionError: a link or an empty file there belongs to a user that is not accepted.
            OSError: the file system, the memory or the huge pages do not suffice (ENOSPC, ENOMEM,
                with the numbers and what fixes it), or as of open(2). Nothing is left behind.
        """
        size = parse_size(size)
        new_files.check_mode(mode)
        if sum(place is not None for place in (name, path, directory)) > 1:
            raise RegionError("name, path and directory exclude each other")
        if name is None and path is None and directory is None:
            return cls._anonymous(size, pages.huge_page_size(hugepages), prealloc)
        if name is not None:
            source: Source = "posix"
            target = posix_path(name)
        elif path is not None:
            source, target = "file", os.path.abspath(path)
        else:
            source, target = "directory", os.path.abspath(os.fspath(directory or ""))
        inside = f"{target}/ivshmem" if source == "directory" else target
        try:
            place = safe_files.find(inside, accept=accept_owner, links=source != "posix")
        except FileNotFoundError as error:
            missing = target if source == "directory" else os.path.dirname(target)
            raise FileNotFoundError(error.errno, error.strerror, missing) from None
        # Without `with`: a signal handler that raises in an __exit__ would lose a region that has
        # its name already. A place that is not closed here is closed with this frame.
        try:
            page = pages.page_size_of(place.fd)
            if hugepages and pages.huge_page_size(hugepages) != page:
                raise RegionError(
                    f"{target} has pages of {format_size(page)}, not huge pages of"
                    f" {format_size(pages.huge_page_size(hugepages))}: name a hugetlbfs mount of"
                    " that page size, or no place at all for a memfd"
                )
            check_size(size, page)
            if source == "posix":
                pages.check_memory(size, now=True)  # reserving a tmpfs's pages takes them
            parts = (size, page, source, name or target)
            if source == "directory":
                return cls._nameless(place, mode, parts, prealloc)
            found = place.status()
            if found is not None and stat.S_ISREG(found.st_mode) and not found.st_size:
                return cls._adopt(place, parts, target, prealloc)
            if found is not None and not stat.S_ISREG(found.st_mode):
                raise _exists(target, place.wrong_kind(found.st_mode).strerror)
            if found is None and place.by_link:
                raise _exists(target, "it is a symbolic link that leads to nothing: remove it")
            if found is not None and not replace:
                raise _exists(target)
            return cls._publish(place, mode, parts, target, prealloc, replace)
        except BaseException:
            place.close()
            raise

    @classmethod
    def _nameless(
        cls, place: safe_files.SafePlace, mode: int, parts: _Parts, prealloc: bool
    ) -> Region:
        """Make a region in a file inside a directory; the file never has a name."""
        try:
            with new_files.NewFile(place, mode=mode) as draft:
                draft.publish_nameless()
        except OSError as error:
            raise OSError(error.errno, error.strerror, parts[3]) from None
        return cls._furnish(draft.file, *parts, None, prealloc)

    @classmethod
    def _adopt(
        cls, place: safe_files.SafePlace, parts: _Parts, target: str, prealloc: bool
    ) -> Region:
        """Make a region in an empty file that exists; it keeps its owner and its mode."""
        file = place.open(os.O_RDWR)
        spare = descriptors.FdArray.copy(file[0])  # for when the region has closed its own
        with locks.held(spare[0], _PATIENCE):
            if os.fstat(spare[0]).st_size:  # another process was quicker
                raise _exists(target)
            try:
                region = cls._furnish(file, *parts, target, prealloc, fresh=False)
            except BaseException:
                # Empty again: a file that has a size and lacks its space kills by SIGBUS.
                with contextlib.suppress(OSError):
                    os.ftruncate(spare[0], 0)
                raise
        region.adopted = True
        return region

    @classmethod
    def _publish(
        cls,
        place: safe_files.SafePlace,
        mode: int,
        parts: _Parts,
        target: str,
        prealloc: bool,
        replace: bool,
    ) -> Region:
        """Make a region in a new file, which gets its name when it is complete."""
        region = None
        draft = new_files.NewFile(place, mode=mode)
        try:
            with draft:
                region = cls._furnish(draft.file, *parts, target, prealloc)
                draft.publish(replace=replace)
                region._reopen(place)
            return region
        except BaseException as error:
            if region is not None:
                if draft.published and not draft.replaced:  # else the former file is gone
                    region.unlink()
                region.close()
            if isinstance(error, FileExistsError):
                raise _exists(target) from None
            raise

    def _reopen(self, place: safe_files.SafePlace) -> None:
        """Replace the descriptor by one that shows the name in /proc/PID/fd of all that get it.

        The descriptor of a file that was opened without a name never shows one.
        """
        with contextlib.suppress(OSError):
            file = place.open(os.O_RDWR)
            if safe_files.same_file(os.fstat(file[0]), os.fstat(self.fileno())):
                former, self._fd = self._fd, file
                if former is not None:
                    former.close()

    @classmethod
    def attach(
        cls,
        *,
        name: str | None = None,
        path: str | os.PathLike[str] | None = None,
        size: SupportsIndex | str | None = None,
        readonly: bool = False,
        prealloc: bool = False,
        accept_owner: Iterable[SupportsIndex | str] = (),
    ) -> Region:
        """Map what exists under a POSIX name or path; its contents stay as they are.

        Args:
            size: the size that it must have; None: any. If the file is sparse, the space that it
                lacks is reserved only by `prealloc`.
            readonly: open and map for reading only.
            accept_owner: other users, by name or uid, whose files and symbolic links are accepted.
                Any user can be the first to make a name in /dev/shm, so a file must belong to root,
                to this process's user or to one of these.

        Raises:
            RegionError: it has another size, or one that no guest could use, or is not a file.
            FileNotFoundError: it does not exist, or is empty, so that its memory is not made yet.
            PermissionError: it belongs to another user, or has several hard links where other users
                can make one; or as of open(2).
            OSError: as of open(2); ELOOP for a name that is a link.
        """
        if (name is None) == (path is None):
            raise RegionError("give either a name or a path to attach to")
        target = posix_path(name) if name is not None else os.path.abspath(path or "")
        with safe_files.find(target, accept=accept_owner, links=name is None) as place:
            file = _opened(place, readonly)
        with safe_files.closed_on_error(file):
            status = os.fstat(file[0])
            if not status.st_size:
                raise FileNotFoundError(
                    errno.ENOENT,
                    "it is empty, so its memory is not made yet: Region.create makes it, or ivshmem"
                    " serve with --existing attach, and either keeps its owner and its mode",
                    target,
                )
            if size is not None and status.st_size != parse_size(size):
                raise RegionError(
                    f"{target} has {format_size(status.st_size)}, not the"
                    f" {format_size(parse_size(size))} asked for: ask for its size, or replace it"
                )
            page = pages.page_size_of(file[0])
            check_size(status.st_size, page, what=target)
            source: Source = "posix" if name is not None else "file"
            with pages.explained(status.st_size, page, target):
                region = cls._map(
                    file, status.st_size, page, source, name or target, target, readonly=readonly
                )
        if prealloc:
            region._populate_or_close()
        return region

    @classmethod
    def open(
        cls,
        size: SupportsIndex | str,
        *,
        name: str | None = None,
        path: str | os.PathLike[str] | None = None,
        prealloc: bool = False,
        mode: int = 0o600,
        accept_owner: Iterable[SupportsIndex | str] = (),
    ) -> Region:
        """Attach to what exists under a name or path, else create it; `created` says which.

        Raises:
            RegionError, OSError: as of `attach` and `create`.
        """
        users = tuple(accept_owner)
        new_files.check_mode(mode)
        for last in (False, False, True):
            with contextlib.suppress(FileNotFoundError):
                return cls.attach(
                    name=name, path=path, size=size, prealloc=prealloc, accept_owner=users
                )
            try:
                return cls.create(
                    size, name=name, path=path, prealloc=prealloc, mode=mode, accept_owner=users
                )
            except FileExistsError:  # another process was quicker; or a link leads nowhere
                if last:
                    raise
        raise AssertionError

    @classmethod
    def from_fd(
        cls,
        fd: int,
        *,
        readonly: bool = False,
        source: Literal[
            "anonymous", "posix", "file", "directory", "descriptor", "device"
        ] = "descriptor",
        name: str | None = None,
        keep_on_error: bool = False,
    ) -> Region:
        """Map the file behind `fd`, as a server passes it; own `fd`, also when this fails.

        A descriptor that was opened for reading only gives a read-only region.

        Args:
            source, name: of the region in the process that the descriptor comes from.
            keep_on_error: when this fails, `fd` stays open and belongs to the caller.

        Raises:
            RegionError: the file is empty, or not memory.
            OSError: as of mmap(2).
        """
        file = descriptors.FdArray()
        if not keep_on_error:
            file.take(fd)
        region = cls._from_open(file, fd, readonly, source, name)
        if keep_on_error:
            file.take(fd)
        return region

    @classmethod
    def _from_received(cls, fd: descriptors.Fd, *, readonly: bool) -> Region:
        """Map the file behind a descriptor that came over a socket; take it, also on an error."""
        file = descriptors.FdArray()
        file.take(fd)
        return cls._from_open(file, file[0], readonly, "descriptor", None)

    @classmethod
    def _from_open(
        cls, file: descriptors.FdArray, fd: int, readonly: bool, source: Source, name: str | None
    ) -> Region:
        """Map the file behind `fd`, which `file` owns, or will own when this has succeeded."""
        with safe_files.closed_on_error(file):
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
                raise RegionError(
                    f"the descriptor is not shared memory: a file of {status.st_size} bytes"
                )
            readonly = readonly or fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
            page = pages.page_size_of(fd)
            path = posix_path(name) if source == "posix" and name else name
            path = path if source in ("posix", "file") else None
            with pages.explained(status.st_size, page, path):
                return cls._map(
                    file, status.st_size, page, source, name, path, readonly=readonly, fd=fd
                )

    @classmethod
    def _anonymous(cls, size: int, huge: int, prealloc: bool) -> Region:
        page = huge or PAGE
        check_size(size, page)
        flags = os.MFD_ALLOW_SEALING
        if huge:
            flags |= os.MFD_HUGETLB | (huge.bit_length() - 1) << MFD_HUGE_SHIFT
        else:
            pages.check_memory(size, now=prealloc)
        file = descriptors.FdArray()
        try:
            file.memfd("ivshmem", flags | MFD_NOEXEC_SEAL)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            file.memfd("ivshmem", flags)  # before Linux 6.3
        return cls._furnish(file, size, page, "anonymous", None, None, prealloc, seal=True)

    @classmethod
    def _furnish(
        cls,
        file: descriptors.FdArray,
        size: int,
        page: int,
        source: Source,
        name: str | None,
        path: str | None,
        prealloc: bool,
        *,
        seal: bool = False,
        fresh: bool = True,
    ) -> Region:
        """Give an empty file its size, its space and its seals, and map it.

        Args:
            fresh: no other process can have it open.
        """
        with safe_files.closed_on_error(file), pages.explained(size, page, path or name):
            if fresh or page > PAGE:
                os.ftruncate(file[0], size)
            if seal:
                # A memfd begins with mode 0o777 or 0o666: a process that has a descriptor for
                # reading could open it again for writing, through /proc/self/fd.
                os.fchmod(file[0], 0o600)
                fcntl.fcntl(file[0], fcntl.F_ADD_SEALS, _SEALS)
            elif page == PAGE:
                # tmpfs and file systems allocate pages and blocks one by one, and an access that
                # finds none left is a SIGBUS. (hugetlbfs reserves all of them in mmap.) On tmpfs
                # this call sets the size and reserves the space in one step.
                os.posix_fallocate(file[0], 0, size)
            region = cls._map(file, size, page, source, name, path)
        region.created = True
        if prealloc:
            region._populate_or_close()
        return region

    @classmethod
    def _map(
        cls,
        file: descriptors.FdArray,
        size: int,
        page: int,
        source: Source,
        name: str | None,
        path: str | None,
        *,
        readonly: bool = False,
        fd: int | None = None,
    ) -> Region:
        """Map an open file; the region owns its descriptor from now on.

        Args:
            fd: the descriptor, if `file` should own it only after this has succeeded.
        """
        return cls._over(
            file[0] if fd is None else fd,
            size,
            owner=file,
            readonly=readonly,
            source=source,
            name=name,
            path=path,
            page_size=page,
        )

    def _populate_or_close(self) -> None:
        try:
            with pages.explained(self.size, self.page_size, self.name):
                self.populate()
        except BaseException:
            self.close()
            raise

    # -- using it ---------------------------------------------------------------------------------

    def populate(self) -> None:
        """Fault every page in, for writing where that is allowed; the contents stay as they are.

        Other threads run in that time, which is about a second for 4 GiB of small pages.

        Raises:
            OSError: ENOMEM or EFAULT, memory or huge pages ran out on the way; the pages that were
                faulted in stay.
            ClosedError: the region is closed.
        """
        self._populate(self.page_size)

    def fileno(self) -> int:
        """Return the descriptor of the file behind the region; it stays the region's."""
        if self.closed:
            raise ClosedError("the region is closed")
        assert self._fd is not None
        return self._fd[0]

    def readonly_fd(self) -> int:
        """Return a new descriptor of the same memory for reading only; the caller closes it.

        A process that receives it can map the memory for reading, and can change neither its bytes
        nor its size. The file's permissions decide which user can open it again for writing. Of an
        anonymous region that is its owner: this protects from other users, not from root or the
        same user.

        Raises:
            OSError: EACCES, this process's user has changed since the region was made; ENOENT,
                /proc is not mounted.
            ClosedError: the region is closed.
        """
        fd = self.fileno()
        try:
            return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise OSError(
                error.errno,
                f"the memory cannot be opened again for reading only: {error.strerror}",
                self.name,
            ) from None

    def info(self) -> RegionInfo:
        """Measure size, pages and residence now.

        Raises:
            ClosedError: the region is closed.
        """
        status = os.fstat(self.fileno())
        if self.source == "device":
            resident, huge = self.size, 0
        elif self.page_size > PAGE:
            # Of hugetlbfs, mincore sees only this process's page tables; the blocks count all.
            resident = huge = min(status.st_blocks * 512, self.size)
        else:
            found = (self.resident(start, end - start) for start, end in self.extents())
            resident = min(sum(found), self.size)
            huge = min(pages.transparent_huge_bytes(self.address, self.size), resident)
        try:
            seals = fcntl.fcntl(self.fileno(), fcntl.F_GET_SEALS)
        except OSError:  # EINVAL: a file system without seals
            seals = 0
        return RegionInfo(
            size=self.size,
            page_size=self.page_size,
            source=self.source,
            name=self.name,
            resident=resident,
            huge=huge,
            readonly=self.readonly,
            sealed=seals & fcntl.F_SEAL_SHRINK != 0,
            name_leads_to=self.name_leads_to(),
        )

    @property
    def path(self) -> str | None:
        """The path of its name or file; None: it has no name."""
        return self._path

    def name_leads_to(self) -> Literal["this", "nothing", "another"] | None:
        """Return what a process that opens the region's name gets now: as in RegionInfo.

        Raises:
            ClosedError: the region is closed.
        """
        fd = self.fileno()
        if self._path is None:
            return None
        try:
            found = os.stat(self._path)
        except OSError:
            return "nothing"
        return "this" if safe_files.same_file(found, os.fstat(fd)) else "another"

    def extents(self, start: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
        """Yield where the file has data: (start, end) in bytes; the rest is holes, which are zero.

        Other peers can fill and make holes during the iteration. A file system without holes gives
        one extent.

        Raises:
            ClosedError: the region is closed.
        """
        stop = self.size if end is None else end
        # A device's lseek(2) may return anything.
        knows = stat.S_ISREG(os.fstat(self.fileno()).st_mode)
        while start < stop:
            fd, base = self.fileno(), self.offset  # it may be closed between two of these
            first, last = start, stop
            if knows:
                try:
                    first = os.lseek(fd, base + start, os.SEEK_DATA) - base
                    last = os.lseek(fd, base + first, os.SEEK_HOLE) - base
                except OSError as error:
                    if error.errno == errno.ENXIO and _is_hole(fd, base + start):
                        return
            if first >= stop:
                return
            yield first, min(last, stop)
            start = max(last, first + PAGE)  # there may be a hole now where there was none

    def unlink(self) -> bool:
        """Remove the name or path, if it still leads to this region's file.

        Processes that have the region mapped keep it.

        Returns:
            Whether it was removed; False also for a region without a name.

        Raises:
            ClosedError: the region has a name and is closed.
        """
        if self._path is None:
            return False
        fd = self.fileno()
        try:
            place = safe_files.find(self._path, links=self.source != "posix")
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE) and self.source == "posix":
                return self._unlink_name(fd)
            return False  # it is not there, or an untrusted user has put it there
        with place:
            return place.remove(fd)

    def _unlink_name(self, fd: int) -> bool:
        """Remove it without a descriptor for /dev/shm, where only we and root rename our files."""
        assert self._path is not None
        try:
            return safe_files.unlink_same(self._path, os.fstat(fd))
        except OSError:
            return False

    def close(self) -> None:
        """Unmap and close; may be called twice, and by any thread.

        Raises:
            BufferError: a memoryview or an array of the memory is alive; nothing has changed.
        """
        super().close()
        if self._fd is not None:
            self._fd.close()

    def __enter__(self) -> Region:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        where = f" {self.name}" if self.name else ""
        state = "closed" if self.closed else format_size(self.size)
        return f"<ivshmem.Region {self.source}{where}, {state}>"

    def __del__(self, _warn: Any = warnings.warn) -> None:
        if self._fd is not None and not self.closed:
            _warn(f"unclosed {self!r}", ResourceWarning, source=self)


# -- places ---------------------------------------------------------------------------------------


def _is_hole(fd: int, offset: int) -> bool:
    """Whether "no data" (ENXIO) means a hole up to the end; sysfs says it of all its files."""
    try:
        os.lseek(fd, offset, os.SEEK_HOLE)
    except OSError:
        return offset >= os.fstat(fd).st_size
    return True


def posix_path(name: str) -> str:
    """Return the path of a POSIX name, by the rules of shm_open(3).

    Raises:
        RegionError: it is not such a name.
    """
    if not isinstance(name, str):
        raise TypeError(f"a POSIX shared memory name is text, not {name!r}")
    bare = name.removeprefix("/")
    if not bare or "/" in bare or "\0" in bare or bare in (".", "..") or len(bare) > 255:
        raise RegionError(
            f"{name!r} is not a POSIX shared memory name: expected 1 to 255 characters, and a slash"
            " only at the start"
        )
    return f"{SHM}/{bare}"


def _exists(target: str, what: str | None = None) -> FileExistsError:
    usual = (
        "it exists already: attach to it or replace it (--existing attach, --existing replace;"
        " in Python Region.attach, replace=True)"
    )
    return FileExistsError(errno.EEXIST, what or usual, target)


def _opened(place: safe_files.SafePlace, readonly: bool) -> descriptors.FdArray:
    """Open what exists; an error says what would allow it."""
    try:
        return place.open(os.O_RDONLY if readonly else os.O_RDWR)
    except WrongKind as error:
        raise RegionError(f"{place.path}: {error.strerror}") from None
    except OSError as error:
        if readonly or error.errno not in (errno.EACCES, errno.EROFS, errno.ETXTBSY):
            raise
        if not os.access(place.name, os.R_OK, dir_fd=place.fd, effective_ids=True):
            raise
        raise OSError(
            error.errno,
            f"{error.strerror}, for writing; reading is allowed: readonly=True, or"
            " serve --readonly",
            place.path,
        ) from None
