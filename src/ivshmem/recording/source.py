"""Internal: an MCAP file that is replayed, anyone's.

Knows: files with an index, without one, and files that end in the middle. Does not know: channels
of a region.

A file with a complete index is read in the order of log_time. Any other one is read from its
beginning, in its own order, up to the first record that is not whole.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from mcap.exceptions import EndOfFile, InvalidMagic, McapError, UnsupportedCompressionError
from mcap.reader import SeekingReader
from mcap.records import Channel, Chunk, McapRecord, Message, Schema
from mcap.stream_reader import CRCValidationError, StreamReader, breakup_chunk

from ..system.uncopied import Uncopied
from .facts import Topic, topic_of

if TYPE_CHECKING:
    from mcap.summary import Summary

# What the library, and those that it decompresses with, raise if a file is damaged: there is no
# common class. (RuntimeError: of lz4. zstandard's own error is looked up when it is there.)
_DAMAGES: tuple[type[Exception], ...] = (
    *(McapError, EndOfFile, InvalidMagic, struct.error),
    *(ValueError, RuntimeError, KeyError, EOFError, MemoryError, OverflowError),
)
_UNREADABLE: dict[type[OSError], str] = {
    FileNotFoundError: "no such file: give the path of a recording",
    IsADirectoryError: "it is a directory: give a file in that directory",
}
_LARGEST = 1 << 32  # bytes of a record, a damaged length excepted


class Recorded(NamedTuple):
    """A message of a file: the number of its topic, its time in nanoseconds, and its bytes."""

    topic: int
    time: int
    data: bytes


class RecordedFile(Uncopied):
    """A file that is read; a context manager.

    Args:
        path: of the file.
        progress: called with the share of the file that the first pass has read.

    Attributes:
        topics: by number.
        start, end: log_time of the first and the last message, in nanoseconds; 0: there is none.
        messages: how many there are.
        damage: why the file is not read to its end; "": it is.
        indexed: it has a complete index.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not an MCAP file.
    """

    def __init__(self, path: str, progress: Callable[[float], object]) -> None:
        self.path = path
        self.topics: dict[int, Topic] = {}
        self.start = self.end = self.messages = 0
        self.damage = ""
        self._schemas: dict[int, Schema] = {}
        try:
            self._file = _Whole(open(path, "rb"))  # noqa: SIM115  (close() closes it)
        except (FileNotFoundError, IsADirectoryError) as error:
            raise OSError(error.errno, _UNREADABLE[type(error)], path) from None
        try:
            if not stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
                text = "it is not a regular file, in which one can go back: write it to one first"
                raise OSError(errno.ESPIPE, text, path)
            summary = self._summary()
            self.indexed = summary is not None
            if summary is None or not self._take(summary):
                self._scan(progress)
                if self.damage:
                    self.indexed = False  # topics and lengths behind the damage are not known
        except BaseException:
            self.close()
            raise

    def _summary(self) -> Summary | None:
        """The file's index, if it has one that is complete."""
        try:
            reader = SeekingReader(self._file, record_size_limit=_LARGEST)  # type: ignore[arg-type]
        except _DAMAGES:
            raise ValueError(f"{self.path}: not an MCAP file") from None
        try:
            summary = reader.get_summary()
        except Exception as error:
            if not _is_damage(error):
                raise
            return None
        if summary is None or summary.statistics is None or not summary.chunk_indexes:
            return None
        complete = summary.statistics.channel_count == len(summary.channels) and all(
            each.schema_id == 0 or each.schema_id in summary.schemas
            for each in summary.channels.values()
        )
        return summary if complete else None

    def _take(self, summary: Summary) -> bool:
        """Know the topics from the index; whether that is enough to know how long messages are."""
        assert summary.statistics is not None
        self._schemas = summary.schemas
        for channel in summary.channels.values():
            self._add(channel)
        self.start = summary.statistics.message_start_time
        self.end = summary.statistics.message_end_time
        self.messages = summary.statistics.message_count
        return all(topic.facts for topic in self.topics.values())

    def _add(self, channel: Channel) -> None:
        if channel.id not in self.topics:
            schema = self._schemas.get(channel.schema_id)
            words = None if schema is None else (schema.name, schema.encoding)
            self.topics[channel.id] = topic_of(channel.id, channel.topic, words, channel.metadata)

    def _scan(self, progress: Callable[[float], object]) -> None:
        """Read the file once, for its topics, and for the length of their messages."""
        size = os.fstat(self._file.fileno()).st_size or 1
        self.messages = 0
        times: list[int] = []
        for message in self._linear():
            topic = self.topics[message.topic]
            topic.longest, topic.used = max(topic.longest, len(message.data)), True
            times[:] = (
                [min(times[0], message.time), max(times[1], message.time)]
                if times
                else [message.time, message.time]
            )
            self.messages += 1
            progress(self._file.tell() / size)
        self.start, self.end = times or (0, 0)

    def _linear(self) -> Iterator[Recorded]:
        """All messages in the order of the file, up to a record that is not whole."""
        for record in self._whole_records():
            if isinstance(record, Schema):
                self._schemas[record.id] = record
            elif isinstance(record, Channel):
                self._add(record)
            elif isinstance(record, Message):
                if record.channel_id not in self.topics:
                    self.damage = (
                        f"a message of channel {record.channel_id}, which is not described"
                    )
                    return
                yield Recorded(record.channel_id, record.log_time, record.data)

    def _whole_records(self) -> Iterator[McapRecord]:
        self._file.seek(0)
        stream = StreamReader(
            self._file,  # type: ignore[arg-type]  # it is as much of a file as the library uses
            emit_chunks=True,
            record_size_limit=_LARGEST,
        )
        found = stream.records
        while True:
            try:
                record = next(found)
                inner = (
                    breakup_chunk(record, validate_crc=True)
                    if isinstance(record, Chunk)
                    else [record]
                )
            except StopIteration:
                return
            except Exception as error:
                if not _is_damage(error):
                    raise
                self._check_library(error)
                self.damage = (
                    "it ends in the middle"
                    if isinstance(error, EndOfFile)
                    else (f"it is damaged at byte {self._file.tell()}")
                )
                return
            yield from inner

    def read(self, since: int, until: int) -> Iterator[Recorded]:
        """Return the messages whose log_time is `since` or later, and not after `until`.

        Raises:
            ValueError: the file is damaged, and has an index, so that the rest is not known.
        """
        if not self.indexed:
            for message in self._linear():
                if since <= message.time <= until:
                    yield message
            return
        self._file.seek(0)
        reader = SeekingReader(self._file, validate_crcs=True, record_size_limit=_LARGEST)  # type: ignore[arg-type]
        found = reader.iter_messages(starting_at=since, ending_at=until)
        while True:
            try:
                _, channel, stored = next(found)
            except StopIteration:
                return
            except Exception as error:
                if not _is_damage(error):
                    raise
                self._check_library(error)
                raise ValueError(
                    f"{self.path}: damaged: {_reason(error)}: replay an undamaged copy, or the part"
                    " before the damage (--to)"
                ) from None
            yield Recorded(channel.id, stored.log_time, stored.data)

    def _check_library(self, error: Exception) -> None:
        """Raise ValueError if the file is compressed with what is not installed."""
        if isinstance(error, UnsupportedCompressionError):
            # The library has the name of a package in its text.
            package = "lz4" if "lz4" in str(error) else "zstandard"
            raise ValueError(f"{self.path}: it is compressed: pip install {package}") from None

    def close(self) -> None:
        """Close the file; may be called twice."""
        self._file.close()

    def __enter__(self) -> RecordedFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Whole:
    """A file whose `read` gives all bytes that are asked for, or raises EndOfFile.

    The library takes what a short read brings for the whole record. An offset that no file can have
    is past the end, too. Every OSError has the path.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.tell, self.fileno, self.close = file.tell, file.fileno, file.close

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        try:
            return self._file.seek(offset, whence)
        except (OverflowError, ValueError):  # more than 63 bits
            raise EndOfFile from None
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise EndOfFile from None
            raise OSError(error.errno, error.strerror, self._file.name) from None

    def read(self, size: int) -> bytes:
        try:
            data = self._file.read(size) if size <= _LARGEST else b""
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._file.name) from None
        if len(data) < size:
            raise EndOfFile
        return data

    def seekable(self) -> bool:
        return True


def _is_damage(error: Exception) -> bool:
    """Whether an exception of the library says that the file is damaged."""
    return isinstance(error, _DAMAGES) or type(error).__name__ == "ZstdError"


def _reason(error: Exception) -> str:
    """Say what is damaged, for a person: the library's words are for programmers, or missing."""
    if isinstance(error, EndOfFile):
        return "its index or a record leads past the end of the file"
    if isinstance(error, CRCValidationError):
        return "a checksum is wrong"
    return "its index or a record is not what the format allows"
