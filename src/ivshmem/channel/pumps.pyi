from collections.abc import Callable
from typing import final

from .stream_poll import StreamPoll
from .streams import Stream

HAS_MORE: int
SOURCE_ENDED: int
STREAM_ENDED: int
STREAM_RESET: int
TARGET_BLOCKS: int
RESET_WAITS: int
HUNG_UP: int

@final
class Pump:
    inward: bool
    outward: bool
    readable: bool
    @property
    def failed(self) -> bool: ...
    @property
    def into(self) -> int: ...
    @property
    def out(self) -> int: ...
    def __init__(
        self,
        poll: StreamPoll,
        stream: Stream,
        source: int,
        target: int,
        *,
        share: int,
        piece: int,
        short_is_empty: bool,
        told: Callable[[int, Exception | None], object],
    ) -> None: ...
    def noted(self, events: int) -> None: ...
    def awaken(self, directions: int) -> None: ...
    def turn(self) -> None: ...
    def close(self) -> None: ...
