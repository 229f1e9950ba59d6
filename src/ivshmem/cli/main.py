"""The command line: `python -m ivshmem SUBCOMMAND`, installed as `ivshmem` too.

stdout is for results, stderr for messages. Exit status 0: done; 1: failed, and one line
on stderr says why and what to do; 2: wrong usage.
"""

from __future__ import annotations

import sys

from .. import __version__
from .run import Parser, guarded, parsed, ran_short

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

# What each subcommand is for, and the module that has it, which is imported only if it is called.
SUBCOMMANDS = {
    "serve": ("serve", "run the server that guests and clients connect to"),
    "connect": ("connect", "be a peer: ring, wait, read and write the memory"),
    "guest": (
        "guest",
        "inside a virtual machine: list devices, ring, wait, read the memory, share it",
    ),
    "channel": (
        "channel",
        "messages, queues, values, calls and bytes of a region: list, send, follow, measure,"
        " record, replay, remove",
    ),
    "forward": (
        "forward",
        "connect sockets on the host and in guests, without a network in the guest",
    ),
    "qemu": ("qemu", "print the QEMU arguments or libvirt XML for a guest"),
    "doctor": (
        "doctor",
        "check what sharing needs, on the host or in a guest, and print what fixes it",
    ),
    "status": ("status", "show a running server: regions, peers, stalled peers"),
    "top": ("top", "show a running server, live"),
    "trace": ("trace", "record which peer is rung, and when, for Perfetto and Chrome"),
    "evict": ("evict", "disconnect a peer from a running server"),
    "hold": ("hold", "hold back messages to a peer, to unplug its device safely"),
    "release": ("release", "end `hold`"),
    "reload": ("reload", "make a running server read its configuration again"),
    "save": ("save_load", "write a region's bytes to a file"),
    "load": ("save_load", "restore a region's bytes from a file"),
    "migrate": ("migrate", "migrate VMs together with the memory that they share"),
    "systemd": ("systemd", "install systemd units that run this installation, also in a venv"),
    "bench": ("bench", "measure doorbells and memory here, or the round trip to a peer"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    try:
        given = list(sys.argv[1:] if arguments is None else arguments)
        if given[:1] == ["--"]:
            del given[0]  # it says that a subcommand follows, which goes without saying
        options = parsed(_parser(given), given)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        return ran_short(error)
    return guarded(options.run, options)


def _parser(given: Sequence[str]) -> Parser:
    """The parser of a command line; of its subcommand alone, if it names one."""
    parser = Parser(
        prog="ivshmem",
        description="Shared memory and doorbells between virtual machines and host processes.",
        epilog="Begin with `ivshmem serve`: it prints the arguments for QEMU.",
    )
    parser.add_argument("-V", "--version", action="version", version=f"ivshmem {__version__}")
    words = [word for word in given if word != "help"]
    named = words[0] if words else None  # an option before it asks about the whole
    subparsers = parser.add_subparsers(metavar="SUBCOMMAND", required=named in SUBCOMMANDS)
    if named in SUBCOMMANDS:
        home = SUBCOMMANDS[named][0]
        module = __import__(f"{__package__}.{home}", fromlist=("add_to",))
        # The commands of channel are in several modules, of which one command needs one.
        module.add_to(subparsers, *([words[1:]] if named == "channel" else []))
    else:
        for name, (_, text) in SUBCOMMANDS.items():
            subparsers.add_parser(name, help=text)
    return parser
