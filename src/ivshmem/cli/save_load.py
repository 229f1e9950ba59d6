"""`ivshmem save` and `ivshmem load`: a region's bytes in a file."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
import time
from collections.abc import Callable, Iterator

from ..memory import image, raw_image
from ..memory.blocks import ImageInfo
from ..memory.region import Region
from ..memory.sizes import format_size
from ..peer.client import connect
from ..text import plain
from . import signals
from .arguments import add_accept_owner, add_socket, seconds, server_of
from .progress import ProgressBar


def add_to(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    save = subparsers.add_parser(
        "save",
        description="Write a region's bytes to a file, which is replaced only when the new one is"
        " whole; only its owner can read it. Pages of zeros take no space. What peers"
        " write during the save may or may not be included: stop them first if that"
        " matters.",
    )
    _add_place(save)
    form = save.add_mutually_exclusive_group()
    form.add_argument("--compress", action="store_true", help="compress with zlib")
    form.add_argument(
        "--raw",
        action="store_true",
        help="write the raw bytes to a sparse file, which dd, hexdump and QEMU's"
        f" memory-backend-file can read; checksums go to FILE{raw_image.SUFFIX}",
    )
    save.set_defaults(run=run_save)
    load = subparsers.add_parser(
        "load",
        description="Check a file that `ivshmem save` wrote, up to its end, and then restore the"
        " region from it. If the file is damaged, the region does not change.",
    )
    _add_place(load)
    load.add_argument("--check", action="store_true", help="only check the file")
    load.add_argument(
        "--raw",
        action="store_true",
        help="the file was saved with --raw, or is any file of the region's size; it is checked if"
        f" FILE{raw_image.SUFFIX} is there",
    )
    load.set_defaults(run=run_load)


def _add_place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="FILE", type=_file)
    place = parser.add_mutually_exclusive_group()
    add_socket(place, "socket of the region's server")
    place.add_argument("-M", "--name", help="the region's POSIX name, without a server")
    place.add_argument("-f", "--file", metavar="PATH", help="the region's file, without a server")
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=10.0,
        metavar="SECONDS",
        help="time limit for the server to answer (default: %(default)s)",
    )
    add_accept_owner(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="show no progress")


def _file(text: str) -> str:
    if text in ("", "-"):
        raise argparse.ArgumentTypeError(
            "not a file: a pipe cannot be replaced as a whole or read twice: give the path of a"
            " file"
        )
    return text


@contextlib.contextmanager
def _region(options: argparse.Namespace, *, readonly: bool) -> Iterator[Region]:
    """The region that the options name."""
    if options.name is None and options.file is None:
        with connect(server_of(options), timeout=options.timeout, readonly=readonly) as client:
            yield client.region
    else:
        with Region.attach(
            name=options.name,
            path=options.file,
            readonly=readonly,
            accept_owner=options.accept_owner or (),
        ) as region:
            yield region


@contextlib.contextmanager
def _with_progress(options: argparse.Namespace, what: str) -> Iterator[Callable[[int, int], None]]:
    """Shows progress, and lets signals end the work between two steps of it."""
    quiet = options.quiet or not sys.stderr.isatty()
    with (
        ProgressBar(sys.stderr, quiet=quiet) as progress,
        signals.held(),
        signals.raised_at_steps() as step,
    ):

        def show(done: int, total: int) -> None:
            step()
            progress.show(done / max(total, 1), what)

        yield show


def run_save(options: argparse.Namespace) -> int:
    """Save a region."""
    with _region(options, readonly=True) as region, _with_progress(options, "saving") as show:
        info = image.save(
            region,
            options.path,
            compress=options.compress,
            raw=options.raw,
            progress=show,
            accept_owner=options.accept_owner or (),
        )
    _print(options.path, info)
    return 0


def run_load(options: argparse.Namespace) -> int:
    """Load a region, or only check what would be loaded."""
    accept = options.accept_owner or ()
    _find(options.path)
    if options.check:
        with _with_progress(options, "checking") as show:
            info = image.check_image(
                options.path, raw=options.raw, progress=show, accept_owner=accept
            )
        _print(options.path, info, "; the file is intact, and nothing was loaded")
    else:
        with _region(options, readonly=False) as region, _with_progress(options, "loading") as show:
            info = image.load(
                region, options.path, raw=options.raw, progress=show, accept_owner=accept
            )
        _print(options.path, info)
    return 0


def _find(path: str) -> None:
    """Refuse a file that is not there, and say what makes one."""
    if not os.path.lexists(path):
        raise FileNotFoundError(
            errno.ENOENT,
            "no such file: `ivshmem save FILE` writes one, or choose another path",
            path,
        )


def _print(path: str, info: ImageInfo, more: str = "") -> None:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(info.saved))
    where = f"{info.source} {info.name}" if info.name else info.source
    about = f"{format_size(info.size)} ({where}), saved {when}, id {info.id}"
    if not info.id:
        about = f"{format_size(info.size)}, not checked: {path}{raw_image.SUFFIX} is not there"
    print(plain(f"{path}: {about}{more}"))
