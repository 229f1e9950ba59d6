"""A read-only disk image (ISO 9660) with some files, for a guest to mount.

Knows: the parts of ECMA-119 that Linux reads. Does not know: what is in the files.

Programs such as xorriso make such images, and would have to be installed on each host. Names have
capital letters on the disk; Linux shows them in small ones, as its isofs does without extensions.
"""

from __future__ import annotations

import struct

SECTOR = 2048
_FIRST = 16  # the sectors before are not the file system's
_EPOCH = bytes(7)  # no date


def image(label: str, files: dict[str, bytes]) -> bytes:
    """The image of files in the root directory, or in one directory below it ("folder/name").

    Raises:
        ValueError: a name has capital letters or lies deeper.
    """
    folders: dict[str, dict[str, bytes]] = {"": {}}
    for path, data in files.items():
        folder, _, name = path.rpartition("/")
        if path != path.lower() or "/" in folder or len(name) > 120:
            raise ValueError(f"not a name for this image: {path}")
        folders.setdefault(folder, {})[name] = data
    names = sorted(folders)  # the root is the first
    tables = _FIRST + 2  # behind the two descriptors
    start = tables + 2  # the table of folders, in both orders of bytes
    places, content = {}, []
    for name in names:  # first the folders, whose sizes depend on nothing but names
        places[name] = (start, _size(folders[name], names if not name else ()))
        start += places[name][1] // SECTOR
    files_at = {}
    for name in names:
        for file, data in sorted(folders[name].items()):
            files_at[name, file] = start
            padded = data + bytes(-len(data) % SECTOR)
            content.append(padded)
            start += len(padded) // SECTOR
    directories = []
    for name in names:
        records = [
            _record(b"\0", *places[name], folder=True),
            _record(b"\1", *places[""], folder=True),
        ]
        entries = {
            file: _record(f"{file.upper()};1".encode(), files_at[name, file], len(data))
            for file, data in folders[name].items()
        }
        if not name:
            entries |= {
                below: _record(below.upper().encode(), *places[below], folder=True)
                for below in names[1:]
            }
        records += [entries[key] for key in sorted(entries)]
        directories.append(_sectors(records))
    table = [_folders(names, places, order) for order in "<>"]
    return b"".join(
        (
            bytes(_FIRST * SECTOR),
            _descriptor(label, start, len(_folders(names, places, "<")), tables, places[""]),
            b"\xffCD001\1".ljust(SECTOR, b"\0"),
            *(part.ljust(SECTOR, b"\0") for part in table),
            *directories,
            *content,
        )
    )


def _size(files: dict[str, bytes], below: object) -> int:
    names = [b"\0", b"\1", *(f"{name.upper()};1".encode() for name in files)]
    names += [name.encode() for name in below if name] if isinstance(below, list) else []
    return len(_sectors([_record(name, 0, 0) for name in names]))


def _sectors(records: list[bytes]) -> bytes:
    """Records one after the other, none of which crosses the end of a sector."""
    out = bytearray()
    for record in records:
        if len(out) % SECTOR + len(record) > SECTOR:
            out += bytes(-len(out) % SECTOR)
        out += record
    return bytes(out + bytes(-len(out) % SECTOR))


def _both(form: str, number: int) -> bytes:
    return struct.pack(f"<{form}", number) + struct.pack(f">{form}", number)


def _record(name: bytes, sector: int, size: int, folder: bool = False) -> bytes:
    rest = _both("I", sector) + _both("I", size) + _EPOCH + bytes((2 * folder, 0, 0))
    rest += _both("H", 1) + bytes((len(name),)) + name
    rest += bytes(1 - len(name) % 2)  # the length of a record is even
    return bytes((len(rest) + 2, 0)) + rest


def _folders(names: list[str], places: dict[str, tuple[int, int]], order: str) -> bytes:
    out = b""
    for name in names:
        written = name.upper().encode() or b"\0"
        out += struct.pack(f"{order}BBIH", len(written), 0, places[name][0], 1) + written
        out += bytes(len(written) % 2)
    return out


def _descriptor(label: str, sectors: int, table: int, at: int, root: tuple[int, int]) -> bytes:
    def text(value: str, length: int) -> bytes:
        return value.encode().ljust(length)

    date = b"0" * 16 + b"\0"
    return b"".join(
        (
            b"\1CD001\1\0",
            text("", 32),
            text(label, 32),
            bytes(8),
            _both("I", sectors),
            bytes(32),
            _both("H", 1),
            _both("H", 1),
            _both("H", SECTOR),
            _both("I", table),
            struct.pack("<II", at, 0),
            struct.pack(">II", at + 1, 0),
            _record(b"\0", *root, folder=True),
            text("", 128 * 4 + 37 * 3),
            date * 4,
            b"\1",
        )
    ).ljust(SECTOR, b"\0")
