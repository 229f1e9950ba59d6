"""A QMP monitor that answers as a test wants, in a thread; and what a QEMU would say."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

GREETING = {
    "QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}}, "capabilities": []},
}

# What is sent for a command: a value is a result; Refusal an error; bytes are sent as they are.
Answers = Callable[[str, Mapping[str, Any]], Any]


class Refusal(Exception):
    """A command that QEMU refuses."""

    def __init__(self, kind: str = "GenericError", text: str = "no such thing") -> None:
        super().__init__(text)
        self.kind = kind


class FakeMonitor:
    """Listens at a path and serves one client after another."""

    def __init__(self, path: Path, answers: Answers) -> None:
        self.answers = answers
        self.asked: list[str] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):  # shutdown() ends the accept()
            while True:
                client, _ = self._listener.accept()
                with client, contextlib.suppress(ConnectionError):
                    self._serve(client)

    def _serve(self, client: socket.socket) -> None:
        client.sendall(json.dumps(GREETING).encode() + b"\n")
        text = ""
        while data := client.recv(1 << 16):
            text += data.decode()
            while text.strip():  # requests need no end of line
                try:
                    message, end = json.JSONDecoder().raw_decode(text)
                except ValueError:
                    break
                text = text[end:].lstrip()
                self._answer(client, message)

    def _answer(self, client: socket.socket, message: Mapping[str, Any]) -> None:
        command, ident = message["execute"], message.get("id")
        self.asked.append(command)
        try:
            value = {}
            if command != "qmp_capabilities":
                value = self.answers(command, message.get("arguments", {}))
            if isinstance(value, bytes):
                data = value.replace(b"ID", json.dumps(ident).encode())
            else:
                data = json.dumps({"return": value, "id": ident}).encode()
        except Refusal as refusal:
            error = {"class": refusal.kind, "desc": str(refusal)}
            data = json.dumps({"error": error, "id": ident}).encode()
        client.sendall(data + b"\n")

    def __enter__(self) -> FakeMonitor:
        return self

    def __exit__(self, *error: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()


class FakeQemu:
    """Answers of a QEMU with one master device; `instead` has other ones, by command or property.

    A property is named PATH.PROPERTY, with the last part of the path.
    """

    def __init__(self, kind: str, status: str, where: str) -> None:
        self.instead: dict[str, Any] = {}
        plain = kind == "plain"
        self._lists = {
            "/machine/peripheral": [{"name": "m0", "type": f"child<ivshmem-{kind}>"}],
            "/machine/peripheral-anon": [],
            "/chardevs": [] if plain else [{"name": "bells", "type": "child<chardev-socket>"}],
            "/objects": [{"name": "mem", "type": "child<memory-backend-file>"}] if plain else [],
        }
        self._properties: dict[str, Any] = {
            "m0.parent_bus": "/machine/i440fx/pci.0",
            "m0.master": "on",
            "m0.addr": 56,
            "pci.0.hotplug-handler": "/machine/acpi",
        }
        if plain:
            self._properties |= {
                "m0.memdev": "/objects/mem",
                "mem.size": 1 << 20,
                "mem.mem-path": where,
                "mem.share": True,
                "mem.prealloc": False,
                "mem.host-nodes": [0],
            }
        else:
            self._properties |= {
                "m0.chardev": "/chardevs/bells",
                "m0.vectors": 2,
                "m0.ioeventfd": True,
                "ivshmem.bar2[0].size": 1 << 20,
                "bells.addr": {"type": "unix", "path": where},
            }
        self._commands: dict[str, Any] = {
            "query-status": {"status": status, "running": status == "running"},
            "query-migrate": {},
            "query-migrate-capabilities": [{"capability": "events", "state": False}],
            "query-version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "x"},
            "query-kvm": {"enabled": True, "present": True},
        }

    @property
    def keys(self) -> list[str]:
        """Everything that can be answered otherwise."""
        return [*self._commands, *self._lists, *self._properties]

    def __call__(self, command: str, arguments: Mapping[str, Any]) -> Any:
        if command == "qom-list":
            key = arguments["path"]
            usual = self._lists.get(key, [])
        elif command == "qom-get":
            key = f"{arguments['path'].rpartition('/')[2]}.{arguments['property']}"
            usual = self._properties.get(key, Refusal())
        else:
            key = command
            usual = self._commands.get(key, Refusal("CommandNotFound"))
        answer = self.instead.get(key, usual)
        if callable(answer):
            answer = answer()
        if isinstance(answer, Refusal):
            raise answer
        return answer
