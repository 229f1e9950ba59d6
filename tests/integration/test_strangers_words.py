"""Words of strangers on each way out: terminal, log, metrics, messages. One table."""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from support.waiting import PATIENCE

import ivshmem
from ivshmem import control, errors
from ivshmem.bench import noise
from ivshmem.cli import banner, control_connection, evict, log_writer, migrate_run, reload
from ivshmem.cli import shell as shells
from ivshmem.cli import status as status_command
from ivshmem.cli import top as top_command
from ivshmem.cli.browser import Browser
from ivshmem.cli.main import main
from ivshmem.cli.run import one_line
from ivshmem.cli.screen import Screen
from ivshmem.cli.writing import Aside
from ivshmem.config import RegionConfig, ServiceConfig, parse
from ivshmem.doctor.check import CheckStep, failed, run
from ivshmem.doctor.open_files import FoundProcess
from ivshmem.peer import connecting
from ivshmem.peer.names_table import Entry
from ivshmem.qemu import cmdline
from ivshmem.qemu.guest_name import guest_name
from ivshmem.server import log_events
from ivshmem.server.report import Peer
from ivshmem.service import control as service_control
from ivshmem.service import metrics
from ivshmem.system import credentials, systemd

# A line that could be ours, colours, a line that runs backwards, a name that looks like another.
HOSTILE = "x\nfix: rm -rf ~\r\x1b[31m\x9b2J\u202eok\u2066\u200b\u2028\udcff\ufe0f"
FORGED = (
    "\nfix:",
    "\r",
    "\x1b",
    "\x9b",
    "\u202e",
    "\u2066",
    "\u200b",
    "\u2028",
    "\udcff",
    "\ufe0f",
)


class Talker:
    """A control socket's client that answers what it is told."""

    def __init__(self, answer: Mapping[str, Any]) -> None:
        self._answer = dict(answer)
        self.server = types.SimpleNamespace(uid=os.geteuid())

    def ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        return self._answer

    def __enter__(self) -> Talker:
        return self

    def __exit__(self, *error: object) -> None: ...


def status() -> dict[str, Any]:
    peer = {
        "id": 1,
        "pid": 0,
        "uid": 0,
        "gid": 0,
        "process": HOSTILE,
        "names": [HOSTILE],
        "guest": HOSTILE,
        "vectors": 1,
        "since": 0.0,
        "readonly": False,
        "set_up": True,
        "pending": 0,
        "stalled_since": None,
        "leaves_told": True,
        "leaves_held": 0,
        "interrupts": [0],
    }
    region = {
        "name": HOSTILE,
        "size": 4096,
        "source": HOSTILE,
        "memory": HOSTILE,
        "socket": HOSTILE,
        "vectors": 1,
        "paused": HOSTILE,
        "counts": {},
        "peers": [peer],
    }
    server = {
        "pid": 1,
        "version": HOSTILE,
        "time": 1.0,
        "since": 0.0,
        "fds": {"open": 1, "limit": None},
        "resident": 1,
        "cpu": 0.0,
        "pid_namespace": 0,
    }
    return {"server": server, "regions": [region]}


class Ways:
    """Each method is a way out, and returns what came out there."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys = capsys
        self._patch = monkeypatch
        # pytest-xdist cannot pass on what pytest captures of this.
        monkeypatch.setattr(logging.getLogger("ivshmem"), "propagate", False)

    def _printed(self, run: Callable[[], object]) -> str:
        run()
        said = self._capsys.readouterr()
        return said.out + said.err

    # -- doctor ---------------------------------------------------------------

    def doctor_s_command_lines(self) -> str:
        return str(FoundProcess(1, ["python3", HOSTILE]))

    def doctor_s_findings(self) -> str:
        (check,) = run("host", [CheckStep("server", lambda: failed(HOSTILE, f"kill {HOSTILE}"))])
        return f"{check.found}{check.fix}"

    # -- the control socket ---------------------------------------------------

    def status_as_text(self) -> str:
        return status_command.text(status())

    def status_as_json(self) -> str:
        return json.dumps(status())

    def top(self) -> str:
        output = io.StringIO()
        screen = object.__new__(Screen)
        screen._aside = Aside(output)
        screen._coloured = False
        content = list(top_command.content_of(status(), None, {"default": HOSTILE}))
        screen.draw(Browser().lines(content, 500, 50))
        screen._aside.settle()
        screen._aside.close()
        text = output.getvalue()
        # The lines that `top` itself moves to.
        return (
            text.replace("\x1b[H", "")
            .replace("\x1b[K", "")
            .replace("\x1b[J", "")
            .replace("\r\n", "")
        )

    def a_reload_s_changes(self) -> str:
        talker = Talker({"changes": [HOSTILE]})
        self._patch.setattr(control_connection, "connect", lambda *_: talker)
        return self._printed(lambda: reload.run(argparse.Namespace()))

    def an_eviction(self) -> str:
        talker = Talker({"region": HOSTILE})
        self._patch.setattr(control_connection, "connect", lambda *_: talker)
        options = argparse.Namespace(id=1, region=None, force=True)
        return self._printed(lambda: evict.run(options))

    def a_control_socket_s_refusal(self) -> str:
        ours, theirs = socket.socketpair()
        self._patch.setattr(connecting, "connect", lambda *_, **__: ours)
        with theirs, control.ControlClient("/s", 5.0) as client:
            theirs.sendall(json.dumps({"ok": False, "error": HOSTILE}).encode() + b"\n")
            with pytest.raises(control.ControlError) as caught:
                client.ask({"do": "status"})
        return str(caught.value)

    def an_error_over_the_control_socket(self) -> str:
        return service_control._one_line(ValueError(HOSTILE)) + service_control._one_line(
            FileNotFoundError(2, HOSTILE, HOSTILE)
        )

    # -- messages -------------------------------------------------------------

    def an_error(self) -> str:
        return one_line(errors.IvshmemError(HOSTILE))

    def an_error_with_a_file_s_name(self) -> str:
        return one_line(FileNotFoundError(2, "No such file", HOSTILE))

    def an_unknown_subcommand(self) -> str:
        with pytest.raises(SystemExit):
            main([HOSTILE])
        return self._capsys.readouterr().err.removesuffix("\n")

    def a_value_of_an_option(self) -> str:
        with pytest.raises(SystemExit):
            main(["serve", "--vectors", HOSTILE])
        return self._capsys.readouterr().err.removesuffix("\n")

    def a_configuration(self) -> str:
        words = json.dumps(HOSTILE.replace("\udcff", ""))
        text = f'[region.a]\nsocket = "/s"\n{words} = 1\nsize = {words}\n'
        with pytest.raises(ValueError, match="unknown") as caught:
            parse(text.encode(), "/etc/x.toml")
        return one_line(caught.value)

    # -- names of peers -------------------------------------------------------

    def a_guest_s_name(self) -> str:
        return str(guest_name(["qemu-system-x86_64", "-name", HOSTILE]))

    def a_process_s_name(self) -> str:
        comm = Path("/proc/self/comm")
        before = comm.read_bytes().removesuffix(b"\n")
        ours, theirs = socket.socketpair()
        try:
            comm.write_bytes(b"x\nfix:\x1b\xff\xc2\x9b")
            with ours, theirs:
                return credentials.credentials(ours).process
        finally:
            comm.write_bytes(before)

    def a_disturber_s_name(self) -> str:
        process = noise.Process(HOSTILE, 0, 10**9)
        before = types.SimpleNamespace(others={1: noise.Process(HOSTILE, 0, 0)}, main={})
        after = types.SimpleNamespace(others={1: process}, main={})
        (found,) = noise._culprits(before, after, {0}, 10**9)  # type: ignore[arg-type]
        return found.who

    def names_in_memory(self) -> str:
        shell = shells.Shell(types.SimpleNamespace(id=1))  # type: ignore[arg-type]
        entry = Entry(1, HOSTILE, HOSTILE, range(1), True)
        shell._names = types.SimpleNamespace(entries=lambda: [entry])  # type: ignore[assignment]
        said = self._printed(lambda: shell.onecmd("names"))
        shell.json = True
        as_json = json.loads(self._printed(lambda: shell.onecmd("names")))
        (entry_as_json,) = as_json["names"]
        return f"{said[:-1]}{entry_as_json['name']}{entry_as_json['role']}"

    # -- logs, metrics, the service manager -----------------------------------

    def _logged(self, form: str, record: logging.LogRecord) -> str:
        with tempfile.TemporaryFile("w+") as stream:
            with log_writer.LogWriter(stream, logging.INFO, form):
                logging.getLogger("ivshmem").handle(record)
            stream.seek(0)
            return stream.read()

    def a_log_as_text(self) -> str:
        return self._logged(
            "text", logging.LogRecord("ivshmem", 30, "", 0, "%s", (HOSTILE,), None)
        ).removesuffix("\n")

    def a_traceback_in_a_log(self) -> str:
        try:
            raise ValueError(HOSTILE)
        except ValueError as error:
            info = type(error), error, error.__traceback__
        record = logging.LogRecord("ivshmem", 30, "", 0, "failed", (), info)
        text = self._logged("text", record)
        assert all(line.startswith("    ") for line in text.splitlines()[1:])
        return text.replace("\n", "")

    def a_log_as_json(self) -> str:
        record = logging.LogRecord("ivshmem", 30, "", 0, "%s", (HOSTILE,), None)
        vars(record).update(log_events.fields("joined", process=HOSTILE))
        found = json.loads(self._logged("json", record))
        return str(found["text"] + found["process"])

    def news_of_a_peer(self) -> str:
        with tempfile.TemporaryFile("w+") as stream:
            with log_writer.LogWriter(stream, logging.INFO):
                log_writer.tell_peer("joined", Peer(1, 1, 1, 1, HOSTILE, 1, 0.0))
            stream.seek(0)
            return stream.read().removesuffix("\n")

    def a_label_of_a_figure(self) -> str:
        pytest.importorskip("prometheus_client")
        server = types.SimpleNamespace(
            region=types.SimpleNamespace(size=1),
            vectors=1,
            paused="",
            counts=ivshmem.ServerCounts(),
            report=list,
        )
        served = types.SimpleNamespace(server=server)
        service = types.SimpleNamespace(regions={HOSTILE: served})
        figures = metrics.Figures(service, peers=True)
        return "".join(
            label
            for metric in figures.collect()
            for sample in metric.samples
            for label in sample.labels.values()
        )

    def a_status_for_the_service_manager(self) -> str:
        return str(systemd._status(HOSTILE)["STATUS"])

    # -- migrate, and what is printed to be pasted ------------------------------

    def a_step_of_a_migration(self) -> str:
        shown: list[str] = []
        progress = types.SimpleNamespace(show=lambda _, what: shown.append(what))
        migrate_run.ProgressLines(progress, False).step(1, HOSTILE, False)  # type: ignore[arg-type]
        return "".join(shown)

    def qemu_s_arguments(self) -> str:
        return cmdline.shell(cmdline.doorbell(HOSTILE, 1))

    def libvirt_s_xml(self) -> str:
        harmless = HOSTILE.replace("\x1b", "").replace("\udcff", "")
        return cmdline.libvirt_doorbell(harmless, 1, name=harmless)

    def a_plan_of_regions(self) -> str:
        return banner.planned(
            ServiceConfig({HOSTILE: RegionConfig(HOSTILE, 4096, name=HOSTILE)}, source=HOSTILE)
        )


WAYS = [name for name in vars(Ways) if not name.startswith("_")]


@pytest.mark.parametrize("way", WAYS)
def test_nothing_gets_through(
    way: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = getattr(Ways(capsys, monkeypatch), way)()
    assert shown, "the way was not taken"
    assert "x" in shown
    for sign in FORGED:
        assert sign not in shown
    for line in shown.split("\n"):
        assert line.isprintable()


def test_what_libvirt_cannot_be_told_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a\\x1b: XML"):
        cmdline.libvirt_doorbell("a\x1b", 1)


@pytest.mark.parametrize("path", ["/a b,c", "/a\"b'<&>", "/a\u202eb\n", "/\u4e16"])
def test_an_attribute_is_read_back(path: str) -> None:
    text = cmdline.libvirt_doorbell(path, 1, name=path)
    element = ElementTree.fromstring(text)  # noqa: S314
    server = element.find("server")
    assert server is not None
    assert server.get("path") == element.get("name") == path


def test_a_terminal_that_has_not_all_characters(tmp_path: Path) -> None:
    """A traceback in the midst of a table would be no help."""
    file = tmp_path / "\u4e16"
    file.write_bytes(bytes(4096))
    done = subprocess.run(
        [sys.executable, "-m", "ivshmem", "qemu", "-f", str(file), "--iommu"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert r"mem-path=" in done.stdout
