"""The device `ivshmem` of QEMU before 4.0: what a command line with it meant, and what says it now.

Knows: its properties, which QEMU 2.6 split into ivshmem-plain and ivshmem-doorbell, and 4.0 removed
(QEMU's docs/about/removed-features). Does not know: servers, files, today's command lines.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..memory.sizes import parse_size
from ..system.named_tuple import NamedTuple

_DEFAULT_NAME, _DEFAULT_SIZE = "ivshmem", "4M"
_MIB = 1 << 20
_KNOWN = ("addr", "bus", "chardev", "id", "ioeventfd", "msi", "role", "shm", "size", "use64")
_KNOWN_TOO = ("vectors", "x-memdev", "memdev", "master", "multifunction")


class OldDevice(NamedTuple):
    """What an old command line meant.

    Attributes:
        name: of POSIX shared memory; "" if the device had a server.
        socket: the server's; "" if the device had memory by name.
        size: of the memory, bytes.
        vectors: that the device had.
        master: whether the memory migrates with the guest.
        notes: what became of the other properties, a sentence each.
    """

    name: str
    socket: str
    size: int
    vectors: int
    master: bool
    notes: tuple[str, ...]


def read(device: str, chardevs: Sequence[str] = ()) -> OldDevice:
    """Return what `-device DEVICE`, with `-chardev` for each of the others, meant.

    Raises:
        ValueError: it is not such a device, or a property has a value that it could not have.
    """
    driver, given = _options(device, "driver")
    if driver != "ivshmem":
        raise ValueError(
            f"-device {driver or device}: only the old device ivshmem is translated, as in"
            " `-device ivshmem,shm=NAME,size=4M`; ivshmem-plain and ivshmem-doorbell are the new"
            " devices"
        )
    if unknown := [key for key in given if key not in (*_KNOWN, *_KNOWN_TOO)]:
        raise ValueError(f"-device ivshmem: the old device had no property {unknown[0]}")
    name, chardev = given.get("shm", ""), given.get("chardev", "")
    notes = []
    if name and chardev:
        raise ValueError(
            "-device ivshmem: the old device had either shm= or chardev=: give one of them"
        )
    if not (name or chardev):
        name = _DEFAULT_NAME
        notes.append(f"neither shm= nor chardev= is given: the memory's name is {name}")
    if given.get("ioeventfd") == "off":
        notes.append("ioeventfd=off is omitted: doorbells always use ioeventfd")
    if given.get("use64") in ("0", "off"):
        notes.append("use64=0 is omitted: the memory's BAR has 64 bits now")
    if given.get("msi") == "off":
        notes.append("msi=off is omitted: ivshmem-doorbell has MSI-X, ivshmem-plain no interrupts")
    if name and "vectors" in given:
        notes.append("vectors is omitted: memory by name never had interrupts")
    notes += [
        f"{key}={given[key]} is omitted: add it to the new device"
        for key in ("addr", "bus", "id", "multifunction")
        if key in given
    ]
    return OldDevice(
        name.lstrip("/"),
        _socket(chardev, chardevs) if chardev else "",
        _size(given.get("size", _DEFAULT_SIZE)),
        _number(given.get("vectors", "1")),
        given.get("role") == "master" or given.get("master") == "on",
        tuple(notes),
    )


def _socket(ident: str, chardevs: Sequence[str]) -> str:
    for each in chardevs:
        kind, given = _options(each, "backend")
        if given.get("id") == ident and kind == "socket" and "path" in given:
            return given["path"]
    raise ValueError(
        f"-device ivshmem,chardev={ident}: the path of its server is in the chardev: also give"
        f" `-chardev socket,path=PATH,id={ident}`"
    )


def _size(text: str) -> int:
    """The old property counted MiB where it had no unit: `size=1` is 1 MiB, not 1 byte."""
    size = int(text) * _MIB if text.isascii() and text.isdigit() else parse_size(text)
    if size <= 0:
        raise ValueError(
            f"-device ivshmem,size={text}: not a size (allowed is more than 0, for example 4M)"
        )
    return size


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 5):
        raise ValueError(
            f"-device ivshmem,vectors={text}: not a number of vectors (allowed are 0 to 9999)"
        )
    return int(text)


def _options(text: str, implied: str) -> tuple[str, dict[str, str]]:
    """The first word, and the others by their keys. QEMU writes a comma in a value twice."""
    first = ""
    found: dict[str, str] = {}
    for number, part in enumerate(text.replace(",,", "\0").split(",")):
        key, equals, value = part.replace("\0", ",").partition("=")
        if number == 0 and not equals:
            first = key
        elif key == implied:
            first = value
        else:
            found[key] = value if equals else "on"
    return first, found
