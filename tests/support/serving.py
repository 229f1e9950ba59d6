"""A service whose loop runs in a thread, and to which the test speaks from its own."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

from ivshmem.config import ServiceConfig
from ivshmem.native import descriptors
from ivshmem.service.service import Service

from .waiting import PATIENCE, Background

T = TypeVar("T")


class Running:
    """A service that runs; all calls of it are made by its loop."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._bell = descriptors.FdArray.eventfds(1)
        service.watch(self._bell[0], self._act)
        self._thread = Background(service.run)

    def _act(self) -> None:
        self._bell.drain(0)
        while self._calls:
            call, future = self._calls.popleft()
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)

    def call(self, call: Callable[[], T]) -> T:
        """Let the loop do this between two steps of regions."""
        future: Future[T] = Future()
        self._calls.append((call, future))
        self._bell.signal(0)
        return future.result(PATIENCE)

    def change(self, config: ServiceConfig) -> list[str]:
        return self.call(lambda: self.service.change(config))

    def ended(self) -> None:
        """Wait until the loop has ended by itself."""
        self._thread.result()

    def end(self) -> None:
        self.service.stop()
        self.ended()
        self.service.unwatch(self._bell[0])
        self._bell.close()


@contextlib.contextmanager
def running(config: ServiceConfig, **kwargs: Any) -> Iterator[Running]:
    """Serve a configuration while the block runs."""
    with Service(config, **kwargs) as service:
        service.open()
        runs = Running(service)
        try:
            yield runs
        finally:
            runs.end()
