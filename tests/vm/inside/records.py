"""A region filled with numbered, checksummed records, again and again, and what is found in it."""

import struct
import zlib
from collections.abc import Callable

SIZE = 4096
_NUMBER = struct.Struct("<Q")
_SUM = struct.Struct("<I")


def record(number: int) -> bytes:
    """The whole record: its number, bytes that follow from it, and a checksum of both."""
    body = _NUMBER.pack(number) * ((SIZE - _SUM.size) // _NUMBER.size)
    body += bytes(SIZE - _SUM.size - len(body))
    return body + _SUM.pack(zlib.crc32(body))


def write(memory: memoryview, stopped: Callable[[], object], number: int = 0) -> int:
    """Fills the memory slot by slot, round and round, from this number on until told.

    Returns how many are written in all: the number to go on with. Writes one at least.
    """
    slots = len(memory) // SIZE
    while True:
        at = number % slots * SIZE
        memory[at : at + SIZE] = record(number)
        number += 1
        if stopped():
            return number


def wrong(memory: memoryview, written: int) -> list[int]:
    """The slots that hold anything but the last record written there; empty if all is well."""
    slots = len(memory) // SIZE
    found = []
    for slot in range(slots):
        last = slot + (written - 1 - slot) // slots * slots
        expected = record(last) if last >= 0 else bytes(SIZE)
        if bytes(memory[slot * SIZE : slot * SIZE + SIZE]) != expected:
            found.append(slot)
    return found
