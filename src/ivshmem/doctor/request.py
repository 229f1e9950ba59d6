"""What a user wants to share on a host, and the command that serves it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..peer import default_paths
from .check import our_command

# As of `ivshmem serve`.
DEFAULT_SIZE = "4M"


@dataclass(frozen=True)
class Request:
    """What is to be shared, and by whom.

    Attributes:
        socket: a server's; None: the default one, or none where memory is named.
        name, path, directory: where the memory is, as Region.create takes them; at most one.
        size: of the memory; None: any.
        hugepages: as Region.create takes it.
        qemu: the program; None: the one for guests of this machine's kind.
        user: who is to use socket and memory; None: who runs this, and libvirt's QEMU, if any.
        accept_owner: users whose memory is accepted, as Region.attach takes them.
        lock: the memory will be locked (QEMU's `-overcommit mem-lock=on`, or vfio on the host).
    """

    socket: str | None = None
    name: str | None = None
    path: str | None = None
    directory: str | None = None
    size: str | None = None
    hugepages: bool | str = False
    qemu: str | None = None
    user: str | None = None
    lock: bool = False
    accept_owner: tuple[str, ...] = ()

    @property
    def place(self) -> str | None:
        """Where the memory is, if that was said."""
        return self.name or self.path or self.directory

    @property
    def server(self) -> str | None:
        """The socket to look at; None where plain memory is shared, which needs none."""
        return self.socket or (None if self.place else default_paths.expected_socket())

    def serve_command(self, **changes: Any) -> str:
        """Return the command that serves what is wanted, with these changes, in the background."""
        if changes:
            return replace(self, **changes).serve_command()
        words = ["serve", "--daemon"]
        words += ["--socket", self.socket] if self.socket else []
        for option, value in (
            ("--size", self.size),
            ("--name", self.name),
            ("--file", self.path),
            ("--directory", self.directory),
        ):
            words += [option, value] if value else []
        for user in self.accept_owner:
            words += ["--accept-owner", user]
        if self.hugepages:
            words.append("--hugepages")
            words += [] if self.hugepages is True else [str(self.hugepages)]
        return our_command(*words)
