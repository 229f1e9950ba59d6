"""The commands of `ivshmem connect` and `ivshmem guest`.

Knows: words that a person types, and how results are shown. Does not know: terminals, sockets.
"""

from __future__ import annotations

import cmd
import json as json_module
import shlex
import struct
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from .._core import Interrupt
from ..errors import ClosedError, CommandError, IvshmemError, NoDirectory, RegionError
from ..memory.sizes import format_size, parse_size
from ..peer.client import Client
from ..peer.directory import Directory
from ..peer.endpoint import Disconnected, Endpoint, Event, IdChanged, PeerJoined, PeerLeft
from ..system.time_limits import left_until
from ..text import counted, plain
from .run import suggestion

_S = TypeVar("_S", bound="Shell")  # typing.Self comes with Python 3.11

_INTEGERS = {"u8": "<B", "u16": "<H", "u32": "<I", "u64": "<Q"}
_EXPECTED = {
    **{f"u{bits}": f"0 to {(1 << bits) - 1}" for bits in (8, 16, 32, 64)},
    "hex": "two hexadecimal digits for each byte, for example 00ff",
    "text": "characters that UTF-8 can hold",
}
_ROW = 16  # bytes in a row of a hex dump


class Shell(cmd.Cmd):
    """One endpoint, one line after the other; also its own help.

    A context manager: what was published is withdrawn at the end.
    """

    intro = "Type help for the commands, Ctrl-D to leave."
    doc_header = "Commands (help COMMAND tells more):"

    def __init__(self, endpoint: Endpoint, *, json: bool = False) -> None:
        super().__init__()
        self.endpoint = endpoint
        self.json = json
        self.prompt = f"ivshmem {endpoint.id}> "
        self._names: Directory | None = None

    def __enter__(self: _S) -> _S:
        return self

    def __exit__(self, *error: object) -> None:
        if self._names is not None:
            self._names.close()

    # -- running ----------------------------------------------------------------------------------

    def run_line(self, line: str) -> bool:
        """Run the commands of a line; True when one of them was to leave. Errors are raised."""
        return any(self.onecmd(command) for command in _split(line))

    def run(self, command: str, words: list[str]) -> None:
        """Run one command with these words, which may contain any characters."""
        getattr(self, f"do_{command}")(shlex.join(words))

    def talk(self) -> None:
        """Read commands from a terminal until told to leave; errors are shown, not raised."""
        print(self.greeting())
        print(self.intro)
        leave = False
        while not leave:
            try:
                leave = self._ask()
            except KeyboardInterrupt:
                print()
            except ClosedError:
                raise
            except (IvshmemError, OSError, ValueError, OverflowError) as error:
                print(plain(" ".join(str(error).split())), file=sys.stderr)

    def greeting(self) -> str:
        """This endpoint's id and vectors, and the size of the region."""
        end = self.endpoint
        return (
            f"id {end.id}, {counted(end.vectors, 'vector')}; region {format_size(end.region.size)}"
        )

    def _ask(self) -> bool:
        try:
            line = input(self.prompt)
        except EOFError:
            print()
            return True
        return self.run_line(line)

    def emptyline(self) -> bool:
        return False  # and not the last command once more, which may have been `ring all`

    def default(self, line: str) -> None:
        word = line.split()[0]
        if word == "EOF":
            word = "an end of file"
        known = (name.removeprefix("do_") for name in self.get_names() if name.startswith("do_"))
        raise CommandError(f"no command {word!r}{suggestion(word, known) or ': help lists them'}")

    def do_help(self, arg: str) -> None:
        """help [COMMAND]: the commands, or what one does."""
        if arg and not hasattr(self, f"do_{arg}"):
            self.default(arg)
        super().do_help(arg)

    def _print(self, text: str, **values: Any) -> None:
        print(json_module.dumps(values) if self.json else text, flush=True)

    # -- what happens ------------------------------------------------------------------------------

    def do_watch(self, rest: str) -> None:
        """watch [SECONDS]: show interrupts, and peers that join and leave, until Ctrl-C."""
        words = _words(rest, 1, "watch [SECONDS]")
        end = time.monotonic() + _seconds(words[0]) if words else None
        while True:
            left = None if end is None else left_until(end)
            event = self.endpoint.next_event(left)
            if event is None:
                return
            self._show_event(event)

    def _show_event(self, event: Event) -> None:
        if isinstance(event, PeerJoined):
            self._print(f"peer {event.peer} joined", event="joined", peer=event.peer)
        elif isinstance(event, PeerLeft):
            self._print(f"peer {event.peer} left", event="left", peer=event.peer)
        elif isinstance(event, Disconnected):
            text = f"{plain(event.reason)}; memory and doorbells continue to work"
            self._print(text, event="server lost", reason=plain(event.reason))
        elif isinstance(event, IdChanged):
            self._print(
                f"id {event.id}, which was {event.before}: the virtual machine was migrated",
                event="id changed",
                before=event.before,
                id=event.id,
            )
        else:
            self._show_interrupt(event)

    def _show_interrupt(self, event: Interrupt) -> None:
        times = "" if event.rings == 1 else f" ({event.rings} times)"
        self._print(
            f"interrupt on vector {event.vector}{times}",
            event="interrupt",
            vector=event.vector,
            rings=event.rings,
        )

    # -- names ------------------------------------------------------------------------------------

    def do_names(self, rest: str) -> None:
        """names: who has published a name in the region's directory."""
        _words(rest, 0, "names")
        entries = self._directory().entries()
        lines = [
            f"{plain(entry.name)}: peer {entry.id}, {_listed(entry.vector_range)}"
            + (f", {plain(entry.role)}" if entry.role else "")
            for entry in entries
        ]
        values = [
            {
                "name": plain(entry.name),
                "role": plain(entry.role),
                "peer": entry.id,
                "vectors": list(entry.vector_range),
                "alive": entry.alive,
            }
            for entry in entries
        ]
        self._print("\n".join(lines) or "no peer has published a name", names=values)

    def do_publish(self, rest: str) -> None:
        """publish NAME [ROLE]: enter this peer into the directory, until the shell ends."""
        words = [*_words(rest, 2, "publish NAME [ROLE]", least=1), ""]
        entry = self._directory().publish(words[0], words[1])
        self._print(f"published {plain(entry.name)}", published=entry.name)

    def _directory(self) -> Directory:
        if self._names is None:
            self._names = Directory.open(self.endpoint)
        return self._names

    def vectors_of(self, peer: int) -> int:
        """How many vectors a peer can be rung on. A device cannot tell: as many as its own."""
        return self.endpoint.vectors

    def peer(self, word: str) -> tuple[int, range]:
        """An id and its vectors from a number or a published name."""
        try:
            number = int(word, 0)
        except ValueError:
            pass
        else:
            return number, range(self.vectors_of(number))
        try:
            entry = self._directory().lookup(word)
        except NoDirectory:
            raise CommandError(
                f"not a peer: {word!r} (give a number, the region has no directory of names)"
            ) from None
        return entry.id, entry.vector_range

    # -- interrupts -------------------------------------------------------------------------------

    def do_ring(self, rest: str) -> None:
        """ring PEER VECTOR: ring one vector of a peer (id or name).  ring PEER all: all of them."""
        words = _words(rest, 2, "ring PEER VECTOR, or ring PEER all", least=1)
        if len(words) == 1:
            raise CommandError("no vector given: ring PEER VECTOR, or ring PEER all")
        peer, vectors = self.peer(words[0])
        if words[1] != "all":
            vector = _number(words[1], "vector")
            vectors = range(vector, vector + 1)
        self._ring((peer, vector) for vector in vectors)

    def _ring(self, doorbells: Iterable[tuple[int, int]]) -> None:
        total = 0
        for peer, vector in doorbells:
            self.endpoint.ring(peer, vector)
            total += 1
        self._print(f"rang {counted(total, 'doorbell')}", rang=total)

    def do_wait(self, rest: str) -> None:
        """wait [VECTOR|any [SECONDS]]: wait for an interrupt; fails when the time is over."""
        words = _words(rest, 2, "wait [VECTOR|any [SECONDS]]")
        timeout = _seconds(words[1]) if len(words) == 2 else None
        if not words or words[0] == "any":
            event = self.endpoint.wait(None, timeout)
        else:
            vector = _number(words[0], "vector")
            rings = self.endpoint.wait(vector, timeout)
            event = Interrupt(vector, rings) if rings else None
        if event is None:
            raise CommandError(f"no interrupt within {counted(timeout or 0, 'second')}")
        self._show_interrupt(event)

    # -- memory -----------------------------------------------------------------------------------

    def do_read(self, rest: str) -> None:
        """read ADDRESS [u8|u16|u32|u64|LENGTH]: a little-endian number (u32), or bytes in hex."""
        words = _words(rest, 2, "read ADDRESS [u8|u16|u32|u64|LENGTH]", least=1)
        kind = words[1] if len(words) == 2 else "u32"
        if kind in _INTEGERS:
            form = struct.Struct(_INTEGERS[kind])
            (value,) = form.unpack(self._bytes(words[0], form.size))
            self._print(f"{value:#x} ({value})", value=value)
        else:
            try:
                length = parse_size(kind)
            except RegionError:
                raise CommandError(
                    f"not a type or a length: {kind!r} (give u8, u16, u32, u64 or a size)"
                ) from None
            data = self._bytes(words[0], length)
            self._print(data.hex(" "), hex=data.hex())

    def do_write(self, rest: str) -> None:
        """write ADDRESS u8|u16|u32|u64|hex|text VALUE: store a number, bytes, or UTF-8 text."""
        usage = "write ADDRESS u8|u16|u32|u64|hex|text VALUE"
        address, kind, value = _words(rest, 3, usage, least=3)
        try:
            if kind in _INTEGERS:
                data = struct.pack(_INTEGERS[kind], _number(value, "value"))
            elif kind == "hex":
                data = bytes.fromhex(value)
            elif kind == "text":
                data = value.encode()
            else:
                raise CommandError(f"not a type: {kind!r} (usage: {usage})")
        except CommandError:
            raise
        except (struct.error, ValueError):
            raise CommandError(f"not a {kind} value: {value!r} ({_EXPECTED[kind]})") from None
        start = self._range(address, len(data))
        if self.endpoint.region.readonly:
            raise CommandError("the memory is mapped read-only")
        with memoryview(self.endpoint.region) as memory:
            memory[start : start + len(data)] = data
        self._print(
            f"wrote {counted(len(data), 'byte')} at {start:#x}", wrote=len(data), address=start
        )

    def do_hexdump(self, rest: str) -> None:
        """hexdump [ADDRESS [LENGTH]]: bytes and characters, 256 from the start if not told."""
        words = [*_words(rest, 2, "hexdump [ADDRESS [LENGTH]]"), "0", "256"]
        if len(words) == 3:
            words = [words[0], "256"]
        start = parse_size(words[0])
        length = min(parse_size(words[1]), max(self.endpoint.region.size - start, 1))
        data = self._bytes(words[0], length)
        self._print("\n".join(_dumped(data, start)), address=start, hex=data.hex())

    def do_info(self, rest: str) -> None:
        """info: what the region is made of."""
        _words(rest, 0, "info")
        values = self.endpoint.region.info()._asdict()
        shown = {None: "-", True: "yes", False: "no"}
        lines = [
            f"{key} {shown[value] if value is None or isinstance(value, bool) else value}"
            for key, value in values.items()
        ]
        self._print("\n".join(map(plain, lines)), **values)

    def _range(self, address: str, length: int) -> int:
        start = parse_size(address)
        size = self.endpoint.region.size
        if start + length > size:
            raise CommandError(
                f"{start:#x} + {counted(length, 'byte')} is beyond the region of {size} bytes"
            )
        return start

    def _bytes(self, address: str, length: int) -> bytes:
        start = self._range(address, length)
        with memoryview(self.endpoint.region) as memory:
            return bytes(memory[start : start + length])

    # -- leaving ----------------------------------------------------------------------------------

    def do_quit(self, rest: str) -> bool:
        """quit: leave the server.  exit: the same."""
        _words(rest, 0, "quit, or exit")
        return True

    do_exit = do_quit


class ClientShell(Shell):
    """What a client knows on top: who else is connected."""

    def __init__(self, client: Client, *, json: bool = False) -> None:
        super().__init__(client, json=json)
        self.client = client

    def vectors_of(self, peer: int) -> int:
        """How many the server announced; of one that is not there as many as there are here."""
        return self.client.vectors_of(peer) or self.client.vectors

    def greeting(self) -> str:
        """This endpoint's id and vectors, the size of the region, and the other peers."""
        peers = self.client.peers
        others = f"peers {' '.join(map(str, peers))}" if peers else "no other peers yet"
        return f"{super().greeting()}; {others}"

    def _ask(self) -> bool:
        for event in self.client.peer_events():
            self._show_event(event)
        return super()._ask()

    def do_ring(self, rest: str) -> None:
        """ring PEER VECTOR|all: ring one vector or all of a peer (id or name).  ring all: of all.

        `int` is the same, as in QEMU's example client.
        """
        if rest.split() == ["all"]:
            peers = self.client.peers
            self._ring((p, vector) for p in peers for vector in range(self.vectors_of(p)))
        else:
            super().do_ring(rest)

    do_int = do_ring

    def do_dump(self, rest: str) -> None:
        """dump: this client's id and vectors, the region, and the peers."""
        _words(rest, 0, "dump")
        client = self.client
        peers = client.peers
        info = client.region.info()
        lines = [
            f"id {client.id}, {counted(client.vectors, 'vector')}",
            f"region {format_size(info.size)}, {format_size(info.resident)} in memory"
            + (", sealed" if info.sealed else "")
            + (", read-only" if info.readonly else ""),
            f"server {plain(client.path)}" + ("" if client.connected else " (lost)"),
        ]
        lines += [f"peer {peer}, {counted(self.vectors_of(peer), 'vector')}" for peer in peers]
        self._print(
            "\n".join(lines),
            id=client.id,
            vectors=client.vectors,
            size=info.size,
            resident=info.resident,
            server=client.path,
            connected=client.connected,
            peers=peers,
        )

    def do_peers(self, rest: str) -> None:
        """peers: the ids of the other peers."""
        _words(rest, 0, "peers")
        peers = self.client.peers
        self._print(" ".join(map(str, peers)) or "no other peers", peers=peers)


def _split(line: str) -> Iterator[str]:
    """The commands of a line, between semicolons that are not quoted; # begins a comment."""
    lexer = shlex.shlex(line, posix=False, punctuation_chars=";")
    lexer.whitespace_split = True
    lexer.commenters = ""  # they would begin in the middle of a word
    command: list[str] = []
    try:
        for word in lexer:
            if word.startswith("#"):
                break
            if word.strip(";"):
                command.append(word)
            elif command:
                yield " ".join(command)
                command = []
    except ValueError as error:
        raise CommandError(f"{line.strip()!r}: {error}") from None
    if command:
        yield " ".join(command)


def _words(rest: str, most: int, usage: str, *, least: int = 0) -> list[str]:
    words = shlex.split(rest)
    if not least <= len(words) <= most:
        raise CommandError(f"usage: {usage}")
    return words


def _listed(vectors: range) -> str:
    if len(vectors) > 1:
        return f"vectors {vectors[0]} to {vectors[-1]}"
    return f"vector {vectors[0]}" if vectors else "no vectors"


def _number(text: str, what: str) -> int:
    try:
        number = int(text, 0)
    except ValueError:
        raise CommandError(f"not a {what}: {text!r} (give a number)") from None
    if abs(number) >= 1 << 64:
        raise CommandError(f"not a {what}: {text!r} (too large)")
    return number


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise CommandError(f"not a time: {text!r} (give seconds, for example 0.5)")
    return value


def _dumped(data: bytes, start: int) -> Iterator[str]:
    """Rows as `hexdump -C` has them; rows that repeat the one before are a single star."""
    before = b""
    starred = False
    for offset in range(0, len(data), _ROW):
        row = data[offset : offset + _ROW]
        if row == before and offset + _ROW < len(data):
            if not starred:
                yield "*"
            starred = True
            continue
        before, starred = row, False
        halves = f"{row[:8].hex(' '):<23}  {row[8:].hex(' '):<23}"
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        yield f"{start + offset:08x}  {halves}  |{text}|"
