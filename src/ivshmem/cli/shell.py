"""The commands of `ivshmem connect`.

Knows: words that a person types, and how results are shown. Does not know: terminals, sockets.
"""

from __future__ import annotations

import cmd
import json as json_module
import shlex
import struct
import sys
import time
from collections.abc import Iterator
from typing import Any

from .._core import Interrupt
from ..client import Client
from ..endpoint import Event, PeerJoined, PeerLeft, ServerLost
from ..errors import ClosedError, IvshmemError
from ..sizes import format_size, parse_size
from .serve import count

_INTEGERS = {"u8": "<B", "u16": "<H", "u32": "<I", "u64": "<Q"}
_ROW = 16  # bytes in a row of a hex dump


class CommandError(IvshmemError, ValueError):
    """A command that cannot be carried out as it stands."""


class Shell(cmd.Cmd):
    """One client, one line after the other; also its own help."""

    intro = "Type help for the commands, Ctrl-D to leave."
    doc_header = "Commands (help COMMAND tells more):"

    def __init__(self, client: Client, *, json: bool = False) -> None:
        super().__init__()
        self.client = client
        self.json = json
        self.prompt = f"ivshmem {client.id}> "

    # -- running ----------------------------------------------------------------------------------

    def run_line(self, line: str) -> bool:
        """Run the commands of a line; True when one of them was to leave. Errors are raised."""
        return any(self.onecmd(command) for command in _split(line))

    def talk(self) -> None:
        """Read commands from a terminal until told to leave; errors are shown, not raised."""
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
                print(error, file=sys.stderr)

    def _ask(self) -> bool:
        for event in self.client.news():
            self._show_event(event)
        try:
            line = input(self.prompt)
        except EOFError:
            print()
            return True
        return self.run_line(line)

    def emptyline(self) -> bool:
        return False  # and not the last command once more, which may have been `int all`

    def default(self, line: str) -> None:
        word = line.split()[0]
        if word == "EOF":
            word = "an end of file"
        raise CommandError(f"no command {word!r}: help lists them")

    def _tell(self, text: str, **values: Any) -> None:
        print(json_module.dumps(values) if self.json else text, flush=True)

    # -- who is there -----------------------------------------------------------------------------

    def do_dump(self, rest: str) -> None:
        """dump: this client's id and vectors, the region, and the peers."""
        _words(rest, 0, "dump")
        client = self.client
        peers = client.peers
        info = client.region.info()
        lines = [
            f"id {client.id}, {count(client.vectors)}",
            f"region {format_size(info.size)}, {format_size(info.resident)} in memory"
            + (", sealed" if info.sealed else "")
            + (", read-only" if info.readonly else ""),
            f"server {client.path}" + ("" if client.connected else " (lost)"),
        ]
        lines += [f"peer {peer}, {count(client.vectors)}" for peer in peers]
        self._tell(
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
        self._tell(" ".join(map(str, peers)) or "nobody else is here", peers=peers)

    def do_watch(self, rest: str) -> None:
        """watch [SECONDS]: show interrupts, and peers that join and leave, until Ctrl-C."""
        words = _words(rest, 1, "watch [SECONDS]")
        end = time.monotonic() + _seconds(words[0]) if words else None
        while True:
            left = None if end is None else max(end - time.monotonic(), 0)
            event = self.client.next_event(left)
            if event is None:
                return
            self._show_event(event)

    def _show_event(self, event: Event) -> None:
        if isinstance(event, PeerJoined):
            self._tell(f"peer {event.peer} joined", event="joined", peer=event.peer)
        elif isinstance(event, PeerLeft):
            self._tell(f"peer {event.peer} left", event="left", peer=event.peer)
        elif isinstance(event, ServerLost):
            text = f"{event.reason}; memory and doorbells go on working"
            self._tell(text, event="server lost", reason=event.reason)
        else:
            self._show_interrupt(event)

    def _show_interrupt(self, event: Interrupt) -> None:
        times = "" if event.rings == 1 else f" ({event.rings} times)"
        self._tell(
            f"interrupt on vector {event.vector}{times}",
            event="interrupt",
            vector=event.vector,
            rings=event.rings,
        )

    # -- interrupts -------------------------------------------------------------------------------

    def do_int(self, rest: str) -> None:
        """int PEER VECTOR: ring one vector.  int PEER all: all of a peer.  int all: all of all."""
        words = _words(rest, 2, "int PEER VECTOR, int PEER all, or int all", least=1)
        client = self.client
        if words == ["all"]:
            peers = client.peers
        else:
            peers = [_number(words[0], "peer")]
            if len(words) == 1:
                raise CommandError("which vector? int PEER VECTOR, or int PEER all")
        if words[-1] == "all":
            vectors = range(client.vectors)
        else:
            vector = _number(words[1], "vector")
            vectors = range(vector, vector + 1)
        for peer in peers:
            for vector in vectors:
                client.ring(peer, vector)
        total = len(peers) * len(vectors)
        self._tell(f"rang {total} doorbell{'' if total == 1 else 's'}", rang=total)

    def do_wait(self, rest: str) -> None:
        """wait [VECTOR|any [SECONDS]]: wait for an interrupt; fails when the time is over."""
        words = _words(rest, 2, "wait [VECTOR|any [SECONDS]]")
        timeout = _seconds(words[1]) if len(words) == 2 else None
        if not words or words[0] == "any":
            event = self.client.wait(None, timeout)
        else:
            vector = _number(words[0], "vector")
            rings = self.client.wait(vector, timeout)
            event = Interrupt(vector, rings) if rings else None
        if event is None:
            raise CommandError(f"no interrupt within {timeout:g} seconds")
        self._show_interrupt(event)

    # -- memory -----------------------------------------------------------------------------------

    def do_read(self, rest: str) -> None:
        """read ADDRESS [u8|u16|u32|u64|LENGTH]: a little-endian number (u32), or bytes in hex."""
        words = _words(rest, 2, "read ADDRESS [u8|u16|u32|u64|LENGTH]", least=1)
        kind = words[1] if len(words) == 2 else "u32"
        if kind in _INTEGERS:
            form = struct.Struct(_INTEGERS[kind])
            (value,) = form.unpack(self._bytes(words[0], form.size))
            self._tell(f"{value:#x} ({value})", value=value)
        else:
            data = self._bytes(words[0], parse_size(kind))
            self._tell(data.hex(" "), hex=data.hex())

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
                raise CommandError(f"what is {kind!r}? {usage}")
        except (struct.error, ValueError) as error:
            if isinstance(error, CommandError):
                raise
            raise CommandError(f"{value!r} is no {kind}: {error}") from None
        start = self._range(address, len(data))
        if self.client.region.readonly:
            raise CommandError("the memory is mapped for reading only")
        with memoryview(self.client.region) as memory:
            memory[start : start + len(data)] = data
        self._tell(f"wrote {len(data)} bytes at {start:#x}", wrote=len(data), address=start)

    def do_hexdump(self, rest: str) -> None:
        """hexdump [ADDRESS [LENGTH]]: bytes and characters, 256 from the start if not told."""
        words = [*_words(rest, 2, "hexdump [ADDRESS [LENGTH]]"), "0", "256"]
        if len(words) == 3:
            words = [words[0], "256"]
        start = parse_size(words[0])
        length = min(parse_size(words[1]), max(self.client.region.size - start, 1))
        data = self._bytes(words[0], length)
        self._tell("\n".join(_dumped(data, start)), address=start, hex=data.hex())

    def do_info(self, rest: str) -> None:
        """info: what the region is made of."""
        _words(rest, 0, "info")
        values = self.client.region.info().__dict__
        self._tell("\n".join(f"{key} {value}" for key, value in values.items()), **values)

    def _range(self, address: str, length: int) -> int:
        start = parse_size(address)
        size = self.client.region.size
        if start + length > size:
            raise CommandError(f"{start:#x} + {length} bytes is beyond the region of {size} bytes")
        return start

    def _bytes(self, address: str, length: int) -> bytes:
        start = self._range(address, length)
        with memoryview(self.client.region) as memory:
            return bytes(memory[start : start + length])

    # -- leaving ----------------------------------------------------------------------------------

    def do_quit(self, rest: str) -> bool:
        """quit: leave the server."""
        _words(rest, 0, "quit")
        return True

    do_exit = do_quit


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


def _number(text: str, what: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise CommandError(f"{text!r} is no {what}: give a number") from None


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise CommandError(f"{text!r} is no time: give seconds")
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
