from typing import Any

from typing_extensions import Self, final

from .membership import Membership
from .streams import Stream, StreamListener

MAY_SEND: int
MAY_RECEIVE: int
HAS_ENDED: int
HAS_RESET: int

@final
class StreamPoll:
    def __new__(cls, membership: Membership) -> Self: ...
    def fileno(self) -> int: ...
    def add(self, end: Stream | StreamListener, owner: Any) -> Sleeper: ...
    def ready(self) -> list[tuple[Any, int]]: ...
    def close(self) -> None: ...

@final
class Sleeper:
    def sleep(self, directions: int) -> int: ...
    def close(self) -> None: ...
