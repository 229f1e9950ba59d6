"""Internal: the channels of a region as a program sees them: open, create, list, remove.

Knows: names, kinds and geometries. Does not know: the protocol (ivshmem_channel.h); how an end
waits (membership.pyx).
"""

from __future__ import annotations

import os
import sys
import threading
import time
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import ChannelCorrupt, ChannelExists, ChannelTypeError, NoChannels, NoSuchChannel
from ..memory.pages import file_system
from ..memory.region import Region
from ..native.areas import find_area
from ..peer.channel_area import obstacle
from ..peer.endpoint import Endpoint
from ..system.uncopied import Uncopied
from ..text import plain
from . import records
from .geometry import (
    MOST,
    check_name,
    check_numbers,
    check_same,
    options_of,
    power,
    type_and_limit,
)
from .info import ChannelInfo, PlaceInfo, ReaderInfo, SpoiledInfo, WriterInfo
from .kinds import KINDS, Bytes, Calls, Channel, Messages, Queue, Value
from .membership import NO_AREA, Membership

if TYPE_CHECKING:
    from typing import Literal

    from .kinds import Overflow

BEAT = 0.1  # seconds between two signs of life of a process
LEASE = 1.0  # seconds without one after which a process counts as silent
_SHORTEST_BEAT = 0.001
_LONGEST_LEASE = 86400

_MAPPINGS = {"write-back": 0, "write-combining": 1, "uncached": 2}
_WAYS: dict[str, Literal["write-back", "write-combining", "uncached"]] = {
    "host": "write-back",
    "vfio": "uncached",
    "resource2": "uncached",
    "uio": "uncached",
}
_SHOWN = 20  # names in an error message
_PATIENCE = 3.0  # seconds for another process to make a channel that is there, or will be


_C = TypeVar("_C", bound=Channel)


class Channels(Uncopied):
    """The channels of a region, and the place of this process among those that use them.

    Made by `open`. A context manager. A thread shows ten times a second that this process is at
    work. Calls may come from several threads; a forked child may close its copy, and do nothing
    else with it.
    """

    _membership: Membership | None = None  # what __del__ finds if joining was interrupted
    _thread: threading.Thread

    def __init__(self, *_: object, **__: object) -> None:
        raise TypeError("Channels are made by ivshmem.channel.open")

    @classmethod
    def _join(
        cls,
        place: Endpoint | Region,
        offset: int,
        vector: int,
        mapping: str,
        beat: float,
        lease: float,
        name: str,
    ) -> Channels:
        self = cls.__new__(cls)
        endpoint = place if isinstance(place, Endpoint) else None
        region = place.region if isinstance(place, Endpoint) else place
        at = vector if endpoint is not None and endpoint.vectors else -1
        if endpoint is not None and endpoint.vectors and not 0 <= vector < endpoint.vectors:
            raise ValueError(f"vector {vector}: the endpoint has {endpoint.vectors}")
        self._membership = Membership(
            region, offset, endpoint, at, _MAPPINGS[mapping], beat, lease, name
        )
        try:
            self._thread = threading.Thread(
                target=self._membership.run, name="ivshmem-channels", daemon=True
            )
            self._thread.start()
        except BaseException:
            self._membership.close()  # without a beat, others would take it for dead
            raise
        return self

    @property
    def _member(self) -> Membership:
        assert self._membership is not None
        return self._membership

    @property
    def readonly(self) -> bool:
        """Whether this process may only read."""
        return self._member.readonly

    @property
    def closed(self) -> bool:
        """Whether `close` was called, or the region was closed."""
        return self._member.closed

    # -- creating ---------------------------------------------------------------------------------

    def create_messages(
        self,
        name: str,
        *,
        limit: int | None = None,
        slots: int = 16,
        writers: int = 4,
        readers: int = 8,
        loans: int = 1,
        views: int | None = None,
        overflow: Overflow | Iterable[Overflow] = ("block", "overwrite"),
        dtype: Any = None,
        shape: Any = None,
        schema: str = "",
        times: bool = False,
        ring_always: bool = False,
        exist_ok: bool = False,
    ) -> Messages:
        """Create a channel of messages.

        Args:
            name: printable, 1 to 63 bytes of UTF-8.
            limit: bytes of the longest message; None: what the type needs.
            slots: how many messages of each writer are kept; rounded up to a power of two.
            writers, readers: how many of each there can be at once, at most 64.
            loans: of each writer at once.
            views: of each reader at once; None: as many as there are slots.
            overflow: the ways to overflow that readers may choose.
            dtype, shape: the messages are arrays of this dtype and shape. The first length of the
                shape may be None: any; shape None: one dimension of any length.
            schema: words by which both sides know that they mean the same, for instance a version.
            times: each message has the time of its publication.
            ring_always: writers on a host ring the vector that they use of every peer at each
                message, so that processes that can only read need not poll. (A guest does not know
                all peers: while a guest writes, such processes poll.)
            exist_ok: if there is such a channel, open it. It is an error if it is of another kind
                or type, or if one of these numbers or options differs.

        Raises:
            ChannelExists: there is a channel of that name; the message says who made and uses it.
                With `exist_ok`: it has another number or option; or a process that has begun to
                make it does not end with that, within three seconds: the message says which.
            ChannelCorrupt: there is one whose record is spoiled.
            ChannelError: there is no room for it.
            ChannelTypeError: a type that is not allowed; with `exist_ok`: another one is there.
            ValueError: a name or a number that is not allowed.
            RegionError: the region is mapped for reading only.
        """
        allowed = (overflow,) if isinstance(overflow, str) else tuple(overflow)
        for way in allowed or ("",):
            if way not in records.OVERFLOW:
                raise ValueError(f"overflow {way!r}: {', '.join(records.OVERFLOW)} are possible")
        text, most = type_and_limit(dtype, shape, schema, limit)
        return self._create(
            Messages,
            name,
            text,
            exist_ok,
            overflow=sum(records.OVERFLOW[way] for way in dict.fromkeys(allowed)),
            options=options_of(times, ring_always),
            writers=writers,
            readers=readers,
            slots=power("slots", slots),
            loans=loans + 1,  # one for `put`, while the program has its own
            views=power("slots", slots) if views is None else views,
            limit=most,
        )

    def create_queue(
        self,
        name: str,
        *,
        limit: int | None = None,
        slots: int = 16,
        writers: int = 4,
        readers: int = 8,
        loans: int = 1,
        dtype: Any = None,
        shape: Any = None,
        schema: str = "",
        times: bool = False,
        exist_ok: bool = False,
    ) -> Queue:
        """Create a queue; the arguments and errors are those of `create_messages`.

        A queue that is full blocks its writers.
        """
        text, most = type_and_limit(dtype, shape, schema, limit)
        return self._create(
            Queue,
            name,
            text,
            exist_ok,
            overflow=0,
            options=options_of(times),
            writers=writers,
            readers=readers,
            slots=power("slots", slots),
            loans=loans + 1,
            views=1,
            limit=most,
        )

    def create_value(
        self,
        name: str,
        *,
        limit: int | None = None,
        readers: int = 8,
        dtype: Any = None,
        shape: Any = None,
        schema: str = "",
        times: bool = False,
        ring_always: bool = False,
        exist_ok: bool = False,
    ) -> Value:
        """Create a value; the arguments and errors are those of `create_messages`."""
        text, most = type_and_limit(dtype, shape, schema, limit)
        return self._create(
            Value,
            name,
            text,
            exist_ok,
            overflow=records.OVERFLOW["overwrite"],
            options=options_of(times, ring_always),
            writers=1,
            readers=readers,
            slots=4,
            loans=2,
            views=4,
            limit=most,
        )

    def create_calls(
        self,
        name: str,
        *,
        limit: int | None = None,
        slots: int = 16,
        callers: int = 8,
        servers: int = 4,
        dtype: Any = None,
        shape: Any = None,
        schema: str = "",
        exist_ok: bool = False,
    ) -> Calls:
        """Create a channel of calls; the errors are those of `create_messages`.

        Args:
            limit: bytes of the longest request, and of the longest reply.
            slots: how many calls of each caller can be under way; rounded up to a power of two.
            callers, servers: how many of each there can be at once, at most 64.
            name, dtype, shape, schema, exist_ok: as in `create_messages`; requests and replies have
                the same type.
        """
        text, most = type_and_limit(dtype, shape, schema, limit)
        return self._create(
            Calls,
            name,
            text,
            exist_ok,
            overflow=0,
            options=0,
            writers=callers,
            readers=servers,
            slots=power("slots", slots),
            loans=2,
            views=1,
            limit=most,
        )

    def create_bytes(
        self,
        name: str,
        *,
        buffer: int = 1 << 16,
        connections: int = 16,
        listeners: int = 1,
        schema: str = "",
        exist_ok: bool = False,
    ) -> Bytes:
        """Create a channel of bytes; the errors are those of `create_messages`.

        Args:
            buffer: bytes that each direction of a connection holds; rounded up to a power of two,
                64 or more.
            connections: how many there can be at once, at most 4096.
            listeners: how many processes can listen at once.
            name, schema, exist_ok: as in `create_messages`.
        """
        text, _ = type_and_limit(None, None, schema, 1)
        return self._create(
            Bytes,
            name,
            text,
            exist_ok,
            overflow=0,
            options=0,
            writers=connections,
            readers=listeners,
            slots=max(power("buffer", buffer), 64),
            loans=1,
            views=1,
            limit=1,
        )

    def _create(self, kind: type[_C], name: str, text: str, exist_ok: bool, **geometry: int) -> _C:
        check_name(name)
        check_numbers(kind.kind, geometry)
        geometry["kind"] = records.KINDS[kind.kind]
        patience = time.monotonic() + _PATIENCE
        while True:
            if exist_ok:
                try:
                    found = records.find(self._member, name)
                except NoSuchChannel:
                    pass
                else:
                    check_same(found, kind.kind, name, text, geometry)
                    return kind(self, self._member, found)
            try:
                made = records.create(self._member, name, geometry, text.encode())
                return kind(self, self._member, made)
            except ChannelExists:
                if not exist_ok or time.monotonic() > patience:
                    raise  # else another process was quicker

    # -- finding ----------------------------------------------------------------------------------

    def open(
        self,
        name: str,
        kind: str | None = None,
        *,
        dtype: Any = None,
        shape: Any = None,
        schema: str | None = None,
    ) -> Channel:
        """Open the channel of that name.

        Args:
            kind: "messages", "queue", "value", "calls" or "bytes"; None: whichever it is.
            dtype, shape, schema: of its messages, as in `create_messages`; None: whichever it is.

        Raises:
            NoSuchChannel: there is none; the message lists the names that are there.
            ChannelCorrupt: its record is spoiled.
            ChannelTypeError: it is of another kind or type; the message shows both.
        """
        try:
            found = records.find(self._member, name)
        except NoSuchChannel:
            names = sorted(facts["name"] for facts in records.listing(self._member))
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            there = (
                f"there: {', '.join(map(plain, names[:_SHOWN]))}{more}"
                if names
                else "there is none"
            )
            raise NoSuchChannel(f"no channel {name!r} ({there})") from None
        if kind is not None and found["kind"] != kind:
            raise ChannelTypeError(f"channel {name!r} is of kind {found['kind']}, not {kind}")
        if dtype is not None or schema is not None:
            wanted, _ = type_and_limit(dtype, shape, schema or "", MOST)
            if wanted != found["type"]:
                there = plain(found["type"])
                raise ChannelTypeError(
                    f"channel {name!r} has messages of type {there!r}, not {wanted!r}"
                )
        return KINDS[found["kind"]](self, self._member, found)

    def list(self) -> list[ChannelInfo]:
        """Return all channels of the region, by name."""
        found = [
            ChannelInfo(
                plain(facts["name"]),
                facts["kind"],
                plain(facts["type"]),
                facts["limit"],
                facts["slots"],
                facts["writers"],
                facts["readers"],
                facts["loans"] - 1,
                facts["views"],
                facts["overflow"],
                facts["times"],
                facts["bytes"],
                facts["created"],
                tuple(WriterInfo(*writer) for writer in facts["writing"]),
                tuple(ReaderInfo(*reader) for reader in facts["reading"]),
                facts["connections"],
                facts["unfinished"],
                facts["published"],
            )
            for facts in records.listing(self._member)
        ]
        return sorted(found, key=lambda info: info.name)

    def spoiled(self) -> tuple[SpoiledInfo, ...]:
        """Return the channels whose records another process has spoiled; `list` has the others.

        Ends that were open before continue. Nobody can open another one, or create a channel of
        that name, before `remove_spoiled`, or `remove` with `force`.
        """
        return tuple(
            SpoiledInfo(each["index"], plain(each["name"]), plain(each["maker"]))
            for each in records.spoiled(self._member)
        )

    def places(self) -> tuple[PlaceInfo, ...]:
        """Return the processes that use channels of the region."""
        return tuple(
            PlaceInfo(number, state, peer, vector, process, plain(name))
            for number, _, state, peer, vector, process, name in self._member.places()
        )

    def remove(self, name: str, *, force: bool = False) -> None:
        """Remove a channel; as Channel.remove. With `force` also one whose record is spoiled.

        Raises:
            ChannelCorrupt: its record is spoiled, and `force` is false.
        """
        try:
            found = self.open(name)
        except ChannelCorrupt:
            spoiled = [each for each in records.spoiled(self._member) if each["name"] == name]
            if not force or not spoiled:
                raise
            records.remove(self._member, spoiled[0], force)
        else:
            found.remove(force=force)

    def remove_spoiled(self, record: int) -> None:
        """Remove the channel of a spoiled record, by its number, and free its memory.

        It is not known which processes use it. Whatever one of them still stores into it may then
        reach another channel's memory: use it only if you know that none of them runs.

        Raises:
            NoSuchChannel: the record of that number is not spoiled.
        """
        for each in records.spoiled(self._member):
            if each["index"] == record:
                records.remove(self._member, each, True)
                return
        raise NoSuchChannel(f"record {record} is not that of a channel that is spoiled")

    def free_place(self, place: int) -> bool:
        """Free the place of a process, at your word that it will never store again.

        What it had is then used again; whatever it still stores can spoil messages of others.

        Returns:
            Whether the place had an owner.
        """
        return self._member.free_place(place)

    # -- the end ----------------------------------------------------------------------------------

    def close(self) -> None:
        """Close all ends that this object made, and leave. May be called twice, by any thread.

        Raises:
            BufferError: a View of a message is alive; everything else is closed.
        """
        if self._membership is None:
            return
        self._membership.close()
        if threading.current_thread() is not self._thread:
            self._thread.join(1.0)

    def __enter__(self) -> Channels:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self, _warn: Any = warnings.warn) -> None:
        if self._membership is not None and not self._membership.closed:
            _warn(f"unclosed {self!r}", ResourceWarning, source=self)
            self.close()

    def __repr__(self) -> str:
        state = ", closed" if self._membership is None or self._membership.closed else ""
        return f"<ivshmem.channel.Channels{state}>"


def open(  # noqa: A001 - as guest.open
    place: Endpoint | Region,
    *,
    vector: int = 0,
    mapping: Literal["write-back", "write-combining", "uncached"] | None = None,
    beat: float = BEAT,
    lease: float = LEASE,
    name: str | None = None,
) -> Channels:
    """Join the channels of a region.

    Args:
        place: an endpoint (a client, or a guest's device), or a region alone, which polls.
        vector: of the endpoint, at which other processes ring this one. The program may wait for
            the same vector.
        mapping: how this process maps the memory; None: as the endpoint shows.
        beat: seconds between two signs of life of this process.
        lease: seconds without one after which this process counts another as silent.
        name: of this process, for people; None: the program's.

    Raises:
        NoChannels: the region has no room for channels, or those of another version.
        ChannelError: every place is taken.
        ClosedError: the region is closed.
    """
    if not isinstance(place, Endpoint | Region):
        raise TypeError(f"channels are those of an endpoint or a region, not of {place!r}")
    if beat < _SHORTEST_BEAT or lease > _LONGEST_LEASE:
        raise ValueError(
            f"beat {beat:g} s, lease {lease:g} s: a beat of {_SHORTEST_BEAT:g} s or more, and a"
            f" lease of {_LONGEST_LEASE} s or less are possible"
        )
    if not beat < lease / 2:
        raise ValueError(f"a lease of {lease:g} s is too short for a beat every {beat:g} s")
    region = place.region if isinstance(place, Endpoint) else place
    if mapping is None:
        mapping = _mapping_of(place, region)
    elif mapping not in _MAPPINGS:
        raise ValueError(f"mapping {mapping!r}: one of {', '.join(_MAPPINGS)}")
    if name is None:
        name = os.path.basename(sys.argv[0] if sys.argv else "") or "python"
    area = find_area(region)
    if area is None:
        raise NoChannels(obstacle(region) or NO_AREA)
    return Channels._join(place, area.offset, vector, mapping, beat, lease, name)


def _mapping_of(
    place: Endpoint | Region, region: Region
) -> Literal["write-back", "write-combining", "uncached"]:
    """Return how the memory is mapped; where that is unknown, what is right for every mapping.

    A client of a guest's broker has the device's file of sysfs, and cannot tell which of the two.

    Raises:
        ClosedError: the region is closed.
    """
    of_device = region.source == "device" or file_system(region.fileno()) == "sysfs"
    way: str = getattr(place, "memory", "device" if of_device else "host")
    return _WAYS.get(way, "write-combining")
