"""`ivshmem guest`: the device inside a virtual machine, by hand, from a script, or for others."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator

from .. import guest
from ..errors import IvshmemError, NoInterrupts
from ..guest import pci
from ..memory.sizes import format_size, parse_size
from ..protocol.limits import MAX_ID
from ..text import counted, plain
from . import signals, terminal
from .arguments import checked, socket_path
from .shell import Shell
from .tables import table

_HEAD = ("ADDRESS", "SIZE", "VARIANT", "VECTORS", "DRIVER", "IOMMU GROUP")
_NOISE = 1.5  # between rates that may be the same


def add_to(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "guest",
        description="Use the ivshmem device of this virtual machine. If something does not work,"
        " `ivshmem doctor` finds what is missing.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, run, text in _COMMANDS:
        command = commands.add_parser(
            name,
            aliases=_ALIASES.get(name, ()),
            help=text,
            description=text[0].upper() + text[1:] + ".",
        )
        command.set_defaults(run=run)
        _ARGUMENTS[name](command)
        if name not in ("serve", "bundle", "setup"):
            command.add_argument("--json", action="store_true", help="print JSON")


def _add_nothing(parser: argparse.ArgumentParser) -> None:
    """All devices are meant, and none is opened."""


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-a",
        "--address",
        metavar="ADDRESS",
        help="the device's PCI address, see `guest list` (default: the only device)",
    )
    parser.add_argument(
        "--access",
        choices=("vfio", "noiommu", "uio", "sysfs"),
        help="how to open the device (default: the first of these that works here)",
    )
    parser.add_argument(
        "--memory",
        choices=("vfio", "uio", "resource2", "resource2_wc"),
        help="how to map the device's memory (`guest measure` compares these)",
    )


def _add_ring(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "peer", metavar="PEER", help="the peer's id, or its name in the directory of names"
    )
    parser.add_argument("vector", metavar="VECTOR", nargs="?", default="0", help="(default: 0)")
    _add_device(parser)


def _add_wait(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("vector", metavar="VECTOR", nargs="?", default="any", help="(default: any)")
    parser.add_argument("-t", "--timeout", metavar="SECONDS", help="(default: none)")
    _add_device(parser)


def _add_hexdump(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("start", metavar="OFFSET", nargs="?", default="0", help="(default: 0)")
    parser.add_argument("length", metavar="LENGTH", nargs="?", help="(default: 256)")
    parser.add_argument("--raw", action="store_true", help="write the raw bytes to stdout")
    _add_device(parser)


def _add_measure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "What another peer writes to the measured bytes during the measurement is lost."
    parser.add_argument("-a", "--address", metavar="ADDRESS", help="the device's PCI address")
    parser.add_argument("--offset", default="0", help="offset of the bytes to copy (default: 0)")
    parser.add_argument("--length", help="number of bytes to copy (default: 1M, or all)")


def _add_serve(parser: argparse.ArgumentParser) -> None:
    _add_device(parser)
    parser.add_argument(
        "-S",
        "--socket",
        metavar="PATH",
        type=socket_path,
        help="socket to listen on, for clients as on the host (default: as for `ivshmem serve`)",
    )
    parser.add_argument(
        "--peers",
        metavar="IDS",
        type=_ids,
        default=[],
        help="ids of peers that clients can ring, for example 0,2,5-7, besides those in the"
        " directory of names",
    )
    parser.add_argument(
        "-p", "--pid-file", metavar="PATH", help="file to lock and to write the pid to"
    )
    parser.add_argument("--daemon", action="store_true", help="go into the background when ready")
    parser.add_argument("-q", "--quiet", action="store_true", help="do not log joins and leaves")


def _add_bundle(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "The file fits a machine with this kind of processor, and each Python from 3.10 on if this"
        " package came as a wheel; otherwise the version of Python that this host has. In the"
        " guest: python3 ivshmem.pyz guest list"
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        default="ivshmem.pyz",
        help="the file: NAME.pyz (a program), NAME.tar, NAME.tar.xz, or NAME.iso (default:"
        " ivshmem.pyz)",
    )
    parser.add_argument(
        "--iso",
        action="store_true",
        help="make a read-only disk image, which the guest mounts, whatever the file is called",
    )


def _add_setup(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Each step is shown before it is made. A file that this command did not make is never"
        " replaced. The command can be repeated: it omits the steps that are made already."
    )
    parser.add_argument(
        "-a",
        "--address",
        metavar="ADDRESS",
        action="append",
        default=[],
        help="the device's PCI address, see `guest list`; may be repeated (default: all ivshmem"
        " devices, also those that are plugged in later)",
    )
    parser.add_argument(
        "-g",
        "--group",
        default="ivshmem",
        help="group that may use the device without root (default: ivshmem)",
    )
    parser.add_argument(
        "-u",
        "--user",
        metavar="USER",
        action="append",
        default=[],
        help="user to add to the group; may be repeated",
    )
    parser.add_argument(
        "--access",
        choices=("vfio", "noiommu", "uio", "sysfs"),
        help="how programs open the device (default: uio if a UIO driver has it, else vfio if there"
        " is an IOMMU, else sysfs, which has no interrupts; noiommu is unsafe, never the default)",
    )
    serve = parser.add_mutually_exclusive_group()
    serve.add_argument(
        "--peers",
        metavar="IDS",
        type=_ids_as_text,
        help="for `guest serve`: ids of peers that clients can ring, for example 0,2,5-7",
    )
    serve.add_argument(
        "--no-serve",
        action="store_true",
        help="no unit that shares the device between processes (`guest serve`)",
    )
    parser.add_argument(
        "--root",
        metavar="DIR",
        default="/",
        help="set up the system in DIR instead, as image builders do; nothing is started",
    )
    parser.add_argument("--undo", action="store_true", help="take all back")
    parser.add_argument(
        "-n", "--dry-run", action="store_true", help="show the steps, and make none"
    )
    parser.add_argument("-y", "--yes", action="store_true", help="make the steps without asking")


_ARGUMENTS = {
    "bundle": _add_bundle,
    "list": _add_nothing,
    "info": _add_device,
    "ring": _add_ring,
    "wait": _add_wait,
    "names": _add_device,
    "hexdump": _add_hexdump,
    "measure": _add_measure,
    "serve": _add_serve,
    "setup": _add_setup,
}


_ALIASES = {"hexdump": ("dump",)}


def ids(text: str) -> list[int]:
    """Return what ids and ranges of ids stand for.

    Raises:
        ValueError: the text has other things.
    """
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
            raise ValueError(f"{part!r} is neither an id nor a range (for example 5-7)")
        if int(last) > MAX_ID:
            raise ValueError(f"not an id: {last} (allowed are 0 to {MAX_ID})")
        found += range(int(first), int(last) + 1)
    return found


def _ids(text: str) -> list[int]:
    return checked(ids, text)


def _ids_as_text(text: str) -> str:
    _ids(text)
    return text


@contextlib.contextmanager
def opened(options: argparse.Namespace) -> Iterator[guest.GuestDevice]:
    """The device; it is given back also if a signal ends the block."""
    with (
        signals.held(),
        guest.open(options.address, access=options.access, memory=options.memory) as device,
        signals.raised(),
    ):
        yield device


# -- the commands ---------------------------------------------------------------------------------


def _list(options: argparse.Namespace) -> int:
    devices = guest.devices()
    if options.json:
        print(json.dumps([device._asdict() for device in devices]))
    elif devices:
        print(*table([_HEAD, *map(_row_of, devices)], columns=terminal.columns()), sep="\n")
    if not devices:
        print("ivshmem: no ivshmem device in this machine", file=sys.stderr)
    return 0 if devices else 1


def _row_of(device: guest.Device) -> list[str]:
    group = "-" if device.iommu_group is None else str(device.iommu_group)
    if device.noiommu_group is not None:
        group = f"no IOMMU (vfio's group {device.noiommu_group})"
    return [
        device.address,
        format_size(device.size),
        device.variant,
        "?" if device.vectors is None else str(device.vectors),
        device.driver or "-",
        group,
    ]


def _info(options: argparse.Namespace) -> int:
    with opened(options) as device:
        bits = pci.command(device.device)
        try:
            device.fileno()
            interrupts = counted(device.vectors, "vector")
        except NoInterrupts as error:
            interrupts = str(error)
        values = {
            **device.device._asdict(),
            "id": device.id,
            "access": device.access,
            "memory": device.memory,
            "interrupts": interrupts,
            "memory_decoding": bool(bits & pci.COMMAND_MEMORY),
            "bus_master": bool(bits & pci.COMMAND_MASTER),
        }
    if options.json:
        print(json.dumps(values))
    else:
        rows = [[key, "-" if value in (None, "") else str(value)] for key, value in values.items()]
        print(*table(rows), sep="\n")
    return 0


def _ring(options: argparse.Namespace) -> int:
    return _run(options, "ring", options.peer, options.vector)


def _wait(options: argparse.Namespace) -> int:
    words = [word for word in (options.vector, options.timeout) if word is not None]
    with opened(options) as device, Shell(device, json=options.json) as shell:
        if sys.stderr.isatty():
            # A ring that comes before the device is open is lost: tell when it is.
            what = "any vector" if options.vector == "any" else f"vector {options.vector}"
            print(plain(f"listening on {what}; Ctrl-C ends it"), file=sys.stderr, flush=True)
        shell.run("wait", words)
    return 0


def _names(options: argparse.Namespace) -> int:
    return _run(options, "names")


def _run(options: argparse.Namespace, command: str, *words: str | None) -> int:
    """Run a command of the shell, with those words that are given."""
    with opened(options) as device, Shell(device, json=options.json) as shell:
        shell.run(command, [word for word in words if word is not None])
    return 0


def _hexdump(options: argparse.Namespace) -> int:
    if not options.raw:
        return _run(options, "hexdump", options.start, options.length)
    with opened(options) as device:
        start = parse_size(options.start)
        size = parse_size(options.length) if options.length else device.region.size - start
        if size < 0 or start + size > device.region.size:
            raise IvshmemError(f"outside the region: it ends at {device.region.size:#x}")
        with memoryview(device.region) as memory:
            sys.stdout.buffer.write(memory[start : start + size])
    return 0


def _measure(options: argparse.Namespace) -> int:
    speeds = guest.measure(
        options.address,
        offset=parse_size(options.offset),
        length=parse_size(options.length) if options.length else None,
    )
    if options.json:
        print(json.dumps([speed._asdict() for speed in speeds]))
        return 0
    print(*table(map(_speed_row, speeds)), sep="\n")
    if all(speed.error for speed in speeds):
        print("no way to map the memory works here: see `ivshmem doctor`")
        return 1
    for what in ("read", "write"):
        rates = {getattr(speed, what): speed.memory for speed in speeds if not speed.error}
        if max(rates) > _NOISE * min(rates):
            print(f"fastest to {what}: {rates[max(rates)]}")
        else:
            print(f"equally fast to {what}, within measurement noise")
    return 0


def _speed_row(speed: guest.Speed) -> list[str]:
    if speed.error:
        return [speed.memory, speed.error]
    read, write = (f"{rate / 1e6:8.0f} MB/s" for rate in (speed.read, speed.write))
    return [speed.memory, f"read {read}   write {write}"]


def _serve(options: argparse.Namespace) -> int:
    from . import guest_serve  # here: the other commands serve nothing

    return guest_serve.run(options)


def _bundle(options: argparse.Namespace) -> int:
    from . import guest_bundle as bundle  # here: the other commands pack nothing

    form = "iso" if options.iso else bundle.form_of(options.output)
    size = bundle.write(options.output, form)
    only = bundle.fits()
    print(
        f"wrote {options.output}: {-(-size // 1024)} KiB, for {os.uname().machine} and Python"
        f" {only or '3.10 or newer'}"
    )
    for line in _IN_GUEST[form]:
        print(f"  {line.format(name=os.path.basename(options.output))}")
    return 0


def _setup(options: argparse.Namespace) -> int:
    from . import guest_setup  # here: the other commands set nothing up

    return guest_setup.run(options)


# What a user types in the guest, then.
_IN_GUEST = {
    "pyz": ("in the guest: python3 {name} guest list",),
    **dict.fromkeys(
        ("tar", "tar.xz"),
        ("in the guest: tar -xf {name} && python3 ivshmem/ivshmem.pyz guest list",),
    ),
    "iso": (
        "for QEMU: -drive file={name},if=virtio,readonly=on,format=raw",
        "in the guest: mount -o ro LABEL=IVSHMEM /mnt && python3 /mnt/ivshmem.pyz guest list",
    ),
}


_COMMANDS = (
    ("bundle", _bundle, "pack this package into one file, on the host, for guests without it"),
    ("list", _list, "list the ivshmem devices of this machine"),
    ("info", _info, "show a device: its id, how it is opened, its interrupts"),
    ("ring", _ring, "interrupt a vector of a peer"),
    ("wait", _wait, "wait for an interrupt; exit status 1 after the time limit"),
    ("names", _names, "list the names that peers have published in the region's directory"),
    ("hexdump", _hexdump, "print bytes of the memory, as `hexdump -C`"),
    (
        "measure",
        _measure,
        "compare the ways to map the memory: which one reads fastest, which one writes fastest",
    ),
    ("serve", _serve, "share the device with other processes in this guest"),
    (
        "setup",
        _setup,
        "arrange what survives a reboot: the driver, a group that may use the device, a unit for"
        " `guest serve`",
    ),
)
