"""On a host: the server's socket, who may connect, and what the server says.

Knows: how a server is found out about without harm. Does not know: where its memory comes from.

Invariants:
1. Nobody becomes a peer just by asking: a server that may take the question for a peer is left
   alone, as far as it can be told. (QEMU's example server ends when a peer goes away too soon.)
"""

from __future__ import annotations

import os
import stat

from .. import sockets
from ..errors import ServerGone
from ..pages import PAGE
from ..plain import command, quoted
from ..sizes import format_size, parse_size
from . import access, holders
from .check import Finding, Step, failed, ok, ours, skipped, warning
from .wishes import Wishes

_SECONDS = 3.0  # for a server to answer

# QEMU does not connect a second time.
_ANEW = "; start its guests anew after that"

_NONE = "plain memory needs no server"


class ServerSteps:
    """The checks of a server.

    Attributes:
        answer: what it says that it serves, as sockets.ask returns it; empty if it says nothing.
    """

    def __init__(self, wishes: Wishes) -> None:
        self.wishes = wishes
        self.socket = "" if wishes.server is None else os.path.abspath(wishes.server)
        self.answer: dict[str, int] = {}

    def steps(self) -> list[Step]:
        return [
            Step("socket", self._socket),
            Step("socket permission", self._permission, ("socket",)),
            Step("server", self._server, ("socket", "socket permission")),
        ]

    def _socket(self) -> Finding:
        path = self.socket
        if not path:
            return skipped(_NONE)
        try:
            sockets.check_path(path)
            if not stat.S_ISSOCK(os.stat(path).st_mode):
                return failed(f"{path} is no socket", command(["mv", path, f"{path}.old"]))
            if not sockets.is_live(path):
                return failed(f"{path} is stale: nobody listens", self.wishes.serve())
        except PermissionError:
            return ok(path)  # whether it lives, who may connect can tell; the next check says why
        except FileNotFoundError:
            folder = os.path.dirname(path)
            if not os.path.isdir(folder):
                return failed(f"no directory {folder}", f"mkdir -p {quoted(folder)}")
            return failed(f"no {path}: no server listens there", self.wishes.serve())
        except OSError as error:
            return failed(f"{path}: {error.strerror}", ours("serve", "--daemon"))
        return ok(f"{path}, somebody listens")

    def _permission(self) -> Finding:
        if not self.socket:
            return skipped(_NONE)
        return access.permission(self.socket, "w", self.wishes.user)

    def _server(self) -> Finding:
        if not self.socket:
            return skipped(_NONE)
        found = holders.of_socket(self.socket)
        who = " and ".join(map(str, found)) or "a process that is not to be seen from here"
        again = self.wishes.serve()
        if found:
            pids = " ".join(str(holder.pid) for holder in found)
            again = f"while kill {pids} 2>/dev/null; do sleep 0.1; done; {again}"
        if found and not any(map(_may_be_ours, found)):
            return warning(f"{who}: a server of another make, which was not asked")
        try:
            self.answer = sockets.ask(self.socket, _SECONDS)
        except ServerGone:
            return warning(f"{who}: a server of another make, which does not answer questions")
        except OSError as error:
            return failed(f"{who}: {error.strerror}", again)
        size, vectors, peers = (self.answer[key] for key in ("size", "vectors", "peers"))
        what = f"{who}: {format_size(size)}, {vectors} vectors, {peers} peers"
        if self.wishes.size and size != parse_size(self.wishes.size):
            return failed(f"{what}, not the {self.wishes.size} asked for{_ANEW}", again)
        if self.wishes.hugepages and self.answer["page_size"] == PAGE:
            return failed(f"{what}, not in huge pages{_ANEW}", again)
        return ok(what)


def _may_be_ours(holder: holders.Holder) -> bool:
    """Whether a server can be of this package: then a Python runs it."""
    try:
        program = os.path.basename(os.readlink(holders.PROC / str(holder.pid) / "exe"))
    except OSError:
        return True
    return "python" in program or "pypy" in program
