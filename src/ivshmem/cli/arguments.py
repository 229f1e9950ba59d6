"""Options that describe a region, and what their values mean.

Knows: names, defaults and forms of options. Does not know: what is done with a region.
"""

from __future__ import annotations

import argparse
import os

from ..peer import default_paths
from ..peer.limits import LEAST_AREA, MAX_SLOTS
from ..protocol.limits import MAX_VECTORS
from ..service.limits import DEFAULT_SIZE, EXISTING

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    from ..service.config import RegionConfig

    _T = TypeVar("_T")

# The help of commands that need a server. default_paths.py says where they look for it.
OF_THE_SERVER = "default: the running server of this user, or else root's"
DEFAULT_PID_FILE = "/var/run/ivshmem-server.pid"


def add_region(parser: argparse.ArgumentParser) -> None:
    """The options of a region; those that are not given are not in the result.

    Their names in the result are those of RegionConfig.
    """
    general = parser.add_argument_group("a region", argument_default=argparse.SUPPRESS)
    general.add_argument(
        "-S",
        "--socket",
        metavar="PATH",
        type=socket_path,
        help=f"the socket to listen on (default: {default_paths.OF_ROOT} for root, for others"
        f" {default_paths.NAME} in XDG_RUNTIME_DIR)",
    )
    general.add_argument(
        "-l", "--size", metavar="SIZE", help=f"size of the memory (default: {DEFAULT_SIZE})"
    )
    general.add_argument(
        "-n",
        "--vectors",
        metavar="N",
        type=vectors,
        help=f"number of interrupt vectors of each peer, 0 to {MAX_VECTORS} (default: 1)",
    )
    _add_memory(parser)
    _add_access(parser)
    _add_unplugging(parser)


def _add_memory(parser: argparse.ArgumentParser) -> None:
    memory = parser.add_argument_group(
        "where the memory comes from", argument_default=argparse.SUPPRESS
    )
    place = memory.add_mutually_exclusive_group()
    place.add_argument(
        "-M",
        "--name",
        help="POSIX shared memory name, in /dev/shm; removed at the end if this server created it",
    )
    place.add_argument(
        "-f", "--file", metavar="PATH", help="path of a file, as QEMU's mem-path; it is kept"
    )
    place.add_argument(
        "-m",
        "--directory",
        metavar="DIR",
        help="create an unlinked file in the directory DIR, for instance a hugetlbfs mount (DIR"
        " without a slash that is not a directory is a POSIX name)",
    )
    memory.add_argument(
        "--hugepages",
        nargs="?",
        const=True,
        metavar="SIZE",
        help="use huge pages, of the default size or of SIZE (2M, 1G)",
    )
    memory.add_argument(
        "--prealloc", action="store_const", const=True, help="allocate all pages at start"
    )
    memory.add_argument(
        "--existing",
        choices=EXISTING,
        help="what to do if the name or file exists: use it as it is (default), grow it if it is"
        " too short (names only), refuse it, or replace it by a new one; `require` refuses"
        " to create one",
    )
    memory.add_argument(
        "--readonly",
        action="store_const",
        const=True,
        help="attach read-only: no peer can write (clients accept such memory, QEMU refuses it)",
    )
    add_accept_owner(memory)
    memory.add_argument(
        "--keep",
        action="store_const",
        const=True,
        help="keep the name at the end even if this server created it",
    )
    memory.add_argument(
        "--names",
        nargs="?",
        const=0,
        metavar="SLOTS",
        type=slots,
        help="reserve a directory of names at the end of the memory, where peers publish their"
        " names, with SLOTS slots (default: 63 if there is space)",
    )
    memory.add_argument(
        "--channels",
        metavar="SIZE",
        type=area_size,
        help="set SIZE of the memory aside for channels (16K or more, for instance 64M), before a"
        " directory of names",
    )


def add_accept_owner(parser: argparse._ActionsContainer) -> None:
    """The option that accepts another user's memory."""
    parser.add_argument(
        "--accept-owner",
        metavar="USER",
        action="append",
        help="also accept a name, a file or a symbolic link that USER owns. Any user can create a"
        " name in /dev/shm first, so by default only root's and this user's are accepted"
        " (may be repeated)",
    )


def _add_access(parser: argparse.ArgumentParser) -> None:
    access = parser.add_argument_group("who may connect", argument_default=argparse.SUPPRESS)
    access.add_argument(
        "--mode", metavar="OCTAL", type=mode, help="permissions of the socket, for instance 0660"
    )
    access.add_argument("--owner", metavar="USER", help="user who is to own the socket")
    access.add_argument("--group", metavar="GROUP", help="group that is to own the socket")
    for option, text in (
        ("--allow", "admit only these clients: uid:USER, gid:GROUP, process:PROGRAM, root or all"),
        ("--deny", "refuse these clients, even if another rule allows them"),
        ("--readonly-for", "give these clients read-only memory"),
    ):
        access.add_argument(
            option, metavar="RULE", action="append", help=f"{text}; may be repeated"
        )
    access.add_argument(
        "--peers-per-uid", metavar="N", type=positive, help="maximum number of peers of one user"
    )
    access.add_argument(
        "--joins-per-minute",
        metavar="N",
        type=positive,
        help="maximum number of joins of one user in a minute",
    )


def _add_unplugging(parser: argparse.ArgumentParser) -> None:
    told = parser.add_argument_group("what QEMU is told", argument_default=argparse.SUPPRESS)
    told.add_argument(
        "--hold-leaves",
        action="store_const",
        const=True,
        help="never send leave messages to QEMU, which can crash when a device that received one"
        " is unplugged. QEMU then keeps the eventfds of each peer that left",
    )


def region_settings(options: argparse.Namespace) -> dict[str, Any]:
    """What the command line says of a region, by RegionConfig's names."""
    # Here, as in `region_of`: a supervisor only reads its options, and stays small.
    from ..service.config import RegionConfig

    return {key: value for key, value in vars(options).items() if key in RegionConfig._fields}


def region_of(options: argparse.Namespace, socket: str | None = None) -> RegionConfig:
    """The region that the options describe; `socket`: where it is if they do not say."""
    # Here, so that a process that only reads its options imports nothing of what serves.
    from ..service.config import RegionConfig
    from ..system.sockets import check_path

    settings: dict[str, Any] = {"socket": socket, **region_settings(options)}
    settings["socket"] = os.path.abspath(
        check_path(settings["socket"] or default_paths.default_socket())
    )
    if "file" in settings:
        settings["file"] = os.path.abspath(settings["file"])
    if is_name(settings.get("directory")):
        settings["name"] = settings.pop("directory")
    lists = {key: tuple(value) for key, value in settings.items() if isinstance(value, list)}
    return RegionConfig(**settings | lists)


def server_of(options: argparse.Namespace) -> str:
    """The path of the server that the options name, or of the one that runs here.

    Raises:
        FileNotFoundError: none was named, and none was found; the message says where it looked.
    """
    return options.socket if options.socket is not None else default_paths.find_socket()


def check_no_region(options: argparse.Namespace) -> None:
    """Refuse what a file has to say of each region.

    Raises:
        ValueError: it names the options.
    """
    if given := region_settings(options):
        names = ", ".join(f"--{key.replace('_', '-')}" for key in given)
        raise ValueError(
            f"{names}: not allowed with --config: set this for each region in the file"
        )


def is_name(directory: str | None) -> bool:
    """Whether -m, which takes a directory, was given a POSIX name, as in QEMU's manual."""
    return directory is not None and "/" not in directory and not os.path.isdir(directory)


def add_socket(parser: argparse._ActionsContainer, what: str = "socket of the server") -> None:
    """Add the option of a command that needs a server."""
    parser.add_argument(
        "-S", "--socket", metavar="PATH", type=socket_path, help=f"{what} ({OF_THE_SERVER})"
    )


def add_interval(parser: argparse.ArgumentParser) -> None:
    """Add the option of commands that look again and again."""
    parser.add_argument(
        "-i",
        "--interval",
        metavar="SECONDS",
        type=interval,
        default=1.0,
        help="time between two looks, 0.1 to 3600 (default: %(default)g)",
    )


# -- values ---------------------------------------------------------------------------------------


def checked(check: Callable[[str], _T], text: str) -> _T:
    """What a check makes of a word of the command line; its ValueError is what is said."""
    try:
        return check(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def socket_path(text: str) -> str:
    """A socket's path from the command line."""
    if not text:
        raise argparse.ArgumentTypeError("a socket needs a path")
    return text


def vectors(text: str) -> int:
    """A number of vectors from the command line."""
    return number_from(text, 0, MAX_VECTORS, " vectors")


def slots(text: str) -> int:
    """A number of slots for names from the command line."""
    return number_from(text, 1, MAX_SLOTS, " slots")


def area_size(text: str) -> int:
    """The size of an area for channels from the command line."""
    # Here: few command lines have one.
    from ..memory.sizes import format_size, parse_size

    size = checked(parse_size, text)
    if size < LEAST_AREA:
        raise argparse.ArgumentTypeError(
            f"{format_size(size)} for channels: at least {format_size(LEAST_AREA)}"
        )
    return size


def positive(text: str) -> int:
    """A number from 1 on from the command line."""
    return number_from(text, 1, 1 << 31)


def mode(text: str) -> int:
    """Permissions from the command line."""
    try:
        number = int(text, 8)
    except ValueError:
        number = -1
    if not 0 <= number <= 0o777:
        raise argparse.ArgumentTypeError(
            f"not octal permissions: {text} (allowed are 0 to 777, for example 0660)"
        )
    return number


def seconds(text: str) -> float:
    """A time limit from the command line; `inf` is none."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not number >= 0:  # NaN is neither
        raise argparse.ArgumentTypeError(
            f"not a time: {text} (allowed are 0 seconds or more, for example 2.5)"
        )
    return number


def number_from(text: str, least: int, most: int, what: str = "") -> int:
    """A number within limits from the command line, and what it counts."""
    try:
        number = int(text, 0)
    except ValueError:
        number = least - 1
    if not least <= number <= most:
        raise argparse.ArgumentTypeError(f"{text}{what}: allowed are {least} to {most}")
    return number


def interval(text: str) -> float:
    """Seconds from the command line."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"not a time: {text} (allowed are 0.1 to 3600 seconds)")
    return seconds
