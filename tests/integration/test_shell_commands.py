"""Each command of `ivshmem connect` does what its help says, for people and as JSON."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from support.stopping import users_environment
from support.waiting import PATIENCE

from ivshmem import testing
from ivshmem.cli.shell import ClientShell

# Of each command, a line, and the start of what it prints; "": nothing has happened.
LINES = {
    "dump": ("dump", "id 0, 2 vectors"),
    "exit": ("exit", ""),
    "help": ("help info", "info: what the region is made of"),
    "hexdump": ("hexdump 0 16", "00000000  00"),
    "info": ("info", "size 65536"),
    "int": ("int 0 1", "rang 1 doorbell"),
    "names": ("names", "no peer has published a name"),
    "peers": ("peers", "no other peers"),
    "publish": ("publish me", "published me"),
    "quit": ("quit", ""),
    "read": ("read 0 u32", "0x0 (0)"),
    "ring": ("ring 0 1", "rang 1 doorbell"),
    "wait": ("int 0 1; wait 1 5", "rang 1 doorbell"),
    "watch": ("watch 0", ""),
    "write": ("write 8 u8 1", "wrote 1 byte at 0x8"),
}


def test_the_table_has_each_command() -> None:
    found = {name.removeprefix("do_") for name in dir(ClientShell) if name.startswith("do_")}
    assert set(LINES) == found - {"EOF"}


@pytest.mark.sampled(8)
@pytest.mark.parametrize("json_wanted", [False, True], ids=["text", "json"])
@pytest.mark.parametrize("command", LINES)
def test_a_command(command: str, json_wanted: bool) -> None:
    line, start = LINES[command]
    with testing.server("64K", 2, names=True) as server:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "ivshmem", "connect", "-S", server.path, "-c", line),
                *(["--json"] if json_wanted else []),
            ],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            env=users_environment(),
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, "")
    if not json_wanted or command == "help":
        assert done.stdout.startswith(start)
        assert bool(done.stdout) == bool(start)
        return
    told = [json.loads(each) for each in done.stdout.splitlines()]
    assert all(isinstance(each, dict) for each in told)
    assert bool(told) == bool(start)


def test_info_names_what_it_tells() -> None:
    with testing.server() as server:
        done = subprocess.run(
            [sys.executable, "-m", "ivshmem", "connect", "--json", "-S", server.path, "-c", "info"],
            capture_output=True,
            timeout=PATIENCE,
            env=users_environment(),
            check=True,
        )
        told = json.loads(done.stdout)
        assert told == {**server.region.info()._asdict(), "source": "descriptor"}
