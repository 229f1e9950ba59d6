"""A cpio archive as the kernel unpacks it; its buffer-format.rst has the format.

Knows: the newc format.
Does not know: what is in the archive.
"""


class Newc:
    """An archive that is filled, then finished."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def folder(self, name: str) -> None:
        self._add(name, 0o040755, b"")

    def file(self, name: str, data: bytes, executable: bool = False) -> None:
        self._add(name, 0o100755 if executable else 0o100644, data)

    def link(self, name: str, target: str) -> None:
        self._add(name, 0o120777, target.encode())

    def finish(self) -> bytes:
        self._add("TRAILER!!!", 0, b"")
        return b"".join(self._parts)

    def _add(self, name: str, mode: int, data: bytes) -> None:
        path = name.encode() + b"\0"
        inode = len(self._parts) + 1
        # inode, mode, uid, gid, links, mtime, size, device (major, minor), special device (same),
        # the name's length, checksum
        fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(path), 0)
        head = b"070701" + b"".join(b"%08X" % field for field in fields) + path
        self._parts.append(_padded(head) + _padded(data))


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
