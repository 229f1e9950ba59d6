"""Internal: records channels into a file.

Knows: which channels are recorded, when the file is flushed, what was lost. Does not know: what a
channel's facts are in MCAP (facts.py), how the writers of a channel are not slowed
(channel/watching.py).

A thread for each channel reads it into a buffer, and one thread writes the buffer to the file. When
the disk is slower than the channels, the buffer fills, the reading threads wait, and the channels
overwrite what was not read: that is counted as lost. No writer waits.

Invariant: each chunk in the file is complete, and a second's messages are in it after another one
(FLUSH): a reader that needs no index finds them after SIGKILL and on a full disk.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from ..channel import records
from ..channel.kinds import Channel, Messages, Value
from ..channel.watching import Seen, Watcher
from ..errors import ChannelError, ChannelTypeError, ClosedError, IvshmemError
from ..system.sink import Sink
from ..system.uncopied import Uncopied
from ..text import plain
from . import facts
from .buffer import Buffer
from .library import BUFFER

if TYPE_CHECKING:
    from ..channel import Channels

# Larger chunks compress better, and smaller ones lose less if the process is killed. An index takes
# about 100 bytes of each chunk.
CHUNK = 1 << 20  # bytes after which a chunk ends; a longer message has one of its own
FLUSH = 1.0  # seconds after which a chunk ends that is not full
_LOOK = 0.1  # seconds after which a thread looks whether it is to end
_SEQUENCES = 1 << 32


class _Item(NamedTuple):
    track: _Track
    seen: Seen
    when: int  # it was read, in nanoseconds since 1970


class _Track:
    """One channel that is recorded, and its thread.

    Args:
        found: the channel, and `watcher`, its reader.
        buffer: where messages go.
    """

    def __init__(self, found: Messages | Value, watcher: Watcher, buffer: Buffer[_Item]) -> None:
        self.found = found
        self.number: int | None = None  # in the file
        self.error: IvshmemError | None = None
        self.watcher = watcher
        self._buffer = buffer
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"records {found.name}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._ended.is_set():
                self._pass_on(_LOOK)
            # What was published before is recorded, too, as far as the channel keeps it.
            left = self.found.slots * self.found._facts["writers"]
            while left and self._pass_on(0):
                left -= 1
        except IvshmemError as error:
            self.error = error

    def _pass_on(self, timeout: float) -> bool:
        """Take one message; whether one came."""
        seen = self.watcher.take(timeout)
        if seen is None:
            return False
        if not self._buffer.put(_Item(self, seen, time.time_ns()), seen.size):
            self.watcher.lost += 1
        return True

    def stop(self) -> None:
        """Let the thread end soon."""
        self._ended.set()

    def end(self) -> None:
        """Stop the thread, and free the reader's slot."""
        self.stop()
        self._thread.join()
        self.watcher.close()


class Recorder(Uncopied):
    """Records until `close`; a context manager.

    Args:
        channels: of the region.
        path: of the new file.
        names: of channels; empty: all channels of messages and values, also those that are created
            later.
        compression: none, lz4 or zstd.
        chunk, flush, buffer: as CHUNK, FLUSH and BUFFER.
        replace: write over a file that is there.
        tell: called with a line when a channel cannot be recorded.

    Raises:
        NoSuchChannel, ChannelTypeError: a name cannot be recorded.
        OSError: the file cannot be written.
    """

    def __init__(
        self,
        channels: Channels,
        path: str,
        names: Iterable[str] = (),
        *,
        compression: str = "none",
        chunk: int = CHUNK,
        flush: float = FLUSH,
        buffer: int = BUFFER,
        replace: bool = False,
        tell: Callable[[str], object],
    ) -> None:
        from mcap.writer import CompressionType, Writer  # an extra

        self._channels = channels
        self._names = tuple(dict.fromkeys(names))
        self._flush = flush
        self._tell = tell
        self._tracks: dict[tuple[str, float], _Track] = {}
        self._refused: set[tuple[str, float]] = set()
        self._over: list[_Track] = []
        self._buffer: Buffer[_Item] = Buffer(buffer)
        self.messages = self.bytes = 0  # which are in the file
        self._pending: list[int] = [0, 0]  # messages and bytes in the chunk that is not yet full
        self.error: OSError | None = None  # which ended the recording
        self.unwritten = 0  # messages that were read, and did not get into the file
        self._closed = False
        for name in self._names:
            self._check(channels.open(name))
        self._sink = Sink(path, replace=replace)
        try:
            self.look()  # before the first write: if a channel cannot be read, a file stays
            how = {"none": CompressionType.NONE, "lz4": CompressionType.LZ4}
            self._writer: Any = Writer(  # its types are incomplete
                self._sink,  # type: ignore[arg-type]  # it is as much of a file as the library uses
                chunk_size=chunk,
                compression=how.get(compression, CompressionType.ZSTD),
            )
            self._writer.start(library="ivshmem")
        except BaseException:
            self._stop_reading()
            self._sink.remove()
            raise
        self._thread = threading.Thread(target=self._write_all, name="writes", daemon=True)
        self._thread.start()

    @staticmethod
    def _check(found: Channel) -> Messages | Value:
        if isinstance(found, Messages | Value):
            return found
        raise ChannelTypeError(
            f"channel {found.name!r} is of kind {found.kind}: recorded can be those of kind"
            f" {' and '.join(facts.KINDS)}"
        )

    @property
    def lost(self) -> dict[str, int]:
        """How many messages were lost, by channel."""
        found: dict[str, int] = {}
        for track in (*self._over, *self._tracks.values()):
            found[track.found.name] = found.get(track.found.name, 0) + track.watcher.lost
        return found

    def look(self) -> None:
        """Begin with channels that are new, and end with those that were removed.

        Raises:
            ChannelTypeError, ChannelError: a channel that was named cannot be read.
        """
        there = {}
        for each in records.listing(self._channels._member):
            wanted = each["name"] in self._names if self._names else each["kind"] in facts.KINDS
            if wanted:
                there[each["name"], each["created"]] = each
        for key in [key for key in self._tracks if key not in there]:
            self._end(key)
        for key in there:
            if key not in self._tracks and key not in self._refused:
                self._begin(key)

    def _begin(self, key: tuple[str, float]) -> None:
        name = key[0]
        try:
            found = self._check(self._channels.open(name))
            found._type = None  # bytes, also of arrays, and without numpy
            # A value is a state: what it is now belongs to the recording.
            watcher = Watcher(found, history=int(isinstance(found, Value)))
        except ClosedError:
            return  # it was removed a moment ago
        except (ChannelError, IvshmemError) as error:
            if self._names:
                raise
            self._refused.add(key)
            self._tell(f"not recorded: {error}")
            return
        self._tracks[key] = _Track(found, watcher, self._buffer)

    def _end(self, key: tuple[str, float]) -> None:
        track = self._tracks.pop(key)
        track.end()
        self._over.append(track)

    # -- the thread that writes ---------------------------------------------------------------

    def _write_all(self) -> None:
        try:
            due = time.monotonic() + self._flush
            while not self._buffer.drained:
                item = self._buffer.get(min(self._flush, _LOOK))
                if item is not None:
                    self._write(item)
                if time.monotonic() >= due:
                    self._put(self._writer.flush)
                    due = time.monotonic() + self._flush
        except OSError as error:
            self.error = error
            self._buffer.end()

    def _write(self, item: _Item) -> None:
        track, seen, when = item
        if track.number is None:
            track.number = self._registered(track.found)
        published = when if seen.time is None else round(seen.time * 1e6) * 1000
        self._pending[0] += 1
        self._pending[1] += seen.size
        position = seen.position % _SEQUENCES
        self._put(
            partial(self._writer.add_message, track.number, when, seen.data, published, position)
        )

    def _put(self, write: Callable[[], object]) -> None:
        """Have the library write; and note what is in the file then.

        A chunk and its index are several calls of Sink.write. If one for the index fails, the chunk
        is in the file.
        """
        before = self._sink.offset
        try:
            write()
        finally:
            if self._sink.offset != before:
                self.messages += self._pending[0]
                self.bytes += self._pending[1]
                self._pending = [0, 0]

    def _registered(self, found: Messages | Value) -> int:
        schema = facts.schema_of(found._facts["type"])
        number = 0
        if schema.name:
            number = self._writer.register_schema(schema.name, schema.encoding, schema.data)
        metadata = facts.metadata_of(found._facts)
        return int(
            self._writer.register_channel(plain(found.name), schema.encoding, number, metadata)
        )

    # -- the end --------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop reading, write what was read, and finish the file; may be called twice.

        Raises:
            OSError: the file could not be written to its end. What is in it can be read.
        """
        if self._closed:
            return
        self._closed = True
        self._stop_reading()
        self._buffer.end()
        self._thread.join()
        try:
            if self.error is None:
                self._finish()
        except OSError as error:
            self.error = error
        finally:
            self.unwritten = self._pending[0] + self._buffer.clear()
            self._sink.close()
        if self.error is not None:
            raise self.error

    def _finish(self) -> None:
        self._put(self._writer.flush)
        lost = self.lost
        said = {"lost": str(sum(lost.values())), "messages": str(self.messages)}
        said.update({f"lost of {plain(name)}": str(count) for name, count in lost.items()})
        self._writer.add_metadata("ivshmem.recording", said)
        self._writer.finish()

    def _stop_reading(self) -> None:
        for track in self._tracks.values():
            track.stop()
        for key in list(self._tracks):
            self._end(key)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
