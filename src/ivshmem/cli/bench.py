"""`ivshmem bench`: what doorbells and memory cost on this machine, or to a peer."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from functools import partial

from .. import guest
from ..bench import remote, suite
from ..bench.echo import NAME, Echo
from ..bench.noise import LIMIT
from ..bench.percentiles import PERCENTILES
from ..bench.result import Result, ResultGroup, disturbers, machine
from ..errors import DirectoryFull, IvshmemError, NameTaken, NoDirectory, NoSuchPeer, WorkerFailed
from ..peer.client import connect
from ..peer.directory import Directory
from ..peer.endpoint import Endpoint
from ..protocol.limits import MAX_VECTORS
from ..text import counted
from . import signals, tables, terminal
from .arguments import server_of, socket_path
from .progress import ProgressBar
from .shell import Shell

_COLUMNS = {name: PERCENTILES[name] for name in ("p50", "p99", "p99.9", "max")}
_NAME, _NUMBER, _RATIO = 32, 7, 6  # widths
_WIDTH = 79  # of lines where no terminal says how wide it is, and of longer text in any case
_NARROWEST = 20
# Left out on a narrow terminal, in this order.
_EXPENDABLE = ("max", "p99.9", "GB/s", "p99", "ratio")
_NAMED = 3  # of those who disturbed, at most
_SET_UP = 10.0  # seconds for a server to answer
_PATIENCE = 60.0  # seconds for the first answer of a peer


def add_to(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "bench",
        description="Measure what doorbells, copies and huge pages cost on this machine, each"
        " compared with what the system offers without this package. Needs no server,"
        " no guest and no root. With --peer, measure the round trip to a peer that"
        " runs `ivshmem bench --echo`.",
        epilog="Example: `ivshmem bench --echo` at one peer, `ivshmem bench --peer 0` at another.",
    )
    parser.add_argument(
        "--seconds",
        type=_positive,
        default=10.0,
        metavar="N",
        help="approximate duration of the measurement in seconds (default: %(default)g)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("-q", "--quiet", action="store_true", help="show no progress")
    other = parser.add_argument_group("with another peer")
    ends = other.add_mutually_exclusive_group()
    ends.add_argument(
        "--peer", metavar="PEER", help="ring this peer (its id, or its name in the directory)"
    )
    ends.add_argument(
        "--echo",
        metavar="PEER",
        nargs="?",
        const="",
        help="be the other end: answer PEER until Ctrl-C (default on a host: the peer that joined"
        " last; with a directory of names: the peer that measures)",
    )
    where = other.add_mutually_exclusive_group()
    where.add_argument(
        "-S",
        "--socket",
        metavar="PATH",
        type=socket_path,
        help="socket of the server (default: the running server; in a guest: its device instead)",
    )
    where.add_argument(
        "-a",
        "--address",
        metavar="ADDRESS",
        help="in a guest: the device's PCI address (default: the only device)",
    )
    other.add_argument(
        "--vector",
        type=_vector,
        metavar="N",
        help="vector to ring and to wait for, the same at both ends (default: 0)",
    )
    other.add_argument(
        "--timeout",
        type=_positive,
        metavar="SECONDS",
        help=f"time limit for the first answer (default: {_PATIENCE:g}); with --echo: end if no"
        " ring comes for so long (default: no limit)",
    )
    other.add_argument(
        "--rounds", type=_count, metavar="N", help="with --echo: end after N answers"
    )
    other.add_argument(
        "--spin", action="store_true", help='with --echo: spin before sleeping (spin="auto")'
    )
    parser.set_defaults(run=partial(_run, parser))


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"not a time: {text!r} (give seconds, for example 0.5)")
    return value


def _vector(text: str) -> int:
    if not (text.isdecimal() and int(text) < MAX_VECTORS):
        raise argparse.ArgumentTypeError(
            f"not a vector: {text!r} (allowed are 0 to {MAX_VECTORS - 1})"
        )
    return int(text)


def _count(text: str) -> int:
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"not a number of rounds: {text!r} (give 1 or more)")
    return int(text)


def _run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    if options.echo is None and (options.rounds or options.spin):
        parser.error("--rounds and --spin need --echo")
    alone = options.echo is None and options.peer is None
    theirs = (options.socket, options.address, options.vector, options.timeout)
    if alone and any(option is not None for option in theirs):
        parser.error(
            "these options need another peer: give --peer PEER to measure, or --echo to answer"
        )
    options.vector = options.vector or 0
    work = _here if alone else _ping if options.peer is not None else _echo
    try:
        return work(options)
    except WorkerFailed as error:
        raise IvshmemError(f"the measurement failed: {error}") from error


# -- this machine alone ----------------------------------------------------------------------------


def _here(options: argparse.Namespace) -> int:
    start = time.monotonic()
    with (
        signals.held(),
        signals.raised_at_steps() as step,
        ProgressBar(sys.stderr, quiet=options.quiet or options.json) as progress,
    ):

        def show(share: float, what: str) -> None:
            step()
            progress.show(share, what)

        groups = suite.run(options.seconds, show)
    _print(groups, time.monotonic() - start, as_json=options.json)
    return 0


# -- with a peer -----------------------------------------------------------------------------------


def _open(options: argparse.Namespace) -> Endpoint:
    """The device of this machine, if it has one, or a client of a server, as is asked for."""
    if options.address is not None or (options.socket is None and guest.devices()):
        return guest.open(options.address)
    # The echoing end writes nothing to the memory, so map it read-only.
    return connect(server_of(options), timeout=_SET_UP, readonly=options.echo is not None)


def _peer(endpoint: Endpoint, word: str) -> int:
    """An id from a number or a name."""
    with Shell(endpoint) as shell:
        peer, _ = shell.peer(word)
    if peer == endpoint.id:
        raise IvshmemError(f"peer {peer} is this end itself: give the id of the other end")
    return peer


def _ping(options: argparse.Namespace) -> int:
    start = time.monotonic()
    groups = []
    with signals.held(), _open(options) as endpoint:
        with signals.raised(), contextlib.ExitStack() as name:
            peer = _peer(endpoint, options.peer)
            waiting = partial(_ask_for_echo, endpoint, options, name)
            remote.knock(endpoint, peer, options.vector, options.timeout or _PATIENCE, waiting)
        with (
            signals.raised_at_steps() as step,
            ProgressBar(sys.stderr, quiet=options.quiet or options.json) as progress,
            contextlib.closing(
                remote.round_trips(endpoint, peer, options.vector, options.seconds)
            ) as measuring,
        ):
            title = f"round trip to peer {peer}"
            progress.show(0, title)
            for share, group in measuring:
                step()
                progress.show(share, title)
                groups = [group]
    _print(groups, time.monotonic() - start, as_json=options.json)
    if not options.json:
        print("The other end sleeps at once, unless it runs with --spin.")
    return 0


def _ask_for_echo(
    endpoint: Endpoint, options: argparse.Namespace, name: contextlib.ExitStack
) -> None:
    """Print what to start at the other end; and publish NAME, if there is a directory of names."""
    vector = f" --vector {options.vector}" if options.vector else ""
    command = f"ivshmem bench --echo {endpoint.id}{vector}"
    print(f"no answer yet; this is peer {endpoint.id}: start there: {command}", file=sys.stderr)
    with contextlib.suppress(NoDirectory):
        names = name.enter_context(Directory.open(endpoint))
        with contextlib.suppress(NameTaken, DirectoryFull):
            names.publish(NAME, vector_range=range(options.vector, options.vector + 1))


def _echo(options: argparse.Namespace) -> int:
    stopped: list[bool] = []

    def stop() -> None:
        if stopped:
            raise KeyboardInterrupt
        stopped.append(True)

    with (
        signals.held(),
        _open(options) as endpoint,
        signals.calling(stop),
    ):
        peer = _peer(endpoint, options.echo) if options.echo else None
        echo = Echo(endpoint, peer, options.vector, "auto" if options.spin else 0)
        if not options.quiet:
            _say_ready(endpoint, echo, options)
        _answer(echo, options, lambda: bool(stopped))
    return 0


def _say_ready(endpoint: Endpoint, echo: Echo, options: argparse.Namespace) -> None:
    vector = f" --vector {options.vector}" if options.vector else ""
    whom = f"waiting for peer {echo.peer}" if echo.peer is not None else "waiting for a peer"
    command = f"ivshmem bench --peer {endpoint.id}{vector}"
    print(f"this is peer {endpoint.id}, {whom}: start there: {command}", file=sys.stderr)


def _answer(echo: Echo, options: argparse.Namespace, stopped: Callable[[], bool]) -> None:
    """Answer until it is enough, and print for each peer how often."""
    left, limit = options.rounds, options.timeout
    answered, whom = 0, echo.peer
    since = time.monotonic()
    try:
        while left != 0 and not stopped():
            if limit is not None and time.monotonic() > since + limit:
                if not answered:
                    raise IvshmemError(
                        f"no ring on vector {options.vector} for {counted(limit, 'second')}"
                    )
                break
            done = echo.step(left)
            if done:
                since = time.monotonic()
                answered += done
                left = None if left is None else left - done
            if echo.peer != whom:
                _say_answered(whom, answered, as_json=options.json)
                answered, whom = 0, echo.peer
    except NoSuchPeer:
        if not answered:
            raise
    _say_answered(whom, answered, as_json=options.json)


def _say_answered(peer: int | None, answered: int, *, as_json: bool) -> None:
    if not answered:
        return
    if as_json:
        print(json.dumps({"peer": peer, "answered": answered}), flush=True)
    else:
        times = "" if answered == 1 else f" {answered} times"
        print(f"answered peer {peer}{times}", flush=True)


# -- results ---------------------------------------------------------------------------------------


def _print(groups: list[ResultGroup], seconds: float, *, as_json: bool) -> None:
    if as_json:
        values = {
            "machine": machine(),
            "seconds": round(seconds, 3),
            "groups": [group.summary() for group in groups],
            "disturbed_by": [
                {"who": who, "cores": round(share, 3)} for who, share in disturbers(groups)
            ],
        }
        print(json.dumps(values))
        return
    columns = terminal.columns() or _WIDTH
    bold = terminal.coloured()
    for line in _lines(groups, seconds, columns):
        print(line)
    for line in _wrapped(verdict(groups), columns):
        print(f"\033[1m{line}\033[0m" if bold else line)


def verdict(groups: list[ResultGroup]) -> str:
    """What was found, in one sentence."""
    results = [(*each, group) for group in groups for each in group.results]
    if not results:
        return "In short: nothing could be measured here."
    busy = " on this machine, which was busy" if any(r.spoilt for _, r, _ in results) else ""
    yardstick, result, group = next((each for each in results if each[0] is not None), results[0])
    sample = result.sample().summary()
    half = _three_digits(sample["p50"] / 1e3)
    if yardstick is None:
        most = _three_digits(sample["p99"] / 1e3)
        what = group.title if result.what not in group.title else result.what
        return (
            f"In short: a {what} takes {half} microseconds{busy}, and 99 of 100 take at most"
            f" {most}."
        )
    ratio = _three_digits(result.ratio(yardstick))
    return (
        f"In short: {result.what} takes {ratio} times as long as {yardstick.what}"
        f" ({half} microseconds, {group.title}){busy}."
    )


def _lines(groups: list[ResultGroup], seconds: float, columns: int = _WIDTH) -> Iterator[str]:
    values = machine()
    cores = counted(values["cores"], "core")
    yield from _wrapped(
        f"{values['processor']}, {cores}, Linux {values['kernel']}, Python {values['python']},"
        f" ivshmem {values['ivshmem']}, {seconds:.1f} s",
        columns,
    )
    for group in groups:
        yield ""
        yield from _table(group, columns)
    yield ""
    yield from _wrapped(
        "Times in microseconds. ratio: p50 divided by p50 of the line with ratio 1, the median of"
        " all rounds.",
        columns,
    )
    yield from _disturbances(groups, columns)


def _table(group: ResultGroup, columns: int) -> Iterator[str]:
    numbers = list(_COLUMNS)
    if any(yardstick for yardstick, _ in group.results):
        numbers.append("ratio")
    if any(result.size for _, result in group.results):
        numbers.append("GB/s")
    if group.results:
        at = {name: number for number, name in enumerate(numbers, 1)}
        yield from tables.table(
            [[group.title, *numbers], *(_row(*each, numbers) for each in group.results)],
            right=at.values(),
            columns=columns,
            expendable=[at[name] for name in _EXPENDABLE if name in at],
            widths={0: _NAME} | {at[name]: _width_of(name) for name in numbers},
            squeezed=0,
            gap=1,
        )
    else:
        yield tables.cut(group.title, max(columns, _NARROWEST))
    if group.note:
        yield from _wrapped(f"not measured: {group.note}", columns, "  ")


def _width_of(number: str) -> int:
    return _NUMBER if number in _COLUMNS else _RATIO


def _row(yardstick: Result | None, result: Result, numbers: list[str]) -> list[str]:
    sample = result.sample()
    summary = sample.summary()
    mark = "*" if result.spoilt else " "
    cells = {}
    for name, percent in _COLUMNS.items():
        known = name == "max" or round(len(sample) * (100 - percent), 6) >= 100
        cells[name] = _three_digits(summary[name] / 1e3) if known else "-"
    cells["ratio"] = "1" if yardstick is None else _three_digits(result.ratio(yardstick))
    cells["GB/s"] = _three_digits(result.size / max(summary["p50"], 1)) if result.size else ""
    return [f"{mark} {result.what}", *(cells[name] for name in numbers)]


def _three_digits(value: float) -> str:
    digits = 3 if value < 0.0995 else 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f}"


def _disturbances(groups: list[ResultGroup], columns: int = _WIDTH) -> Iterator[str]:
    noises = [noise for group in groups for noise in group.noises()]
    spoilt = sum(noise.spoilt for noise in noises)
    if not spoilt:
        return
    who = [
        f"{who.rstrip(',')} ({share:.0%} of a core)"
        for who, share in disturbers(groups)
        if share > LIMIT
    ]
    yield from _wrapped(
        f"This machine was busy: {spoilt} of {len(noises)} measurements were disturbed"
        + (f", by {', '.join(who[:_NAMED])}" if who else "")
        + ". They are omitted where undisturbed ones exist; * marks a line without any.",
        columns,
    )


def _wrapped(text: str, columns: int, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text,
        max(min(columns, _WIDTH), _NARROWEST),
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
