"""A region from its configuration: its socket, its memory, its names; no client can connect yet.

Knows: what is made, in which order, and what is undone if a part fails. Does not know: what serves
the region, other regions.
"""

from __future__ import annotations

import contextlib
import os

from ..errors import RegionError
from ..memory import pages
from ..memory.region import Region, posix_path
from ..memory.sizes import parse_size
from ..system import processes, safe_files
from ..system.listener import Listener
from ..system.uncopied import Uncopied
from .config import RegionConfig
from .limits import DEFAULT_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..peer.directory import Directory


class Opened(Uncopied):
    """What was opened for a region.

    Attributes:
        listener: bound; it listens only if it was inherited.
        region: the memory.
        created: whether it was made here, and is to go with the region if it has a POSIX name.
        directory: the names in it, if there are to be any.
    """

    def __init__(
        self, listener: Listener, region: Region, created: bool, directory: Directory | None
    ) -> None:
        self.listener = listener
        self.region = region
        self.created = created
        self.directory = directory

    def close(self, *, keep: bool = False) -> None:
        """Close all of it; a POSIX name that was made here goes, unless it is to be kept.

        May be called twice.
        """
        with contextlib.ExitStack() as undo:
            undo.callback(self.region.close)
            removable = self.region.source == "posix" and not self.region.closed
            if self.created and removable and not keep:
                undo.callback(self.region.unlink)
            undo.callback(self.listener.close)
            if self.directory is not None:
                undo.callback(self.directory.close)


def open_region(config: RegionConfig, inherited: Listener | None = None) -> Opened:
    """Open all that a region needs, or nothing.

    Args:
        inherited: its socket, if that is there already; it stays open if this fails.

    Raises:
        ValueError, OSError: as of Listener, Region and Directory.
    """
    mode, owner, group = config.mode, config.owner, config.group
    with contextlib.ExitStack() as undo:
        # The socket first: what a second server would do to the first one's memory comes after.
        if inherited is None:
            listener = undo.enter_context(
                Listener(config.socket, mode=mode, owner=owner, group=group)
            )
        else:
            listener = inherited
            if (mode, owner, group) != (None, None, None):
                listener.permit(mode=mode, owner=owner, group=group)
        region, created = open_memory(config)
        undo.callback(region.close)
        if created and region.source == "posix":
            undo.callback(region.unlink)
        directory = None
        if config.has_directory:
            from ..peer.directory import Directory  # here: few regions have names

            directory = Directory.create(region, config.names or None, channels=config.channels)
        if not (created or region.readonly):
            _free_places(region)
        undo.pop_all()
    return Opened(listener, region, created, directory)


def _free_places(region: Region) -> None:
    """Free what earlier processes have of the area for channels, if all of them are gone.

    A server that ended leaves its peers their memory, so they may still be there.
    """
    from ..memory import left_places  # here: few regions exist before their server
    from ..system import sole_holder

    if left_places.has_area(region):
        with sole_holder.alone_with(region.fileno()) as alone:
            if alone:
                left_places.free_places(region)


def open_memory(config: RegionConfig) -> tuple[Region, bool]:
    """The region that a configuration means, and whether its name or file was made now.

    Raises:
        RegionError, OSError: as of Region.create and Region.attach.
    """
    if config.existing == "grow" and config.name is not None:
        size = _at_least(config, parse_size(config.size or DEFAULT_SIZE))
        config = config._replace(size=size, existing="attach")
    named = config.name is not None or config.file is not None
    if config.readonly or config.existing == "require":
        if not named:
            raise RegionError("only a name or a file can be attached to: give --name or --file")
        return _attach(config), False
    if named and config.existing == "attach":
        with contextlib.suppress(FileNotFoundError):
            return _attach(config), False
    region = Region.create(
        DEFAULT_SIZE if config.size is None else config.size,
        name=config.name,
        path=config.file,
        directory=config.directory,
        hugepages=config.hugepages,
        prealloc=config.prealloc,
        replace=config.existing == "replace",
        accept_owner=config.accept_owner,
    )
    return region, not region.adopted


def holders_of_removed(path: str) -> list[int]:
    """Processes that have a file open which was at `path` and was removed; proc(5).

    Of all users for root, else of our own.
    """
    return processes.pids_with_open(f"{path} (deleted)")


def _attach(config: RegionConfig) -> Region:
    region = Region.attach(
        name=config.name,
        path=config.file,
        size=config.size,
        readonly=config.readonly,
        prealloc=config.prealloc,
        accept_owner=config.accept_owner,
    )
    if config.hugepages and region.page_size == pages.PAGE:
        region.close()
        raise RegionError(f"{region.name} is not in huge pages: omit --hugepages")
    return region


def _at_least(config: RegionConfig, size: int) -> int:
    """Grow what exists under a name to `size`, and return the size it then has.

    What is empty is left alone, since it is not made yet.
    """
    assert config.name is not None
    path = posix_path(config.name)
    try:
        with safe_files.find(path, accept=config.accept_owner, links=False) as place:
            file = place.open(os.O_RDWR)
    except FileNotFoundError:
        return size
    with safe_files.closed_on_error(file):
        found = os.fstat(file[0]).st_size
        if 0 < found < size:
            with pages.explained(size, pages.PAGE, path):
                os.posix_fallocate(file[0], 0, size)
            found = size
    file.close()
    return found or size
