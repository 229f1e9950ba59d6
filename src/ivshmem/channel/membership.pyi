from typing import Any
from weakref import WeakKeyDictionary

from typing_extensions import Self, disjoint_base, final

from .._core import Doorbells
from ..native.mapping import Mapping

NO_AREA: str

@final
class Membership:
    def __new__(
        cls,
        region: Mapping,
        offset: int,
        endpoint: Doorbells | None,
        vector: int,
        mapping: int,
        beat: float,
        lease: float,
        name: str,
    ) -> Self: ...
    def __reduce__(self) -> Any: ...
    @property
    def endpoint(self) -> Doorbells | None: ...
    @property
    def vector(self) -> int: ...
    @property
    def loops(self) -> WeakKeyDictionary[Any, Any] | None: ...
    @property
    def readonly(self) -> bool: ...
    @property
    def closed(self) -> bool: ...
    def run(self) -> None: ...
    def places(self) -> list[tuple[int, int, str, int, int | None, int, str]]: ...
    def free_place(self, index: int) -> bool: ...
    def close(self) -> None: ...

@disjoint_base
class Dependent: ...
