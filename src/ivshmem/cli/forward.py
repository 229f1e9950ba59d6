"""`ivshmem forward`: sockets on one side of a region joined with sockets on the other."""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import time
from collections.abc import Sequence
from typing import Any

from .. import channel
from ..channel.geometry import check_name
from ..errors import ChannelError
from ..forward import addresses
from ..forward.config import (
    BUFFER,
    CONNECTIONS,
    MOST_CONNECTIONS,
    SILENCE,
    ForwardConfig,
    check_addresses,
    check_buffer,
    problems,
)
from ..forward.forwarder import Forwarder
from ..forward.listening import Sockets
from ..memory.sizes import format_size, parse_size
from ..peer.endpoint import Endpoint
from ..system.systemd import Notifier
from ..system.uncopied import Uncopied
from ..text import counted
from . import daemon, endpoints, signals
from .arguments import checked, mode, number_from, seconds
from .log_writer import LogWriter
from .run import Parser

_NAME = "ivshmem forward"  # of this process in the table of places
_SHORTEST = 0.5  # seconds from one Forwarder to the next
_OF_ONE = ("connect", "listen", "stdio", "mode", "connections", "buffer")


def add_to(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "forward",
        usage="ivshmem forward [OPTIONS] NAME (--connect ADDRESS | --listen ADDRESS | --stdio)"
        " [NAME ...]",
        description="Connect sockets on one side of a region with sockets on the other, without a"
        " network. One side listens, and the other one connects for each connection that comes.",
        epilog=f"ADDRESS is {addresses.FORMS}. Examples: in a guest `ivshmem forward --guest ssh"
        " --connect tcp:127.0.0.1:22`, and on its host `ivshmem forward ssh --listen"
        " tcp:127.0.0.1:2222`; or `ssh -o ProxyCommand='ivshmem forward ssh --stdio' root@guest`.",
    )
    _add_all(parser)
    parser.add_argument("words", metavar="NAME", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.set_defaults(run=_run)


def _add_all(parser: argparse.ArgumentParser) -> None:
    one = parser.add_argument_group("each forward, after its NAME (which is that of its channel)")
    one.add_argument(
        "--connect",
        metavar="ADDRESS",
        type=_address,
        help="connect there for each connection that comes through the channel. A name is looked"
        " up once, at the start",
    )
    one.add_argument(
        "--listen",
        metavar="ADDRESS",
        type=_address,
        help="accept connections there, and connect each through the channel",
    )
    one.add_argument(
        "--stdio",
        action="store_true",
        default=None,
        help="connect standard input and output through the channel, once",
    )
    one.add_argument(
        "--mode", type=mode, help="permissions of the listening Unix socket, such as 0660"
    )
    one.add_argument(
        "--connections",
        metavar="N",
        type=_connections,
        help=f"at once, if this command makes the channel (default: {CONNECTIONS})",
    )
    one.add_argument(
        "--buffer",
        metavar="SIZE",
        type=_buffer,
        help="that each connection holds in each direction, if this command makes the channel"
        f" (default: {format_size(BUFFER)})",
    )
    endpoints.add_to(parser)
    parser.add_argument("--config", metavar="FILE", help="the forwards, in TOML")
    parser.add_argument(
        "--silence",
        metavar="SECONDS",
        type=_silence,
        help="reset connections whose other side has shown no sign of life for so long (default:"
        f" {SILENCE:g}); a virtual machine that is paused shows none",
    )
    parser.add_argument(
        "-v", "--verbose", action="store_true", default=None, help="log each connection"
    )


def _address(text: str) -> addresses.Address:
    return checked(addresses.parse, text)


def _silence(text: str) -> float:
    number = seconds(text)
    if number < 0.1:  # it is looked for four times in this time: the loop would do nothing else
        raise argparse.ArgumentTypeError(f"{text}: allowed are 0.1 seconds or more")
    return number


def _connections(text: str) -> int:
    return number_from(text, 1, MOST_CONNECTIONS, " connections")


def _buffer(text: str) -> int:
    return checked(lambda text: check_buffer(parse_size(text)), text)


# -- several forwards on one line -----------------------------------------------------------------


def _groups(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Divide the words at each name: (name, its options)."""
    found: list[tuple[str, list[str]]] = []
    takes_value = False
    for word in words:
        if takes_value or (word[:1] == "-" and word != "-" and found):
            found[-1][1].append(word)
            action = parser._option_string_actions.get(word)
            takes_value = not takes_value and action is not None and action.nargs != 0
        else:
            found.append((word, []))
    return found


def _configs(options: argparse.Namespace) -> tuple[list[ForwardConfig], list[str]]:
    """The forwards of the command line or the file, and the names that --stdio belongs to.

    Options of the whole command, which may stand after a name too, are put into `options`.
    """
    parser = Parser(prog="ivshmem forward", add_help=False)
    _add_all(parser)
    words = [word for word in options.words if word != "--"]
    given = {key: getattr(options, key) for key in _OF_ONE}
    configs: list[ForwardConfig] = []
    stdio: list[str] = []
    for name, rest in _groups(parser, words):
        one = vars(parser.parse_args(rest))
        for key in _OF_ONE:
            if one[key] is None:
                one[key] = given[key]  # it stood before the first name
        given = dict.fromkeys(_OF_ONE)
        for key in set(one) - set(_OF_ONE):
            if one[key]:
                setattr(options, key, one[key])
        check_name(name)
        if any(name == other.name for other in configs):
            raise ValueError(f"forward {name}: it is there twice: give each forward its own name")
        settings = {key: one[key] for key in _OF_ONE if key != "stdio"}
        configs.append(ForwardConfig(name, **settings))
        if one["stdio"]:
            stdio.append(name)
            wrong = [f"--{key}" for key in _OF_ONE if one[key] and key != "stdio"]
            if wrong:
                raise ValueError(f"forward {name}: --stdio excludes {' and '.join(wrong)}")
        elif found := problems(configs[-1]):
            raise ValueError(f"forward {name}: {found[0]}")
    if any(value for value in given.values()):
        raise ValueError("give the NAME of the forward that the options belong to")
    if stdio and len(configs) > 1:
        raise ValueError("--stdio is for one forward alone")
    if options.config is not None:
        if configs:
            raise ValueError("--config excludes forwards on the command line")
        from ..forward import config_file  # here: it needs the server's part

        configs = config_file.load(options.config)
    check_addresses(configs)
    if not configs:
        raise ValueError("give the NAME of a forward with --connect, --listen or --stdio")
    return configs, stdio


# -- running --------------------------------------------------------------------------------------


def _run(options: argparse.Namespace) -> int:
    configs, stdio = _configs(options)
    daemon.raise_fd_limit()
    level = logging.DEBUG if options.verbose else logging.WARNING if stdio else logging.INFO
    with (
        signals.held(for_good=not stdio),
        LogWriter(sys.stderr, level),
        contextlib.ExitStack() as place,
    ):
        endpoint: Endpoint = place.enter_context(endpoints.opened(options))
        if stdio:
            return _run_stdio(options, endpoint, stdio[0])
        with Sockets() as sockets, _ForwardService(len(configs)) as service:
            with signals.calling(service.stop):
                forwarder = None
                while True:
                    with (
                        channel.open(endpoint, name=_NAME) as channels,
                        _forwarder(
                            options, endpoint, channels, configs, sockets, forwarder
                        ) as forwarder,
                    ):
                        following = service.run(forwarder, endpoint)
                    if following is None:
                        break
                    if following is not endpoint:
                        place.close()
                        endpoint = place.enter_context(following)
    return 0


def _forwarder(options: argparse.Namespace, *what: Any) -> Forwarder:
    endpoint, channels, configs, sockets, former = what
    silence = SILENCE if options.silence is None else options.silence
    return Forwarder(endpoint, channels, configs, sockets, silence=silence, former=former)


def _run_stdio(options: argparse.Namespace, endpoint: Endpoint, name: str) -> int:
    with (
        Sockets() as sockets,
        channel.open(endpoint, name=_NAME) as channels,
        _forwarder(options, endpoint, channels, (), sockets, None) as forwarder,
    ):
        relay = forwarder.connect_stdio(name)
        with signals.calling(forwarder.stop):
            forwarder.run()
        if not relay.over:
            return 1  # who interrupts it knows; ssh does so, by SIGHUP, when a session is over
        if relay.failed:
            raise ChannelError(f"forward {name}: the connection ended early: {relay.failed}")
    return 0


class _ForwardService(Uncopied):
    """One Forwarder after the other, as a service manager sees them: that they begin, live and end.

    Args:
        number: of forwards.
    """

    def __init__(self, number: int) -> None:
        self._status = counted(number, "forward")
        self._notifier = Notifier.from_environment()
        self._forwarder: Forwarder | None = None
        self._is_ready = False
        self._stopping = False

    def run(self, forwarder: Forwarder, endpoint: Endpoint) -> Endpoint | None:
        """Run it until `stop` is called, or another one is to continue: at which endpoint.

        Args:
            endpoint: whose channels it uses.
        """
        began = time.monotonic()

        def live() -> None:
            self._notifier.watchdog()
            forwarder.turns.after((self._notifier.watchdog_seconds or 0) / 2, live)

        if self._notifier.watchdog_seconds:
            live()
        if not self._is_ready:
            self._is_ready = True
            self._notifier.ready(self._status)
        self._forwarder = forwarder
        try:
            if not self._stopping:
                forwarder.run()
        finally:
            self._forwarder = None
        following = forwarder.next
        if self._stopping or following is None:
            self._notifier.stopping()
            if following is not None and following is not endpoint:
                following.close()
            return None
        time.sleep(max(began + _SHORTEST - time.monotonic(), 0))  # whoever is to blame for it
        return following

    def stop(self) -> None:
        """End; called by a signal handler."""
        self._stopping = True
        if self._forwarder is not None:
            self._forwarder.stop()

    def __enter__(self) -> _ForwardService:
        return self

    def __exit__(self, *error: object) -> None:
        self._notifier.close()
