"""A service in a thread, and what is watched by its loop."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Protocol, TypeVar

from ivshmem.config import RegionConfig, ServiceConfig
from ivshmem.server.server import Server
from ivshmem.service.control import Control
from ivshmem.service.service import Service


class Part(Protocol):
    """Something that the loop steps."""

    def fileno(self) -> int: ...
    def step(self) -> None: ...
    def __enter__(self) -> object: ...
    def __exit__(self, *error: object) -> None: ...


P = TypeVar("P", bound=Part)
R = TypeVar("R", bound="Running")


class Running:
    """A service of regions, by name and socket; runs in a thread from `start` on."""

    def __init__(
        self,
        sockets: dict[str, str],
        vectors: int = 2,
        load: Callable[[], ServiceConfig] | None = None,
        size: int = 4096,
        **more: Any,
    ) -> None:
        regions = {
            name: RegionConfig(path, size=size, vectors=vectors, **more)
            for name, path in sockets.items()
        }
        self._undo = ExitStack()
        self.service = self._undo.enter_context(Service(ServiceConfig(regions), load=load))
        self.service.open()
        self.failed: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def server(self, name: str = "default") -> Server:
        return self.service.regions[name].server

    def add(self, part: P) -> P:
        """Have the loop step this, which is closed at the end."""
        self._undo.enter_context(part)
        nests = isinstance(part, Control)
        self.service.watch(part.fileno(), part.step, nests=nests)
        self._undo.callback(self.service.unwatch, part.fileno())
        return part

    def _run(self) -> None:
        try:
            self.service.run()
        except BaseException as error:
            self.failed = error

    def start(self) -> None:
        self._thread.start()

    def __enter__(self: R) -> R:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._thread.is_alive():
            self.service.stop()
            self._thread.join()
        self._undo.close()
        if kind is None:
            assert self.failed is None, self.failed
