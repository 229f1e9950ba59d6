from typing import Any

from typing_extensions import Buffer, Self, disjoint_base

from .ends import ChannelEnd
from .membership import Membership

def flat(data: Buffer) -> memoryview: ...

@disjoint_base
class WriterEnd(ChannelEnd):
    def __new__(
        cls,
        channels: Any,
        membership: Membership,
        found: dict[str, Any],
        message_type: Any = None,
    ) -> Self: ...
    @property
    def type(self) -> Any: ...
    @property
    def missed(self) -> int: ...
    @property
    def limit(self) -> int: ...
    def close(self) -> None: ...

@disjoint_base
class ReaderEnd(ChannelEnd):
    def __new__(
        cls,
        channels: Any,
        membership: Membership,
        found: dict[str, Any],
        message_type: Any = None,
        overflow: int = 0,
        history: int = 0,
    ) -> Self: ...
    @property
    def type(self) -> Any: ...
    @property
    def views(self) -> int: ...
