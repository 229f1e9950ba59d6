"""What each command imports, at most: imports are nearly all of the time until a server listens.

A line here is allowed to shrink. Who adds a module measures first: `make bench ARGS='-k start'`.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.leaks import OWN
from support.peer import RawPeer
from support.stopping import users_environment
from support.waiting import PATIENCE, until

from ivshmem import control
from ivshmem.cli import channel, main

IVSHMEM = [sys.executable, "-X", "importtime", "-m", "ivshmem"]
SERVER = [
    sys.executable,
    "-X",
    "importtime",
    str(Path(sysconfig.get_path("scripts"), "ivshmem-server")),
]

# Costly parts of the standard library, which only some commands have a use for.
COSTLY = {
    *("asyncio", "ctypes", "datetime", "difflib", "email", "hashlib", "html", "http"),
    *("inspect", "logging", "multiprocessing", "numpy", "pdb", "platform", "queue", "random"),
    *("shutil", "ssl", "statistics", "subprocess", "tempfile", "tomllib", "traceback", "typing"),
    *("unittest", "urllib", "uuid", "xml", "zipfile", "zlib", "json", "socket", "dataclasses"),
    *("pathlib", "threading", "argparse", "prometheus_client", "qemu"),
}

START = "system __init__ __main__ errors text system.uncopied cli cli.main cli.run"
OPTIONS = (
    f"{START} protocol protocol.limits peer peer.limits server server.limits service "
    "service.limits peer.default_paths cli cli.arguments"
)
PARENT = (
    f"{OPTIONS} native native.descriptors native.ringers lasting lasting.supervisor system "
    "system.accounts qemu qemu.accounts system.new_files system.safe_files cli cli.serve "
    "cli.daemon cli.pid_file cli.signals cli.supervise lasting.supervised"
)
SERVES = (
    f"{OPTIONS} native native.descriptors native.ringers system text native.mapping native.wire "
    "server server.access system.accounts qemu qemu.accounts system.requests service "
    "service.reload_plan service.config service.control service.control_client "
    "system.processes system.new_files qemu.programs server.engine server.report lasting "
    "server.records server.region_server server.connection server.holds system.complaints "
    "lasting.handover service.snapshots lasting.journal lasting.supervisor system.locks "
    "server.log_events system.late_logging system.loop system.named_tuple system.systemd "
    "service.open_region memory memory.pages protocol protocol.roster protocol.framing "
    "protocol.session qemu.cmdline service.path_watch memory.region server.replay "
    "system.safe_files server.server service.service system.json_shapes memory.sizes "
    "system.sockets system.listener system.time_limits peer peer.inquiry peer.connecting "
    "system.credentials service.stall_log "
    "lasting.fd_store system.work_lock system.uncopied cli cli.banner cli.daemon "
    "cli.pid_file cli.signals service.managed cli.log_writer cli.writing cli.config_checks "
    "cli.log_queue server.log_formatters "
    "service.observability service.status "
    "cli.serve_process service.succession cli.supervise lasting.supervised"
)
ASKS = (
    f"{OPTIONS} native native.descriptors native.ringers system text system.accounts qemu "
    "qemu.accounts service service.control_client server system.named_tuple system.json_shapes "
    "memory memory.sizes system.sockets system.time_limits peer peer.inquiry peer.connecting "
    "system.credentials system.uncopied cli cli.control_connection"
)
LISTENS = (
    f"{OPTIONS} native native.descriptors native.ringers native.mapping native.wire server "
    "server.access "
    "system system.accounts qemu qemu.accounts service service.reload_plan service.config "
    "text system.new_files qemu.programs server.engine server.report lasting "
    "server.records server.region_server server.connection server.holds system.complaints "
    "lasting.journal lasting.supervisor system.locks server.log_events "
    "system.late_logging system.loop system.named_tuple system.systemd "
    "service.open_region system.processes memory memory.pages protocol protocol.roster "
    "protocol.framing protocol.session memory.region server.replay system.safe_files "
    "server.server service.service system.json_shapes memory.sizes system.sockets "
    "system.listener system.time_limits peer "
    "peer.inquiry peer.connecting system.credentials lasting.fd_store system.work_lock cli "
    "cli.daemon "
    "cli.pid_file cli.signals service.managed cli.log_writer cli.writing cli.serve "
    "cli.serve_process"
)
COSTLY_TO_LISTEN = "argparse socket threading"
COSTLY_TO_SERVE = f"{COSTLY_TO_LISTEN} json logging queue traceback zlib"
COSTLY_TO_ASK = "argparse json socket"

# The command, ivshmem's own modules, costly ones.
TABLE = {
    "help": (
        [*IVSHMEM, "--help"],
        (
            f"{START} protocol protocol.limits peer peer.limits server server.limits service "
            "service.limits"
        ),
        "argparse",
    ),
    "version": (
        [*IVSHMEM, "-V"],
        (
            f"{START} protocol protocol.limits peer peer.limits server server.limits service "
            "service.limits"
        ),
        "argparse",
    ),
    "status": (
        [*IVSHMEM, "status", "-S", "PATH"],
        (
            f"{ASKS} qemu qemu.programs system.processes cli cli.tables cli.status cli.status_text "
            "qemu.cmdline qemu.guest_name"
        ),
        f"{COSTLY_TO_ASK} shutil zlib",
    ),
    "evict": ([*IVSHMEM, "evict", "-S", "PATH", "7"], f"{ASKS} cli cli.evict", COSTLY_TO_ASK),
    "reload": ([*IVSHMEM, "reload", "-S", "PATH"], f"{ASKS} cli cli.reload", COSTLY_TO_ASK),
    "qemu": (
        [*IVSHMEM, "qemu", "-S", "PATH"],
        (
            f"{OPTIONS} native native.descriptors native.ringers system text system.accounts qemu "
            "qemu.accounts system.locks system.named_tuple system.json_shapes memory memory.sizes "
            "system.sockets system.time_limits peer peer.inquiry peer.connecting "
            "system.credentials cli cli.qemu "
            "qemu.cmdline qemu.old_device"
        ),
        "argparse json socket zlib",
    ),
    "serve": ([*IVSHMEM, "serve", "-S", "NEW"], f"{SERVES} cli cli.serve", COSTLY_TO_SERVE),
    "ivshmem-server": (
        [*SERVER, "-F", "-M", f"{OWN}imports", "-S", "NEW"],
        f"{SERVES} cli cli.compat",
        COSTLY_TO_SERVE,
    ),
    "the parent": (
        [*IVSHMEM, "serve", "--supervise", "-S", "NEW"],
        PARENT,
        "argparse",
    ),
}


def modules(importtime: str) -> set[str]:
    return {line.rpartition("|")[2].strip() for line in importtime.splitlines() if "|" in line}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", TABLE)
def test_a_command_imports_no_more(tmp_path: Path, name: str) -> None:
    command, ours, costly = TABLE[name]
    server, new = tmp_path / "server", tmp_path / "new"
    answering = subprocess.Popen(
        [sys.executable, "-m", "ivshmem", "serve", "-q", "-S", str(server), "-l", "64K"],
        stdout=subprocess.DEVNULL,
        env=users_environment(),
    )
    log = tmp_path / "log"
    words = [{"PATH": str(server), "NEW": str(new)}.get(word, word) for word in command]
    try:
        until(lambda: Path(f"{server}.control").exists(), "a server")
        with log.open("w") as file:
            process = subprocess.Popen(
                words, stdout=subprocess.DEVNULL, stderr=file, env=users_environment()
            )
            if "NEW" in command:
                until(lambda: Path(f"{new}.control").exists(), "another server")
                process.send_signal(signal.SIGTERM)
            process.wait(PATIENCE)
    finally:
        answering.terminate()
        answering.wait(PATIENCE)
    text = log.read_text()
    if name == "the parent":  # what the child imports comes after what it needs first
        text = text.partition("ivshmem.cli.supervise")[0]
    found = modules(text)
    own = {re.sub(r"^ivshmem\.?", "", each) or "__init__" for each in found if "ivshmem" in each}
    allowed = set(ours.split())
    assert own, text
    assert own <= allowed, f"imported, too: {sorted(own - allowed)}"
    others = {each.partition(".")[0] for each in found} & COSTLY
    assert "importlib.metadata" not in found
    assert others <= set(costly.split()), f"imported, too: {sorted(others - set(costly.split()))}"


def test_a_server_that_is_asked_imports_nothing_more(tmp_path: Path) -> None:
    """Nobody is served while a module is imported, and a watchdog's time goes by."""
    path, log = tmp_path / "server", tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*IVSHMEM, "serve", "-q", "-S", str(path)],
            stdout=subprocess.DEVNULL,
            stderr=file,
            env=users_environment(),
        )
    try:
        until(lambda: Path(f"{path}.control").exists(), "a server")
        with RawPeer(str(path)) as peer:
            peer.set_up(1)
            before = modules(log.read_text())
            for _ in range(2):
                request = {"do": "status", "peers": True}
                (region,) = control.request(f"{path}.control", request, PATIENCE)["regions"]
                assert len(region["peers"]) == 1
    finally:
        process.terminate()
        process.wait(PATIENCE)
    asked = {each for each in modules(log.read_text()) - before if each.startswith("ivshmem")}
    assert not asked


_LISTENING = """
import os, sys
from ivshmem.system import listener
def listen(listener, *_):
    os.unlink(listener.path)
    print(*sys.modules, flush=True)
    os._exit(0)
listener.Listener.listen = listen
from ivshmem.cli.main import main
main(["serve", "-S", sys.argv[1]])
"""


def test_a_server_imports_no_more_before_it_listens(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _LISTENING, str(tmp_path / "socket")],
        stdout=subprocess.PIPE,
        text=True,
        env=users_environment(),
        timeout=PATIENCE,
        check=True,
    )
    found = set(done.stdout.split())
    own = {
        each.removeprefix("ivshmem").lstrip(".") or "__init__"
        for each in found
        if "ivshmem" in each
    }
    assert own
    assert own <= set(LISTENS.split()), f"imported, too: {sorted(own - set(LISTENS.split()))}"
    others = {each.partition(".")[0] for each in found} & COSTLY
    assert others <= set(COSTLY_TO_LISTEN.split()), sorted(others)


# What a program imports that uses no more than this: rooms, and costly parts of Python.
LIBRARY = {
    "ivshmem.guest": (
        "guest memory native peer protocol system",
        "pathlib threading typing urllib",
    ),
    "ivshmem.channel": (
        "channel memory native peer protocol system",
        "hashlib threading typing zlib",
    ),
}


@pytest.mark.parametrize("name", LIBRARY)
def test_a_module_imports_no_more(name: str) -> None:
    """What is imported in a guest takes twenty times as long where the guest is emulated."""
    rooms, costly = (set(words.split()) for words in LIBRARY[name])
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", f"import {name}"],
        stderr=subprocess.PIPE,
        text=True,
        env=users_environment(),
        timeout=PATIENCE,
        check=True,
    )
    found = modules(done.stderr)
    assert name in found
    paths = [each.split(".")[1:] for each in found if each.startswith("ivshmem.")]
    reached = {path[0] for path in paths} - {"errors", "text", "_core"}
    assert reached <= rooms, f"imported, too: {sorted(reached - rooms)}"
    others = {each.partition(".")[0] for each in found} & COSTLY
    assert others <= costly, f"imported, too: {sorted(others - costly)}"


# What each command imports of the package, by its rooms; those of cli are counted below.
PEER = "memory native peer protocol system"
CHANNELS = f"channel {PEER}"
CONTROLS = "native peer protocol qemu service system"
ROOMS_OF = {
    "serve --check": "lasting memory native peer protocol qemu server service system",
    "connect -S PATH -c peers": PEER,
    "guest list": f"guest {PEER}",
    "guest bundle -o NEW.pyz": f"guest {PEER}",
    "channel ls -S PATH": CHANNELS,
    "channel put -S PATH log x": CHANNELS,
    "channel cat -S PATH log": CHANNELS,
    "channel hz -S PATH log": CHANNELS,
    "channel top -S PATH -n 1 -i 0.1": CHANNELS,
    "channel record -S PATH -t 0.1 NEW.mcap": f"{CHANNELS} recording",
    "forward -S PATH log --listen tcp:x": f"{CHANNELS} forward lasting server",
    "qemu -S PATH": "memory native peer qemu system",
    "doctor --host": f"{CONTROLS} doctor guest memory",
    "status -S PATH": f"{CONTROLS} memory",
    "top -S PATH": f"{CONTROLS} channel memory",
    "trace -S PATH -t 0.1 NEW.json": "native peer protocol service system tracing",
    "evict -S PATH 7": CONTROLS,
    "hold -S PATH 7": CONTROLS,
    "release -S PATH 7": CONTROLS,
    "reload -S PATH": CONTROLS,
    "save -S PATH NEW": PEER,
    "load -S PATH NEW": PEER,
    "migrate": "",
    "systemd install --directory NEW": "system",
    "bench -h": f"{CONTROLS} bench guest lasting memory server",
}


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A server that has an area for channels."""
    path = tmp_path_factory.mktemp("asked") / "server"
    words = ["serve", "-q", "-S", str(path), "-l", "1M", "--channels", "512K"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ivshmem", *words],
        stdout=subprocess.DEVNULL,
        env=users_environment(),
    )
    try:
        until(lambda: Path(f"{path}.control").exists(), "a server")
        yield path
    finally:
        process.terminate()
        process.wait(PATIENCE)


def test_each_command_has_a_line() -> None:
    assert {line.split()[0] for line in ROOMS_OF} == set(main.SUBCOMMANDS)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("line", ROOMS_OF)
def test_a_command_enters_no_other_room(asked: Path, tmp_path: Path, line: str) -> None:
    """A command of a channel knows nothing of servers, for example.

    `limits` of a room are numbers alone, for the help of options.
    """
    words = line.replace("PATH", str(asked)).replace("NEW", str(tmp_path / "new")).split()
    done = subprocess.run(
        [*IVSHMEM, *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=users_environment(),
        timeout=PATIENCE,
        check=False,
    )
    paths = [each.split(".")[1:] for each in modules(done.stderr) if each.startswith("ivshmem.")]
    assert ["cli", "main"] in paths, done.stderr
    rooms = {path[0] for path in paths if len(path) > 1 and path[1] != "limits"} - {"cli"}
    assert rooms <= set(ROOMS_OF[line].split()), done.stderr
    if words[0] == "channel":
        families = {path[1] for path in paths if path[0] == "cli" and path[1:]} & set(
            channel._FAMILIES
        )
        assert families == {name for name, own in channel._FAMILIES.items() if words[1] in own}
