"""`ivshmem qemu`: the arguments that give a guest the device."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys

from ..errors import RegionError, ServerGone
from ..memory.sizes import check_size, format_size, parse_size
from ..peer import inquiry
from ..qemu import cmdline, old_device
from ..service.limits import DEFAULT_SIZE
from ..text import plain
from .arguments import add_socket, checked, server_of, vectors

_SECONDS = 10.0  # for a server to answer


def add_to(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "qemu",
        description="Print the arguments that give a QEMU guest the device: ivshmem-doorbell,"
        " connected to a server (the default), or ivshmem-plain over a file.",
        epilog="Example: qemu-system-x86_64 $(ivshmem qemu) ...  If a path has a space, the shell"
        " splits it there: use `ivshmem qemu | xargs qemu-system-x86_64 ...` instead. The"
        " command asks the server for its number of vectors; QEMU's example server does"
        " not answer that: give --vectors.",
    )
    source = parser.add_mutually_exclusive_group()
    add_socket(source, "socket of the server, for ivshmem-doorbell")
    source.add_argument(
        "--config",
        metavar="FILE",
        help="configuration of the server: print devices for all its regions, or for those of"
        " --region",
    )
    source.add_argument(
        "-f", "--file", metavar="PATH", help="path of the memory's file, for ivshmem-plain"
    )
    source.add_argument("-M", "--name", help="the memory's POSIX name, for ivshmem-plain")
    source.add_argument(
        "--hugepages",
        nargs="?",
        const=True,
        metavar="SIZE",
        help="for ivshmem-plain: a file on the hugetlbfs mount with pages of the default size or of"
        " SIZE (2M, 1G)",
    )
    parser.add_argument(
        "--region", metavar="NAME", action="append", help="region of --config; may be repeated"
    )
    parser.add_argument(
        "-n",
        "--vectors",
        metavar="N",
        type=vectors,
        help="number of vectors, if the server does not tell it",
    )
    parser.add_argument(
        "-l",
        "--size",
        metavar="SIZE",
        help=f"size of the file, if it does not exist (default: {DEFAULT_SIZE}, or a huge page)",
    )
    parser.add_argument("--prealloc", action="store_true", help="QEMU allocates all pages at start")
    parser.add_argument(
        "--master", action="store_true", help="the memory migrates with this guest (master=on)"
    )
    parser.add_argument(
        "--id",
        metavar="ID",
        type=ident,
        help="id of the chardev or memory backend in QEMU (default: derived from the path, so it"
        " is unique for each region); needed for two devices of one region",
    )
    parser.add_argument(
        "--iommu",
        action="store_true",
        help="also print the arguments of a virtual IOMMU, which interrupts in the guest's user"
        " space need",
    )
    old = parser.add_argument_group("translate a command line of QEMU before 4.0")
    old.add_argument(
        "-device", metavar="ivshmem,...", help="the old device: ivshmem,shm=NAME,size=1, and so on"
    )
    old.add_argument(
        "-chardev",
        metavar="socket,...",
        action="append",
        default=[],
        help="the old device's chardev, if it had one",
    )
    parser.add_argument(
        "--slot",
        metavar="N",
        type=_slot,
        help="with --libvirt: slot on the guest's root PCI bus, 1 to 31 (default: 16 to 26,"
        " derived from the region's name; choose another one if libvirt says that it is in"
        " use)",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--libvirt", action="store_true", help="print XML for libvirt instead")
    form.add_argument("--json", action="store_true", help="print the arguments as a JSON list")
    form.add_argument(
        "--cloud-init",
        action="store_true",
        help="print user data for cloud-init instead: it mounts the image of `guest bundle` in the"
        " guest, and runs `guest setup`; with --iommu it also switches the IOMMU on, and reboots",
    )
    parser.add_argument(
        "--guest-user",
        metavar="USER",
        action="append",
        help="with --cloud-init: user in the guest who may use the device; may be repeated",
    )
    parser.add_argument(
        "--guest-peers",
        metavar="IDS",
        help="with --cloud-init: ids of peers that clients of the guest's `guest serve` can ring,"
        " for example 0,2,5-7",
    )
    parser.set_defaults(run=run)


def ident(text: str) -> str:
    """An id from the command line."""
    return checked(cmdline.check_ident, text)


def _slot(text: str) -> int:
    try:
        slot = int(text, 0)
    except ValueError:
        slot = 0
    if not 1 <= slot <= 31:
        raise argparse.ArgumentTypeError(f"not a slot: {text!r} (allowed are 1 to 31)")
    return slot


def run(options: argparse.Namespace) -> int:
    """Print what the options ask for."""
    if options.region and not options.config:
        raise ValueError("--region needs --config FILE")
    if options.chardev and options.device is None:
        raise ValueError("-chardev needs -device ivshmem,...")
    for option in ("guest_user", "guest_peers"):
        if getattr(options, option) and not options.cloud_init:
            raise ValueError(f"--{option.replace('_', '-')} needs --cloud-init")
    if options.cloud_init:
        return _cloud_init(options)
    if options.device is not None:
        arguments, xml = _old(options)
    elif options.config:
        arguments, xml = _configured(options)
    elif options.file or options.name or options.hugepages:
        arguments, xml = _plain(options)
    else:
        arguments, xml = _doorbell(options)
    if options.iommu:
        arguments = [*cmdline.iommu(), *arguments]
        xml = f"{cmdline.libvirt_iommu()}{xml}".replace("><", ">\n<")
    if options.libvirt:
        print(xml)
    elif options.json:
        print(json.dumps(arguments))
    else:
        print(line := cmdline.shell(arguments))
        if line.split() != arguments and not sys.stdout.isatty():
            # No quoting survives an unquoted $(..).
            note = "ivshmem: these words are quoted: paste them, or use `| xargs qemu-system-..`;"
            print(f"{note} the shell splits an unquoted $(..)", file=sys.stderr)
    return 0


def _cloud_init(options: argparse.Namespace) -> int:
    # Here: the other forms need nothing of a guest.
    from ..guest.setup_files import check_name
    from . import cloud_init
    from .guest import ids

    users = map(check_name, options.guest_user or ())
    words = [word for user in users for word in ("--user", user)]
    if options.guest_peers is not None:
        ids(options.guest_peers)
        words += ["--peers", options.guest_peers]
    print(cloud_init.user_data(words, iommu=options.iommu), end="")
    return 0


def _old(options: argparse.Namespace) -> tuple[list[str], str]:
    """What an old line is called today; on stderr, what it meant."""
    meant = old_device.read(options.device, options.chardev)
    what = f"memory of {format_size(meant.size)} in /dev/shm/{meant.name}, without doorbells"
    today = "ivshmem-plain"
    if meant.socket:
        what = f"the memory and doorbells of the server at {meant.socket}"
        today = "ivshmem-doorbell"
    print(
        plain(f"ivshmem: QEMU 4.0 removed the device ivshmem. This one had {what}: {today} today"),
        *(plain(f"ivshmem: {note}") for note in meant.notes),
        sep="\n",
        file=sys.stderr,
    )
    if meant.socket:
        return (
            cmdline.doorbell(meant.socket, meant.vectors, ident=options.id, master=meant.master),
            cmdline.libvirt_doorbell(
                meant.socket, meant.vectors, master=meant.master, slot=options.slot
            ),
        )
    # Here: a line for ivshmem-doorbell, the usual one, needs neither (test_imports.py).
    from ..memory import pages
    from ..memory.region import posix_path

    path = posix_path(meant.name)
    check_size(meant.size, pages.PAGE, what=path)
    return (
        cmdline.plain(path, meant.size, ident=options.id, master=meant.master),
        cmdline.libvirt_plain(
            os.path.basename(path), meant.size, master=meant.master, slot=options.slot
        ),
    )


def _doorbell(options: argparse.Namespace) -> tuple[list[str], str]:
    number = options.vectors
    path = os.path.abspath(server_of(options))
    if number is None:
        try:
            number = inquiry.ask(path, _SECONDS)["vectors"]
        except (ServerGone, KeyError):
            raise ServerGone(
                f"{path}: this server does not answer how many vectors it has: give --vectors N"
            ) from None
    return (
        cmdline.doorbell(path, number, ident=options.id, master=options.master),
        cmdline.libvirt_doorbell(path, number, master=options.master, slot=options.slot),
    )


def _configured(options: argparse.Namespace) -> tuple[list[str], str]:
    """Devices for regions of a file, in one guest if they are several."""
    if options.vectors is not None or options.size is not None:
        raise ValueError("--vectors and --size are not allowed with --config: set them in the file")
    from ..service import config_file  # here: only --config needs the parser of TOML

    config = config_file.load(options.config)
    names = options.region or list(config.regions)
    if options.id and len(names) > 1:
        raise ValueError("--id is for one device: choose one with --region NAME")
    if options.master and len(names) > 1:
        raise ValueError("--master is for one region of a guest: choose one with --region NAME")
    if options.slot is not None and len(names) > 1:
        raise ValueError("--slot is for one device: choose one with --region NAME")
    arguments, xml = [], []
    slots: list[int] = []
    for name in names:
        if name not in config.regions:
            raise config.error(f"no region {name}: the file has {', '.join(config.regions)}")
        region = config.regions[name]
        arguments += cmdline.doorbell(
            region.socket, region.vectors, ident=options.id, master=options.master
        )
        slots.append(options.slot or cmdline.slot_of(name, slots))
        xml.append(
            cmdline.libvirt_doorbell(
                region.socket, region.vectors, name=name, master=options.master, slot=slots[-1]
            )
        )
    return arguments, "\n".join(xml)


def _plain(options: argparse.Namespace) -> tuple[list[str], str]:
    # Here: a line for ivshmem-doorbell, the usual one, needs neither (test_imports.py).
    from ..memory import pages
    from ..memory.region import posix_path

    if options.name:
        path = posix_path(options.name)
    elif options.file:
        path = os.path.abspath(options.file)
    else:
        path = f"{_hugetlbfs_mount(options.hugepages)}/ivshmem"
    # A file of 0 bytes was made to be filled: its name and owner are there, its size is not.
    exists = os.path.isfile(path) and os.stat(path).st_size > 0
    if os.path.exists(path) and not os.path.isfile(path):
        raise RegionError(f"{path} is not a regular file: QEMU needs one, choose another path")
    page = pages.page_size_of(path if exists else os.path.dirname(path))
    if exists:
        size = os.stat(path).st_size
        if options.size is not None and parse_size(options.size) != size:
            raise RegionError(
                f"{path} has {format_size(size)}, not {format_size(parse_size(options.size))}:"
                " omit --size, or choose another file"
            )
    else:
        size = parse_size(options.size or max(parse_size(DEFAULT_SIZE), page))
    check_size(size, page, what=path)
    arguments = cmdline.plain(
        path, size, ident=options.id, master=options.master, prealloc=options.prealloc
    )
    if options.libvirt and os.path.dirname(path) != "/dev/shm":  # noqa: S108
        raise RegionError(
            f"libvirt takes only a POSIX name for plain memory, not {path}: use --name"
        )
    xml = cmdline.libvirt_plain(
        os.path.basename(path), size, master=options.master, slot=options.slot
    )
    return arguments, xml


def _hugetlbfs_mount(wanted: bool | str) -> str:
    """Where a hugetlbfs with pages of the wanted size is mounted."""
    from ..memory import pages  # here: as in `_plain`

    size = pages.huge_page_size(wanted)
    with open("/proc/self/mounts", errors="surrogateescape") as mounts:
        for line in mounts:
            _, written, kind, *_ = line.split()
            place = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), written)
            if kind == "hugetlbfs" and os.statvfs(place).f_bsize == size:
                return place
    raise RegionError(
        f"no hugetlbfs with pages of {format_size(size)} is mounted; run as root: mkdir -p"
        f" /dev/hugepages{size >> 20}M && mount -t hugetlbfs -o pagesize={size >> 20}M none"
        f" /dev/hugepages{size >> 20}M"
    )
