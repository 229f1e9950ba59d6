"""Messages in C: by ivshmem_channel.h alone, and by a bare ring, the floor.

Knows: how channel.c is called. Does not know: what it does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ivshmem import channel
from ivshmem.bench.roundtrip import End

from .. import floor, in_memory
from .exchange import Exchange
from .ours import made, slots_of

_RINGS = 32 << 20  # bytes of the file with two rings


def build(program: Path) -> None:
    """Compile channel.c.

    Raises:
        NoCompiler: none was found.
    """
    floor.build("channels/channel.c", program, f"-I{channel.get_include()}")


class InC(Exchange):
    """Two runs of channel.c; `program` is the compiled one."""

    kind = ""
    program = Path()

    @property
    def settings(self) -> str:  # type: ignore[override]
        return f"slots={slots_of(self.size)}, both ends spin"

    @contextlib.contextmanager
    def ends(self) -> Iterator[tuple[End, End]]:
        with in_memory.folder() as directory:
            path = Path(directory) / "memory"
            words = [str(path), str(self.share(path)), str(self.size), str(self.count)]
            command = [str(self.program), self.kind]
            yield End([*command, "ping", *words]), End([*command, "echo", *words])

    def share(self, path: Path) -> int:
        """Make the file that both ends share; the offset of what is in it."""
        raise NotImplementedError


class Ring(InC):
    label = "C: bare ring"
    kind = "ring"

    def share(self, path: Path) -> int:
        with path.open("wb") as file:
            file.truncate(_RINGS)
        return 0


class Header(InC):
    label = "C: ivshmem_channel.h"
    kind = "header"

    def share(self, path: Path) -> int:
        return made(path, self.size)
