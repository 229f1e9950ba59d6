"""QEMU's monitor protocol, synchronously.

Knows: the handshake, commands and their answers, events.
Does not know: any particular command.
"""

import json
from typing import Any

from .wire import Deadline, Wire


class QmpError(AssertionError):
    """QEMU refused a command; `kind` is its error class, the message its description."""

    def __init__(self, command: str, error: dict[str, str]) -> None:
        super().__init__(f"{command}: {error['desc']}")
        self.kind = error["class"]


class Qmp:
    """A monitor connection. Owns the wire."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._greeted = False
        self._events: list[dict[str, Any]] = []

    def execute(self, command: str, arguments: dict[str, Any], deadline: Deadline) -> Any:
        """The command's result.

        Raises:
            QmpError: QEMU refused it.
            TimeoutError, EOFError: as Wire.readline. After a timeout it is of no more use.
        """
        if not self._greeted:
            self._wire.readline(deadline)
            self._greeted = True
            self.execute("qmp_capabilities", {}, deadline)
        self._wire.send(json.dumps({"execute": command, "arguments": arguments}), deadline)
        while True:
            message = self._read(deadline)
            if "error" in message:
                raise QmpError(command, message["error"])
            if "return" in message:
                return message["return"]

    def event(self, name: str, data: dict[str, Any], deadline: Deadline) -> dict[str, Any]:
        """Takes the first such event, past or to come, with these `data`; returns all its data.

        Raises:
            TimeoutError, EOFError: as Wire.readline; the events that came are kept.
        """
        seen = 0
        while True:
            for position in range(seen, len(self._events)):
                found = self._events[position].get("data", {})
                if self._events[position]["event"] == name and data.items() <= found.items():
                    del self._events[position]
                    return dict(found)
            seen = len(self._events)
            self._read(deadline)

    def close(self) -> None:
        self._wire.close()

    def _read(self, deadline: Deadline) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self._wire.readline(deadline))
        if "event" in message:
            self._events.append(message)
        return message
