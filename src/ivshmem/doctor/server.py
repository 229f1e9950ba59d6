"""On a host: the server's socket, its permissions, and what the server answers.

Knows: how a server is found out about without harm. Does not know: where its memory comes from.

Invariants:
1. Nobody becomes a peer just by asking: a server that may take the question for a peer is left
   alone, as far as it can be told. (QEMU's example server ends when a peer goes away too soon, and
   a QEMU that was sent a leave message can crash later.)
2. What was not asked, or did not answer, is a warning that says so, and never "ok".
3. No command here removes, renames or stops what another may use: where something is in the way, a
   server is started at another path.
"""

from __future__ import annotations

import os
import stat
from dataclasses import replace

from ..errors import Misshapen
from ..memory.pages import PAGE
from ..memory.sizes import format_size, parse_size
from ..peer import inquiry
from ..service import control_client
from ..system import sockets
from ..text import NAME, counted, plain, quoted
from . import open_files, permissions
from .check import CheckStep, Finding, failed, ok, our_command, skipped, warning
from .request import Request

_SECONDS = 3.0  # for a server to answer

_ONLY = "only a peer could ask it, and guests get a message about each peer"

# What a server of protocol version 0 sends to a peer first.
_GREETING = bytes(8)

_NONE = "plain memory needs no server"


class ServerSteps:
    """The checks of a server.

    Attributes:
        answer: what it says that it serves, as sockets.ask returns it; empty if it says nothing.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.socket = "" if request.server is None else os.path.abspath(request.server)
        self.answer: dict[str, int] = {}

    def steps(self) -> list[CheckStep]:
        return [
            CheckStep("socket", self._socket),
            CheckStep("socket permission", self._permission, ("socket",)),
            CheckStep("server", self._server, ("socket", "socket permission")),
        ]

    def _socket(self) -> Finding:
        path = self.socket
        if not path:
            return skipped(_NONE)
        try:
            sockets.check_path(path)
            if not stat.S_ISSOCK(os.stat(path).st_mode):
                return self._lost("is not a socket") or failed(
                    f"{path} is not a socket: no server can listen there", self._beside()
                )
            if not sockets.is_live(path):
                return self._lost("is stale") or failed(
                    f"{path} is stale: no server listens there", self.request.serve_command()
                )
            if sockets.takes_datagrams(path):
                return failed(
                    f"{path} is a datagram socket, not a socket of an ivshmem server",
                    self._beside(),
                )
        except PermissionError:
            return skipped(
                f"{path} is in a directory without access, so it cannot be checked"
            )  # next: why
        except FileNotFoundError:
            folder = os.path.dirname(path)
            if place := permissions.obstacle(folder):
                beside = replace(self.request, socket=permissions.free_beside(place))
                return failed(f"{place} is not a directory", beside.serve_command())
            if not os.path.isdir(folder):
                return failed(f"no directory {folder}", f"mkdir -p {quoted(folder)}")
            return self._lost("is gone") or failed(
                f"no {path}: no server listens there", self.request.serve_command()
            )
        except OSError as error:
            return failed(f"{path}: {error.strerror}", our_command("serve", "--daemon"))
        return ok(f"{path}, a process listens there")

    def _lost(self, what: str) -> Finding | None:
        """Say that a server runs whose path leads elsewhere; None: there is none to be seen."""
        found = open_files.processes_listening(self.socket)
        if not found:
            return None
        who = " and ".join(map(str, found))
        # It binds its path again within seconds, if it can. Another server would not get its peers.
        why = our_command("status", "-S", self.socket)
        return failed(f"{self.socket} {what}, and {who} still serves its peers there", why)

    def _permission(self) -> Finding:
        if not self.socket:
            return skipped(_NONE)
        return permissions.permission(self.socket, "w", self.request.user)

    def _server(self) -> Finding:
        if not self.socket:
            return skipped(_NONE)
        found = open_files.processes_listening(self.socket)
        who = " and ".join(map(str, found)) or "a process that cannot be seen from here"
        join = our_command("connect", "-S", self.socket, "-c", "dump")
        if found and not any(map(_may_be_ours, found)):
            return warning(f"{who}: another server program, which was not asked: {_ONLY}", join)
        if not found and not os.path.lexists(control_client.default_path(self.socket)):
            return warning(
                f"{who} listens, and has no control socket: it may be another server program, and"
                f" was not asked: {_ONLY}",
                join,
            )
        try:
            said = inquiry.question(self.socket, _SECONDS)
        except OSError as error:
            return failed(f"{who}: {error.strerror}", self._beside())
        try:
            self.answer = answer = inquiry.answer_in(said)
        except Misshapen:
            return self._stranger(who, said, join)
        size, vectors, peers = (answer[key] for key in ("size", "vectors", "peers"))
        what = f"{who}: {format_size(size)}, {counted(vectors, 'vector')},"
        what += f" {counted(peers, 'peer')}"
        if self.request.size and size != parse_size(self.request.size):
            return failed(f"{what}, not the {self.request.size} asked for", self._beside())
        if self.request.hugepages and answer["page_size"] == PAGE:
            return failed(f"{what}, not in huge pages", self._beside())
        if answer.get("name_lost"):
            return failed(
                f"{what}; the name of its memory was removed or belongs to another file, so a"
                " process that opens the name shares nothing with the server's peers: end the"
                " server and its guests, and start them again",
                self.request.serve_command(),
            )
        return ok(what)

    def _stranger(self, who: str, said: bytes, join: str) -> Finding:
        """What to say of a server that answered like this."""
        if not said:
            return warning(
                f"{who}: no answer, so this may not be an ivshmem server: {_ONLY}",
                join,
            )
        if said.startswith(_GREETING):
            return warning(f"{who}: another server program, which cannot be asked: {_ONLY}", join)
        shown = plain(said, NAME)
        return failed(f"{who}: not an ivshmem server: it answers {shown}", self._beside())

    def _beside(self) -> str:
        """The command that serves what is wished for at a path that is free."""
        return self.request.serve_command(socket=permissions.free_beside(self.socket))


def _may_be_ours(holder: open_files.FoundProcess) -> bool:
    """Whether a server can be of this package: then a Python runs it."""
    try:
        program = os.path.basename(os.readlink(open_files.PROC / str(holder.pid) / "exe"))
    except OSError:
        return True
    return "python" in program or "pypy" in program
