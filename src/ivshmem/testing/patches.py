"""Internal: replaces attributes for a while. pytest's MonkeyPatch is a Patcher, too."""

from __future__ import annotations

from typing import Any, Protocol

from ..system.uncopied import Uncopied


class Patcher(Protocol):
    """What replaces an attribute, and puts the former one back at its own end."""

    def setattr(self, target: Any, name: str, value: object, /) -> None: ...


class Patches(Uncopied):
    """A patcher for programs without pytest; a context manager that undoes the last one first."""

    def __init__(self) -> None:
        self._former: list[tuple[Any, str, object]] = []

    def setattr(self, target: Any, name: str, value: object, /) -> None:
        self._former.append((target, name, getattr(target, name)))
        setattr(target, name, value)

    def __enter__(self) -> Patches:
        return self

    def __exit__(self, *error: object) -> None:
        while self._former:
            setattr(*self._former.pop())
