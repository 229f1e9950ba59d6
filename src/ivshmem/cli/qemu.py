"""`ivshmem qemu`: the arguments that give a guest the device."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from .. import configfile, pages, qemu, sockets
from ..config import DEFAULT_SIZE
from ..errors import RegionError, ServerGone
from ..region import posix_path
from ..sizes import check_size, format_size, parse_size
from .arguments import OF_THE_SERVER, server_of, vectors

_SECONDS = 10.0  # for a server to answer


def add_to(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "qemu",
        help="print the arguments for a guest",
        description="Print the arguments that give a QEMU guest the device: ivshmem-doorbell,"
        " connected to a server (the default), or ivshmem-plain over a file.",
        epilog="Example: qemu-system-x86_64 $(ivshmem qemu) ...  The number of vectors is asked"
        " of the server; one of another kind cannot be asked: give --vectors then.",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "-S",
        "--socket",
        metavar="PATH",
        help=f"of the server, for ivshmem-doorbell ({OF_THE_SERVER})",
    )
    source.add_argument(
        "--config",
        metavar="FILE",
        help="of the server, for the regions in it: all of them in one guest, or --region",
    )
    source.add_argument("-f", "--file", metavar="PATH", help="the memory, for ivshmem-plain")
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
        "--region", metavar="NAME", action="append", help="of --config; may be repeated"
    )
    parser.add_argument("-n", "--vectors", metavar="N", type=vectors, help="of the server")
    parser.add_argument(
        "-l",
        "--size",
        metavar="SIZE",
        help=f"of the file, where it does not exist yet (default: {DEFAULT_SIZE}, or a huge page)",
    )
    parser.add_argument("--prealloc", action="store_true", help="QEMU takes all pages at start")
    parser.add_argument(
        "--master", action="store_true", help="the memory migrates with this guest (master=on)"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--libvirt", action="store_true", help="print XML for libvirt instead")
    form.add_argument("--json", action="store_true", help="print the arguments as a JSON list")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print what the options ask for."""
    if options.region and not options.config:
        raise ValueError("--region is one of a file: give --config FILE, too")
    if options.config:
        arguments, xml = _configured(options)
    elif options.file or options.name or options.hugepages:
        arguments, xml = _plain(options)
    else:
        arguments, xml = _doorbell(options)
    if options.libvirt:
        print(xml)
    else:
        print(json.dumps(arguments) if options.json else qemu.shell(arguments))
    return 0


def _doorbell(options: argparse.Namespace) -> tuple[list[str], str]:
    number = options.vectors
    path = os.path.abspath(server_of(options))
    if number is None:
        try:
            number = sockets.ask(path, _SECONDS)["vectors"]
        except (ServerGone, KeyError):
            raise ServerGone(
                f"{path}: this server does not say how many vectors it has: give --vectors"
            ) from None
    return (
        qemu.doorbell(path, number, master=options.master),
        qemu.libvirt_doorbell(path, number, master=options.master),
    )


def _configured(options: argparse.Namespace) -> tuple[list[str], str]:
    """Devices for regions of a file, in one guest if they are several."""
    if options.vectors is not None or options.size is not None:
        raise ValueError("--vectors and --size: with --config, the file says that")
    config = configfile.load(options.config)
    names = options.region or list(config.regions)
    if options.master and len(names) > 1:
        raise ValueError("a guest can be master of one region: give --region NAME, too")
    arguments, xml = [], []
    for name in names:
        if name not in config.regions:
            raise config.error(f"no region {name}: there are {', '.join(config.regions)}")
        region = config.regions[name]
        ident = f"ivshmem-{name}"  # QEMU's must begin with a letter
        arguments += qemu.doorbell(
            region.socket, region.vectors, ident=ident, master=options.master
        )
        xml.append(
            qemu.libvirt_doorbell(region.socket, region.vectors, name=name, master=options.master)
        )
    return arguments, "\n".join(xml)


def _plain(options: argparse.Namespace) -> tuple[list[str], str]:
    if options.name:
        path = posix_path(options.name)
    elif options.file:
        path = os.path.abspath(options.file)
    else:
        path = f"{_hugetlbfs_mount(options.hugepages)}/ivshmem"
    exists = os.path.isfile(path)
    page = pages.page_size_of(path if exists else os.path.dirname(path))
    if exists:
        size = os.stat(path).st_size
        if options.size is not None and parse_size(options.size) != size:
            raise RegionError(
                f"{path} has {format_size(size)}, not {format_size(parse_size(options.size))}:"
                " leave --size away, or choose another file"
            )
    else:
        size = parse_size(options.size or max(parse_size(DEFAULT_SIZE), page))
    check_size(size, page, what=path)
    arguments = qemu.plain(path, size, master=options.master, prealloc=options.prealloc)
    if options.libvirt and os.path.dirname(path) != "/dev/shm":  # noqa: S108
        raise RegionError(
            f"libvirt takes only a POSIX name for plain memory, not {path}: use --name"
        )
    return arguments, qemu.libvirt_plain(os.path.basename(path), size, master=options.master)


def _hugetlbfs_mount(wanted: bool | str) -> str:
    """Where a hugetlbfs with pages of the wanted size is mounted."""
    size = pages.huge_page_size(wanted)
    for line in Path("/proc/self/mounts").read_text(errors="surrogateescape").splitlines():
        _, place, kind, *_ = line.split()
        if kind == "hugetlbfs" and os.statvfs(place).f_bsize == size:
            return place
    raise RegionError(
        f"no hugetlbfs with pages of {format_size(size)} is mounted; as root:"
        f" mkdir -p /dev/hugepages{size >> 20}M &&"
        f" mount -t hugetlbfs -o pagesize={size >> 20}M none /dev/hugepages{size >> 20}M"
    )
