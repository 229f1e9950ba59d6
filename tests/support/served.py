"""A server with a control socket, as `ivshmem serve` has it."""

from __future__ import annotations

from typing import Any

from ivshmem import control
from ivshmem.service import control as service_control

from .running import Running


class Served(Running):
    """A region at `path`, named "default", with its control socket; runs in a thread."""

    def __init__(self, path: str, vectors: int = 2, size: int = 1 << 20, **more: Any) -> None:
        super().__init__({"default": path}, vectors, size=size, **more)
        self.add(
            service_control.Control(
                service_control.listen(control.default_path(path)), self.service
            )
        )
        self.start()
