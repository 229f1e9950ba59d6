"""Peers that mean harm, as programs: each does one thing to everybody, again and again, until it is
killed. Written without the package.

What they do to the memory and to the doorbells goes through descriptors that every peer is given.
"""

from __future__ import annotations

import contextlib
import os
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import ExitStack

from .children import NOBODY, Child, python

_BEFORE = """
import array, collections, ctypes, fcntl, os, signal, socket, sys

path, vectors = sys.argv[1], int(sys.argv[2])
room = socket.CMSG_SPACE(4)
done = 0  # what was done so far


def finish(*_):
    os.write(1, b"%d\\n" % done)
    os._exit(0)


signal.signal(signal.SIGTERM, finish)


def connect():
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    return sock


def message(sock, flags=0):
    data, ancillary, _, _ = sock.recvmsg(8, room, flags | socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for _, _, content in ancillary:
        fds.frombytes(content)
    return int.from_bytes(data, "little", signed=True), fds[0] if fds else None


class Peer:
    def __init__(self):
        self.socket = connect()
        message(self.socket)
        self.id, _ = message(self.socket)
        _, self.memory = message(self.socket)
        self.bells = collections.defaultdict(list)
        while len(self.bells[self.id]) < vectors:
            self.take(0)

    def take(self, flags):
        peer, fd = message(self.socket, flags)
        if fd is not None:
            self.bells[peer].append(fd)
        else:
            for fd in self.bells.pop(peer):
                os.close(fd)

    def news(self):
        try:
            while True:
                self.take(socket.MSG_DONTWAIT)
        except BlockingIOError:
            pass

    def all_bells(self):
        return [fd for fds in self.bells.values() for fd in fds]


print("READY")
"""

# -- the programs ---------------------------------------------------------------------------------

# For comparison: what costs only processor time.
BUSY = """
while True:
    os.getppid()
    done += 1
"""

# Never takes anything out of its socket, while others come and go.
NEVER_READS = """
sock = connect()
signal.pause()
"""

# A hundred connections that are all in the middle of their set-up, each at another message.
HALF_SET_UP = """
held = []
for count in range(100):
    sock = connect()
    for _ in range(count % (4 + 2 * vectors)):
        _, fd = message(sock)
        if fd is not None:
            os.close(fd)
    held.append(sock)
signal.pause()
"""

# Connects and goes at once, as fast as it can.
FLOOD = """
while True:
    connect().close()
    done += 1
"""

# Takes part of its set-up before it goes, so that it counts as one that was there, and uses up
# an id. It stops while there are some left for others.
FLOOD_READING = """
while done < 5000:
    sock = connect()
    try:
        for _ in range(2):
            sock.recv(8)
    except ConnectionError:
        pass  # refused
    sock.close()
    done += 1
signal.pause()
"""

# Sends bytes and descriptors as long as the server's side takes them, then comes again.
SENDS = """
rubbish = os.urandom(1 << 16)
here = os.open("/dev/null", os.O_RDONLY)
while True:
    sock = connect()
    sock.setblocking(False)
    try:
        socket.send_fds(sock, [b"x" * 8], [here] * 100)
        while True:
            done += sock.send(rubbish)
    except OSError:
        pass
    sock.close()
"""

# Clears O_NONBLOCK on the eventfds of everybody.
CLEARS_NONBLOCK = """
peer = Peer()
while True:
    peer.news()
    for fd in peer.all_bells():
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_NONBLOCK)
        done += 1
"""

# Fills the counters of everybody's eventfds, its own included.
FILLS_COUNTERS = """
most = (2**64 - 2).to_bytes(8, sys.byteorder)
peer = Peer()
while True:
    peer.news()
    for fd in peer.all_bells():
        try:
            os.write(fd, most)
        except BlockingIOError:
            pass
        done += 1
"""

# Fills its own counters, clears O_NONBLOCK, and never reads: who rings it has to wait.
HOLDS_UP = """
most = (2**64 - 2).to_bytes(8, sys.byteorder)
peer = Peer()
for fd in peer.bells[peer.id]:
    os.write(fd, most)
    fcntl.fcntl(fd, fcntl.F_SETFL, 0)
print(peer.id)
while True:
    peer.take(0)
"""

# Truncates, grows, seals, and punches a hole into the last page.
CHANGES_MEMORY = """
libc = ctypes.CDLL(None, use_errno=True)
peer = Peer()
fd, size = peer.memory, os.fstat(peer.memory).st_size
while True:
    for attempt in (
        lambda: os.ftruncate(fd, 0),
        lambda: os.ftruncate(fd, 2 * size),
        lambda: os.posix_fallocate(fd, 0, 2 * size),
        lambda: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
        lambda: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL),
    ):
        try:
            attempt()
        except OSError:
            pass
        else:
            os.write(2, b"it has changed\\n")
            os._exit(1)
    if libc.fallocate(fd, 3, ctypes.c_long(size - 4096), ctypes.c_long(4096)):
        os.write(2, os.strerror(ctypes.get_errno()).encode())
        os._exit(1)
    done += 1
"""

# name: (program, how many processes of it)
ATTACKS: Mapping[str, tuple[str, int]] = {
    "never reads": (NEVER_READS, 1),
    "half set up": (HALF_SET_UP, 1),
    "floods": (FLOOD, 3),
    "floods, reading": (FLOOD_READING, 3),
    "sends": (SENDS, 1),
    "clears O_NONBLOCK": (CLEARS_NONBLOCK, 1),
    "fills counters": (FILLS_COUNTERS, 1),
    "changes the memory": (CHANGES_MEMORY, 1),
}


def program(source: str) -> str:
    """A whole program of one of these."""
    return textwrap.dedent(_BEFORE) + source


@contextlib.contextmanager
def attack(source: str, processes: int, path: str, vectors: int) -> Iterator[list[Child]]:
    """Let it go on during the block, by another user if this one is root; it is over afterwards."""
    user = NOBODY if os.geteuid() == 0 else None
    with ExitStack() as stack:
        children = [
            stack.enter_context(python(program(source), path, str(vectors), user=user))
            for _ in range(processes)
        ]
        for child in children:
            child.expect("READY")
        yield children
