from collections.abc import Iterable, Sequence
from typing import Any, final

from typing_extensions import Buffer

from .descriptors import Fd

OUTBOX_BYTES: int

@final
class Outbox:
    def __new__(cls, buffer: Buffer | None = None) -> Outbox: ...
    def send(
        self, sock: int, runs: Iterable[tuple[Any, ...]], region: int = 0, serial: int = 0
    ) -> int: ...
    def send_to_all(
        self, socks: Sequence[int], first: int, runs: Iterable[tuple[Any, ...]], region: int = 0
    ) -> tuple[int, int, int, int]: ...
    def unfinished(self) -> tuple[int, int, int, int, int] | None: ...

_Chunk = tuple[bytes, tuple[Fd, ...]]

def receive(
    sock: int, limit: int, into: list[_Chunk] | None = None
) -> tuple[list[_Chunk], bool]: ...
