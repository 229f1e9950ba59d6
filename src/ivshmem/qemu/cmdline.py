"""Command lines for QEMU and XML for libvirt.

Knows: how their options are written. Does not know: servers, regions, whether anything runs.
Sources: qemu(1); libvirt's "Domain XML format", section on shared memory devices.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterable

from ..memory.sizes import format_size
from ..text import command
from ..text import plain as visible

_LONGEST_IDENT = 40

# Slots of the root bus that libvirt uses last, if ever, on both kinds of PC.
_SLOTS = range(0x10, 0x1B)


def doorbell(
    socket: str, vectors: int, *, ident: str | None = None, master: bool = False
) -> list[str]:
    """QEMU's arguments for a device that is connected to a server.

    Args:
        socket: path of the server's socket.
        vectors: the server's, 1..2048; the device needs one at least.
        ident: of the chardev; None: ident_of(socket). A second device for the same region in one
            guest needs another.
        master: the shared memory migrates with this guest, which must have id 0.
    """
    ident = ident or ident_of(socket)
    device = f"ivshmem-doorbell,vectors={max(vectors, 1)},chardev={ident}"
    return [
        "-chardev",
        f"socket,path={_escaped(socket)},id={ident}",
        "-device",
        device + (",master=on" if master else ""),
    ]


def plain(
    path: str,
    size: int,
    *,
    ident: str | None = None,
    master: bool = False,
    prealloc: bool = False,
) -> list[str]:
    """QEMU's arguments for a device over a file, without doorbells.

    Args:
        path: `mem-path`: a file in /dev/shm, on a hugetlbfs mount, or anywhere.
        size: of the file, bytes.
        ident: of the memory backend; None: ident_of(path).
        master: the shared memory migrates with this guest.
        prealloc: take all pages when QEMU starts.
    """
    ident = ident or ident_of(path)
    # share=on, or the guest silently gets memory of its own.
    backend = f"memory-backend-file,size={_qemu_size(size)},share=on,mem-path={_escaped(path)}"
    return [
        "-object",
        f"{backend}{',prealloc=on' if prealloc else ''},id={ident}",
        "-device",
        f"ivshmem-plain,memdev={ident}" + (",master=on" if master else ""),
    ]


def libvirt_doorbell(
    socket: str,
    vectors: int,
    *,
    name: str | None = None,
    master: bool = False,
    slot: int | None = None,
) -> str:
    """libvirt's XML for the same as `doorbell`.

    `slot`: on the guest's root bus; None: slot_of(name), by default that of the socket.
    """
    name = name or ident_of(socket)
    return (
        f"<shmem name={_attribute(name)}{_role(master)}>"
        "<model type='ivshmem-doorbell'/>"
        f"<server path={_attribute(socket)}/>"
        f"<msi vectors='{max(vectors, 1)}' ioeventfd='on'/>{_address(name, slot)}</shmem>"
    )


def libvirt_plain(name: str, size: int, *, master: bool = False, slot: int | None = None) -> str:
    """libvirt's XML for the same as `plain`; libvirt takes only a POSIX name, of at least 1 MiB."""
    return (
        f"<shmem name={_attribute(name)}{_role(master)}><model type='ivshmem-plain'/>"
        f"<size unit='KiB'>{size // 1024}</size>{_address(name, slot)}</shmem>"
    )


# What gives a guest interrupts in user space, by the machine: QEMU's arguments, and for libvirt
# what stands in <features> and in <devices>.
_IOMMUS = {
    "x86_64": (
        ["-machine", "q35,kernel-irqchip=split", "-device", "intel-iommu,intremap=on"],
        "<ioapic driver='qemu'/>",
        "<iommu model='intel'><driver intremap='on'/></iommu>",
    ),
    "aarch64": (
        ["-machine", "virt,gic-version=3,iommu=smmuv3"],
        "<gic version='3'/>",
        "<iommu model='smmuv3'/>",
    ),
}
_OTHER_IOMMU = (["-device", "virtio-iommu-pci"], "", "<iommu model='virtio'/>")


def iommu(machine: str = "") -> list[str]:
    """QEMU's arguments for a virtual IOMMU; `machine`: as uname(2) has it, the host's by default.

    They go before all devices.
    """
    return list(_IOMMUS.get(machine or os.uname().machine, _OTHER_IOMMU)[0])


def libvirt_iommu(machine: str = "") -> str:
    """libvirt's XML for the same, with what goes into <features> in front."""
    _, features, device = _IOMMUS.get(machine or os.uname().machine, _OTHER_IOMMU)
    return (
        f"<!-- in <features>: -->{features}<!-- in <devices>: -->{device}" if features else device
    )


def slot_of(name: str, taken: Iterable[int] = ()) -> int:
    """Return a slot of a guest's root bus, always the same for a name, that is not taken.

    Without an address libvirt places all of a guest's ivshmem devices on one bridge, where they
    share an IOMMU group: one process of the guest must then open all of them.
    """
    first: int = zlib.crc32(os.fsencode(name)) % len(_SLOTS)
    order = [*_SLOTS[first:], *_SLOTS[:first]]
    free: list[int] = [slot for slot in order if slot not in taken]
    return free[0] if free else order[0]


def _address(name: str, slot: int | None) -> str:
    slot = slot_of(name) if slot is None else slot
    return f"<address type='pci' domain='0' bus='0' slot='{slot:#04x}' function='0'/>"


def ident_of(path: str) -> str:
    """Return an id for a chardev or an object, of its own for each path.

    QEMU ends with "Duplicate ID" if two printed lines in one command have the same, and allows
    letters, digits, "-", "." and "_", a letter first.
    """
    plain_path = re.fullmatch(r"/[A-Za-z][A-Za-z0-9_./]*", path)
    readable = re.sub(r"[^A-Za-z0-9_.]+", "-", path).strip("-")
    if plain_path and len(readable) <= _LONGEST_IDENT:
        return readable
    # What looks the same by now, or is too long, is told apart by the whole path.
    return f"{_letter_first(readable[-_LONGEST_IDENT:])}-{zlib.crc32(os.fsencode(path)):08x}"


def check_ident(text: str) -> str:
    """Return an id as QEMU allows it.

    Raises:
        ValueError: it is not one.
    """
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_.-]*", text):
        raise ValueError(
            f"the id {visible(text)!r}: QEMU allows letters, digits, -, . and _, a letter first"
        )
    return text


def _letter_first(text: str) -> str:
    return text if text[:1].isalpha() else f"ivshmem{'' if text[:1] == '-' else '-'}{text}"


def shell(arguments: Iterable[str]) -> str:
    """Arguments as they are pasted into a shell."""
    return command(arguments)


def shell_lines(arguments: Iterable[str], indent: str = "") -> str:
    """Return the same, with each option and its value on a line, the next ones indented."""
    lines: list[list[str]] = []
    for argument in arguments:
        if argument.startswith("-") or not lines:
            lines.append([])
        lines[-1].append(argument)
    return f" \\\n{indent}".join(map(command, lines))


def _escaped(value: str) -> str:
    """QEMU's option parser wants a comma twice."""
    return value.replace(",", ",,")


# What xml.sax.saxutils has, too; that imports all of HTTP and TLS.
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;"}


def _attribute(value: str) -> str:
    """A value as XML has it, which a person can read, too."""
    parts = []
    for character in value:
        if visible(character) == character:
            parts.append(_ENTITIES.get(character, character))
        elif character in "\t\n\r" or "\x7f" <= character < "\ud800" or character > "\udfff":
            parts.append(f"&#x{ord(character):x};")
        else:
            raise ValueError(
                f"{visible(value)}: XML, and so libvirt, cannot have all characters of this name:"
                " choose a name of printable ones"
            )
    return f'"{"".join(parts)}"'


def _qemu_size(size: int) -> str:
    text = format_size(size)
    return str(size) if " " in text or "." in text else text


def _role(master: bool) -> str:
    return " role='master'" if master else ""
