"""A directory of names at the end of a region, so that peers find one another by name.

Knows: claiming and losing a slot of the table, and the thread that keeps what is published.
Does not know: which entries are alive (slot_watch.py); the table's format (names_table.py); where a
region comes from; what names mean.

Invariants:
1. Shared bytes are copied once, and only the copy is looked at. Whatever other peers write, at any
   moment: an entry that is returned is valid, only the documented errors are raised, and each loop
   is bounded by the number of slots.
2. A slot is taken and freed only by compare-exchange of its owner. Only the process that won writes
   into it.
3. The memory is never exported (`Region.read` copies out, 64-bit stores copy in), so that another
   thread's `region.close()` finds no view of ours, with a GIL or without.
4. The endpoint, which has locks of its own, is never called while the lock is held.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import operator
import os
import threading
import time
import warnings
import weakref
from collections.abc import Generator, Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol, SupportsIndex, TypeVar, cast

from ..errors import ClosedError, DirectoryFull, NameTaken, NoDirectory, NoSuchName, RegionError
from ..memory.region import Region
from ..memory.sizes import parse_size
from ..native import mapping
from ..protocol.limits import MAX_ID, MAX_VECTORS
from ..system.time_limits import deadline_of, seconds_of
from ..system.uncopied import Uncopied
from ..text import counted
from .channel_area import place_of, set_aside
from .endpoint import Endpoint
from .limits import MAX_SLOTS, SLOT_BYTES
from .names_table import (
    BEAT_OFFSET,
    NAME_BYTES,
    OWNER,
    ROLE_BYTES,
    Entry,
    Trailer,
    check_text,
    copy_slot,
    default_slots,
    make_table,
    pack,
    trailer_of,
    write_trailer,
)
from .slot_watch import Slot, WatchedSlots

_log = logging.getLogger("ivshmem.directory")

_T = TypeVar("_T")

BEAT = 1.0  # seconds between the signs of life of an entry
LEASE = 5.0  # seconds without one after which its owner counts as dead

_SHOWN = 20  # names in an error message
LONGEST_LEASE = 86400.0  # a day; no clock and no wait overflows
_LAST_BEAT = 1.0  # seconds that closing waits for the last step of the thread
_LOOKS = (0.002, 0.05)  # seconds between two looks for a name: first, and at most


class _Refusal(NamedTuple):
    """Why an entry cannot be made; if not `final`, watching may show that it can be."""

    error: NameTaken | DirectoryFull
    final: bool


class _Follower(Protocol):
    """An endpoint that knows which peers are connected: a Client."""

    id: int

    @property
    def vectors(self) -> int: ...
    @property
    def peers(self) -> list[int]: ...
    @property
    def connected(self) -> bool: ...


class Directory(Uncopied):
    """The names in a region; made by `create` or `open`. A context manager.

    A published entry stays in the table until it is withdrawn or the directory is closed; a thread
    keeps it there. Calls may come from several threads and from signal handlers. A forked child may
    close its copy, which withdraws nothing, and do nothing else with it. An object that was used
    only for reading needs no `close()`.

    Attributes:
        start: the offset where the directory begins; the bytes before it are the program's, except
            `channels`.
        slots: how many entries there can be.
    """

    # What __del__ finds if `_begin` was interrupted.
    _closed = True
    _thread: threading.Thread | None = None

    def __init__(self, *_: object, **__: object) -> None:
        raise TypeError("a Directory is made by Directory.create or Directory.open")

    @classmethod
    def _over(
        cls, place: Endpoint | Region, trailer: Trailer, *, beat: float = BEAT, lease: float = LEASE
    ) -> Directory:
        """Use a table that exists; see `create` and `open`."""
        self = cls.__new__(cls)
        self._begin(place, trailer, beat, lease)
        return self

    def _begin(self, place: Endpoint | Region, trailer: Trailer, beat: float, lease: float) -> None:
        for what, seconds in (("beat", beat), ("lease", lease)):
            if not isinstance(seconds, int | float):
                raise TypeError(f"{what}: seconds are a number, not {seconds!r}")
        if not beat > 0:
            raise ValueError(f"a beat every {beat:g} s: more than 0 seconds are allowed")
        if not 2 * beat < lease:
            raise ValueError(f"a lease of {lease:g} s is too short for a beat every {beat:g} s")
        if lease > LONGEST_LEASE:
            raise ValueError(f"a lease of {lease:g} s: {LONGEST_LEASE:g} s or less are possible")
        self._region, self._endpoint = _found_in(place)
        self._trailer = trailer
        self._trailer_is_lost = False  # at the last beat
        self.slots = trailer.slots
        self._table = WatchedSlots(self._region, trailer.slots, beat, lease)
        self.start = self._table.start
        self._beat = beat
        self._lease = lease
        self._pid = os.getpid()
        self._lock = threading.RLock()  # of all below; a signal handler may come in between
        self._publications: list[Publication] = []
        self._trouble = ""  # of the last beat, as it stands in the log
        self._closing = threading.Event()
        self._at_exit = partial(_forgotten, weakref.ref(self))
        self._look(None)  # from now on the entries of the table are watched
        self._closed = False

    # -- making one -------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        place: Endpoint | Region,
        slots: SupportsIndex | None = None,
        *,
        channels: SupportsIndex | str | None = None,
        beat: float = BEAT,
        lease: float = LEASE,
    ) -> Directory:
        """Make the directory of a region, or open the one that it has.

        It overwrites the last (slots + 1) * 128 bytes. One peer does that before the others use
        these bytes for anything else; the peers must agree on it.

        Args:
            place: an endpoint or a region, as in `open`.
            slots: how many entries there can be, 1..4095. None: as many as an existing directory
                has; else 63, which take 8 KiB, or as many as half of a smaller region holds.
            channels: bytes to set aside for channels, or a size such as "64M"; at least 16 KiB.
                They lie before the names, and never in the region's first 8 KiB. If the region has
                that area already, it stays as it is. None: none, or those that are there.
            beat, lease: as in `open`.

        Raises:
            RegionError: they do not fit; the region has a directory, or an area, of another size;
                or it has none and is mapped for reading only.
            NoDirectory: the region has a directory of another version.
            ClosedError: the region is closed.
        """
        region, _ = _found_in(place)
        wanted = None if slots is None else operator.index(slots)
        if wanted is not None and not 1 <= wanted <= MAX_SLOTS:
            raise RegionError(
                f"a directory of {counted(wanted, 'slot')}: allowed are 1 to {MAX_SLOTS}"
            )
        size = None if channels is None else parse_size(channels)
        trailer = trailer_of(region)
        if trailer is None:
            trailer = Trailer(wanted or default_slots(region.size))
            if size is not None:
                place_of(region.size, trailer.slots, size)  # before anything is made
            make_table(region, trailer.slots)
        elif wanted not in (None, trailer.slots):
            there = counted(trailer.slots, "slot")
            raise RegionError(f"the region has a directory already, of {there}, not {wanted}")
        if size is not None:
            trailer = set_aside(region, trailer, size)
        return cls._over(place, trailer, beat=beat, lease=lease)

    @classmethod
    def open(
        cls, place: Endpoint | Region, *, beat: float = BEAT, lease: float = LEASE
    ) -> Directory:
        """Open the directory that a region has.

        Args:
            place: an endpoint, whose id and vectors are published with each name; a client also
                knows which peers have left. Or a region alone.
            beat: seconds between two signs of life of what is published here.
            lease: seconds without a sign of life after which other entries count as dead. All peers
                must use the same beat and lease.

        Raises:
            NoDirectory: the region has none, or one of another version.
            ValueError: the lease is not longer than two beats.
            ClosedError: the region is closed.
        """
        region, _ = _found_in(place)
        trailer = trailer_of(region)
        if trailer is None:
            raise NoDirectory(
                "the region has no directory of names: make one by `ivshmem serve --names`, or by"
                " Directory.create"
            )
        return cls._over(place, trailer, beat=beat, lease=lease)

    @property
    def channels(self) -> range | None:
        """The bytes of the region that are set aside for channels, by `create`; None: none are."""
        return self._trailer.area

    # -- reading ----------------------------------------------------------------------------------

    def entries(self) -> list[Entry]:
        """Return all entries that are not known to be dead, by name. Never waits.

        Whether an owner is alive shows only while it is watched: by calling this repeatedly, or by
        having published an entry, which watches all the time. A client leaves out entries of peers
        that its server does not list as connected.

        Raises:
            ClosedError: the directory or the region is closed.
        """
        self._check()
        connected = self._connected()
        with self._lock:
            own = self._own()
            found = [
                slot.entry
                for slot in self._look(connected)
                if slot.entry is not None
                and slot.alive is not False
                and (connected is None or slot.entry.id in connected or slot[:2] in own)
            ]
        return sorted(found, key=lambda entry: (entry.name, not entry.alive, entry.id))

    def lookup(self, name: str) -> Entry:
        """Return the entry of that name. Never waits; `wait_for` does.

        Raises:
            NoSuchName: there is none; the message lists the names that are there.
            ClosedError: the directory or the region is closed.
        """
        entries = self.entries()
        for entry in entries:
            if entry.name == name:
                return entry  # those that were seen at work come first
        raise NoSuchName(f"no entry {name!r} in the directory ({_names(entries)})")

    def wait_for(self, name: str, timeout: float | None = None) -> Entry:
        """Return the entry of that name, as soon as it stands in the table.

        Args:
            timeout: seconds to wait at most; None: for ever; 0: look once.

        Raises:
            TimeoutError: it did not come in time; the message lists the names that are there.
            ClosedError: the directory or the region is closed, perhaps by another thread during
                the call.
        """
        return self._go_through(self._wait_for(name, timeout))

    def _wait_for(self, name: str, timeout: float | None) -> Generator[float, None, Entry]:
        """What `wait_for` does; yields how many seconds to pause."""
        deadline = deadline_of(timeout)
        pause, longest = _LOOKS
        while True:
            try:
                return self.lookup(name)
            except NoSuchName as error:
                left = longest if deadline is None else deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError(f"{error}; waited for {float(timeout or 0):g} s") from None
            yield min(pause, left)
            pause = min(pause * 2, longest)

    def _go_through(self, steps: Generator[float, None, _T]) -> _T:
        """Run a generator of pauses; close() ends each pause. (aio.py runs it in a loop.)"""
        while True:
            try:
                pause = next(steps)
            except StopIteration as done:
                return cast(_T, done.value)
            self._closing.wait(pause)

    # -- publishing -------------------------------------------------------------------------------

    def publish(
        self,
        name: str,
        role: str = "",
        vector_range: range | None = None,
        *,
        id: SupportsIndex | None = None,  # noqa: A002 - what it is called everywhere else
        timeout: float | None = None,
    ) -> Publication:
        """Enter a name into the table, and keep it there until it is withdrawn.

        An entry with the same id and name is taken over at once: it is from before a restart. (But
        not if the endpoint has no vectors: all plain devices have id 0.) If another peer has the
        name, or the table is full, the entries are watched until it is known whether they are
        alive: a beat if they are, the lease if they are not. This blocks; `aio.publish_async` does
        not.

        The thread that keeps the entry touches the memory about once a second. If the memory can
        vanish, as sysfs's mapping of a device does when it is unplugged, close the directory first.

        Args:
            name: printable text without a space at either end, 1 to 47 bytes of UTF-8.
            role: such a text of 0 to 31 bytes.
            vector_range: the vectors that this name listens on; None: all of the endpoint's.
            id: of the peer; None: the endpoint's.
            timeout: seconds to wait at most until it is known who lives; 0: try once. None: as long
                as it takes, which is two leases at most.

        Raises:
            NameTaken: a living entry has the name; or after two leases it is still not known
                whether it lives, which only a hostile peer brings about.
            DirectoryFull: the same of the entries in all slots.
            TimeoutError: `timeout` is over, and it is not known yet whether the entry that has the
                name, or those in all slots, live. Nothing is published then.
            RegionError: the region is mapped for reading only.
            ValueError: a name, role, range or id that is not allowed; or no id is known, since the
                directory was opened on a region alone.
            ClosedError: the directory or the region is closed, perhaps while waiting.
        """
        return self._go_through(self._publish(name, role, vector_range, id, timeout))

    def _publish(
        self,
        name: str,
        role: str,
        vector_range: range | None,
        number: SupportsIndex | None,
        timeout: float | None,
    ) -> Generator[float, None, Publication]:
        """What `publish` does; yields how many seconds to pause."""
        self._check()
        if self._region.readonly:
            raise RegionError("the region is mapped for reading only: nothing can be published")
        endpoint = self._endpoint
        offered = 0 if endpoint is None else endpoint.vectors
        if number is not None:
            peer = operator.index(number)
        elif endpoint is not None:
            peer = endpoint.id
        else:
            raise ValueError(
                "a region alone has no id: open the directory on an endpoint, or give id="
            )
        if not 0 <= peer <= MAX_ID:
            raise ValueError(f"id {peer}: allowed are 0 to {MAX_ID}")
        if vector_range is None:
            vector_range = range(offered)
        elif not isinstance(vector_range, range):
            raise TypeError(f"vector_range: expected a range, not {vector_range!r}")
        elif offered and vector_range.stop > offered:
            raise ValueError(f"{vector_range}: the endpoint has {counted(offered, 'vector')}")
        publication = Publication._draft(
            self, peer, name, role, vector_range, follows=number is None
        )
        # It is decided within the lease, unless this process is stopped for a while, or a hostile
        # peer prevents it.
        begun = time.monotonic()
        last = begun + 2 * self._lease
        deadline = last if timeout is None else min(begun + seconds_of(timeout), last)
        while True:
            connected = self._connected()
            with self._lock:
                self._check()
                refusal = self._enter(publication, connected, take_over=offered > 0)
                if refusal is None:
                    self._publications.append(publication)
                    try:
                        self._start_keeper()
                    except BaseException:  # no more threads, or Ctrl-C
                        self._withdraw(publication)
                        raise
                    return publication
            left = deadline - time.monotonic()
            if refusal.final or (left <= 0 and deadline == last):
                raise refusal.error
            if left <= 0:
                raise TimeoutError(
                    f"{refusal.error}; after {float(timeout or 0):g} s it is not known yet whether"
                    " that peer lives: give it more time"
                ) from refusal.error
            # A random pause, so as not to stay in step with a process that tries the same.
            yield min(os.urandom(1)[0] / 12800, left)

    def _enter(
        self, publication: Publication, connected: frozenset[int] | None, *, take_over: bool
    ) -> _Refusal | None:
        """Try once to get a slot, under the lock; None: the entry is in the table."""
        own = self._own()
        table = self._look(connected)
        for number, slot in enumerate(table):
            rival = slot.entry is not None and slot.entry.name == publication.name
            mine = rival and slot.entry is not None and slot.entry.id == publication.id
            if slot.alive is False or (mine and take_over and slot[:2] not in own):
                self._table.free(slot.number, slot.owner)
                table[number] = Slot(number, 0, None, None)
            elif rival:
                return _Refusal(_taken(publication.name, slot), slot.alive is True)
        owner = int.from_bytes(os.urandom(8), "little") or 1
        for slot in table:
            if (
                not slot.owner
                and self._table.word(slot.number, OWNER).compare_exchange(0, owner) == 0
            ):
                break
        else:
            error = DirectoryFull(
                f"the directory is full, with {counted(self.slots, 'slot')}: make it with more"
            )
            return _Refusal(error, all(slot.alive for slot in table))
        publication._slot, publication._owner = slot.number, owner
        self._write(publication)
        # Two processes that enter the same name at the same time both write before they look: at
        # least one sees the other. That one withdraws, so that a name never stays there twice. The
        # fence is needed because some processors would load before they store.
        mapping.fence()
        for slot in self._look(connected):
            if slot.number == publication._slot:
                if slot.owner == owner:
                    continue
            elif slot.entry is None or slot.entry.name != publication.name or slot.alive is False:
                continue
            self._table.free(publication._slot, owner)
            publication._owner = 0
            return _Refusal(_taken(publication.name, slot), False)
        return None

    def _own(self) -> set[tuple[int, int]]:
        """Return our slots with their owners: a peer can copy a slot to another place."""
        return {(publication._slot, publication._owner) for publication in self._publications}

    def _write(self, publication: Publication) -> None:
        """Fill a slot that is ours; other peers see the entry once its checksum is right."""
        data = publication._data()
        for offset in range(16, SLOT_BYTES, 8):
            word = int.from_bytes(data[offset : offset + 8], "little")
            self._table.word(publication._slot, offset).store(word)
        self._table.word(publication._slot, BEAT_OFFSET).fetch_add(1)

    def _withdraw(self, publication: Publication) -> None:
        if os.getpid() != self._pid:
            return
        with self._lock:
            if publication not in self._publications:
                return
            self._publications.remove(publication)
            try:
                self._table.free(publication._slot, publication._owner)
            except ClosedError:
                return  # the region is closed: other peers will see that the beat has stopped

    # -- the table --------------------------------------------------------------------------------

    def _look(self, connected: frozenset[int] | None) -> list[Slot]:
        """Copy the table, and note which entries showed a sign of life since the last look."""
        with self._lock:
            return self._table.look(connected, self._own(), regularly=self._thread is not None)

    def _connected(self) -> frozenset[int] | None:
        """Return the ids of all connected peers, this one included; None if they are unknown."""
        if not hasattr(type(self._endpoint), "peers"):
            return None  # a guest's device, or no endpoint at all
        follower = cast(_Follower, self._endpoint)
        if not follower.vectors:
            return None  # version 0 of the protocol announces peers by their vectors
        peers = follower.peers
        return frozenset([*peers, follower.id]) if follower.connected else None

    # -- keeping ----------------------------------------------------------------------------------

    def _start_keeper(self) -> None:
        if self._thread is None:
            thread = threading.Thread(
                target=_keep_alive,
                args=(weakref.ref(self), self._closing, self._beat),
                name="ivshmem-directory",
                daemon=True,
            )
            thread.start()
            self._thread = thread
            atexit.register(self._at_exit)

    def _keep(self) -> bool:
        """Do one beat: show that our entries live, restore lost ones, remove dead ones.

        An error is logged and does not end the thread: at the next beat it may have passed.

        Returns:
            Whether there will be another beat.
        """
        try:
            self._beat_once()
        except ClosedError:
            return False  # the region was closed, or this directory
        except Exception as error:
            self._note_trouble(error)
            with self._lock:
                for publication in self._publications:
                    publication.lost = f"it cannot be kept in the table: {_told(error)}"
        return True

    def _beat_once(self) -> None:
        connected = self._connected()
        trouble: Exception | None = None
        with self._lock:
            if self._closed:
                raise ClosedError("the directory is closed")
            for publication in self._publications:
                if publication._follows_id and self._endpoint is not None:
                    try:
                        publication.id = self._endpoint.current_id()
                    except ClosedError:
                        raise
                    except Exception as error:  # a device's register that cannot be read now
                        trouble = error  # the entry stays alive with its former id
                self._keep_one(publication, connected)
            for slot in self._look(connected):
                if slot.alive is False:
                    self._table.free(slot.number, slot.owner)
            with contextlib.suppress(NoDirectory):  # of another version, which will overwrite ours
                self._keep_trailer()
        if trouble is not None:
            self._note_trouble(trouble)
        elif self._trouble:
            _log.info("the directory of names: all is well again")
            self._trouble = ""

    def _keep_trailer(self) -> None:
        """Restore the trailer if a peer overwrote it, because this process still uses the table."""
        found = trailer_of(self._region)
        if found is None:
            # At two beats: a peer that is setting an area aside stores the trailer word by word.
            if self._trailer_is_lost:
                write_trailer(self._region, self._trailer)
        elif self._trailer.area is None and found.slots == self.slots:
            self._trailer = found  # a peer has set an area aside since
        self._trailer_is_lost = found is None

    def _note_trouble(self, error: Exception) -> None:
        """Log a trouble once, not at each beat."""
        if self._trouble != _told(error):
            self._trouble = _told(error)
            _log.warning("the directory of names: %s; trying again", self._trouble)

    def _keep_one(self, publication: Publication, connected: frozenset[int] | None) -> None:
        owner = publication._owner
        raw = copy_slot(self._region, self.start + publication._slot * SLOT_BYTES)
        if owner and int.from_bytes(raw[:8], "little") == owner:
            if raw[16:] == publication._data()[16:]:
                self._table.word(publication._slot, BEAT_OFFSET).fetch_add(1)
            else:
                self._write(publication)  # a peer overwrote it, or the id has changed
            publication.lost = ""
            return
        # This machine was stopped for longer than the lease, or a peer overwrote the owner.
        publication._owner = 0
        refusal = self._enter(publication, connected, take_over=False)
        publication.lost = "" if refusal is None else str(refusal.error)

    # -- the end ----------------------------------------------------------------------------------

    def _check(self) -> None:
        """Raise if it is closed; before the lock, which a forked child might never get."""
        if self._closed:
            raise ClosedError("the directory is closed")
        if os.getpid() != self._pid:
            raise RuntimeError("a forked child may only close the directory")

    def close(self) -> None:
        """Withdraw everything that was published here; may be called twice, from any thread.

        It waits up to a second for a beat that is under way. (`aio.close_async` does not block the
        event loop.)
        """
        if os.getpid() != self._pid:
            self._closed = True  # without the lock, which a thread of the parent may have held
            return
        with self._lock:
            for publication in list(self._publications):
                self._withdraw(publication)
            self._closed = True
            self._closing.set()
        thread = self._thread
        if thread is not None:
            atexit.unregister(self._at_exit)
            if thread is not threading.current_thread():
                # A signal handler can be here while its own thread holds the lock.
                thread.join(_LAST_BEAT)

    def __enter__(self) -> Directory:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{counted(self.slots, 'slot')} from {self.start:#x}"
        return f"<ivshmem.Directory, {state}>"

    def __del__(self, _warn: Any = warnings.warn) -> None:
        if not self._closed and self._thread is not None and os.getpid() == self._pid:
            try:
                _warn(f"unclosed {self!r}", ResourceWarning, source=self)
            finally:
                self.close()


class Publication(Uncopied):
    """An entry of this process; made by `Directory.publish`. A context manager that withdraws it.

    Attributes:
        id, name, role, vector_range: as in Entry.
        lost: why it is not in the table at the moment; "" if it is. It is entered again when the
            reason has passed.
    """

    def __init__(self, *_: object, **__: object) -> None:
        raise TypeError("a Publication is made by Directory.publish")

    @classmethod
    def _draft(
        cls,
        directory: Directory,
        peer: int,
        name: str,
        role: str,
        vector_range: range,
        *,
        follows: bool = False,
    ) -> Publication:
        """Make one that is not in the table yet.

        Raises:
            ValueError: a name, a role or a range that is not allowed.
        """
        self = cls.__new__(cls)
        self._begin(directory, peer, name, role, vector_range, follows)
        return self

    def _begin(
        self,
        directory: Directory,
        peer: int,
        name: str,
        role: str,
        vector_range: range,
        follows: bool,
    ) -> None:
        self.id = peer
        self._follows_id = follows  # the endpoint's id, which can be another after a migration
        self.name = name
        self.role = role
        self.vector_range = vector_range
        self.lost = ""
        self._slot = 0  # its number in the table, and
        self._owner = 0  # the owner that is stored there while the slot is ours
        self._directory = directory
        check_text("name", name, 1, NAME_BYTES)
        check_text("role", role, 0, ROLE_BYTES)
        first, end = vector_range.start, vector_range.stop
        if vector_range.step != 1 or not 0 <= first <= end <= MAX_VECTORS:
            raise ValueError(f"{vector_range}: vectors are a range within 0 to {MAX_VECTORS}")

    def _data(self) -> bytes:
        """Return the slot's bytes, with a beat of 0."""
        return pack(self._owner, self.id, self.name, self.role, self.vector_range)

    def withdraw(self) -> None:
        """Take it out of the table; may be called twice."""
        self._directory._withdraw(self)

    def __enter__(self) -> Publication:
        return self

    def __exit__(self, *error: object) -> None:
        self.withdraw()

    def __repr__(self) -> str:
        # A constructor that failed did not set them.
        name, peer = getattr(self, "name", ""), getattr(self, "id", -1)
        return f"<ivshmem.Publication {name!r} of peer {peer}>"


def _keep_alive(
    directory: weakref.ReferenceType[Directory], closing: threading.Event, beat: float
) -> None:
    """Run the thread. It keeps no reference, so that a forgotten directory is collected."""
    while not closing.wait(beat):
        it = directory()
        if it is None or not it._keep():
            return
        del it


def _forgotten(directory: weakref.ReferenceType[Directory]) -> None:
    """Close it at the end of the program, while its thread still runs and can be waited for."""
    it = directory()
    if it is not None:
        it.__del__()


def _found_in(place: Endpoint | Region) -> tuple[Region, Endpoint | None]:
    if isinstance(place, Endpoint):
        return place.region, place
    if hasattr(place, "atomic_u64"):  # a Region, or what stands for one
        return place, None
    inner = isinstance(getattr(place, "endpoint", None), Endpoint)
    hint = ": pass its `endpoint`" if inner else ""
    raise TypeError(f"a directory is opened on an endpoint or a region, not on {place!r}{hint}")


def _taken(name: str, slot: Slot) -> NameTaken:
    if slot.entry is None:
        return NameTaken(f"{name!r} is being published by another process at this moment")
    return NameTaken(f"{name!r} is the name of peer {slot.entry.id}: choose another")


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _names(entries: list[Entry]) -> str:
    names = _unique(entry.name for entry in entries)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"there: {', '.join(names[:_SHOWN])}{more}" if names else "it has none"


def _unique(names: Iterator[str]) -> list[str]:
    return list(dict.fromkeys(names))
