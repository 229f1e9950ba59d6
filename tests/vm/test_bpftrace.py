"""The lines of docs/howto/observe.md for bpftrace, in a guest: they see exactly what happens there.

In a guest, because not each machine that runs the tests lets bpftrace load programs.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil

import pytest
from support.pages import HOME, shell_lines

from .harness import MakeGuest

# Argument: the lines, as lists of words in JSON. Of each: what bpftrace said while one peer rang
# another 20 times by a doorbell, which took that; rang it once by a channel; waited in vain for a
# tenth of a second; and a third one joined and left. All are in one process.
PROGRAM = """
    import json, os, signal, subprocess, sys, threading, time
    import ivshmem
    from ivshmem import channel

    for kind, place in (("debugfs", "/sys/kernel/debug"), ("tracefs", "/sys/kernel/tracing")):
        subprocess.run(["mount", "-t", kind, kind, place], check=True)

    def act(server, one, two, reader, writer):
        reading = threading.Thread(target=reader.get)
        reading.start()
        time.sleep(1)
        writer.put(b"a")
        reading.join()
        for _ in range(20):
            one.ring(two.id, 1)
            assert two.wait(1, timeout=60) == 1
        with ivshmem.connect(server.path):
            one.wait(0, timeout=0.1)

    with (
        ivshmem.Server("/tmp/socket", "1M", vectors=2, channels="256K").start() as server,
        ivshmem.connect(server.path) as one,
        ivshmem.connect(server.path) as two,
        channel.open(one) as own,
        channel.open(two) as other,
        own.create_messages("a", limit=8).reader() as reader,
        other.open("a").writer() as writer,
    ):
        print("PID", os.getpid(), flush=True)
        for words in json.loads(sys.argv[1]):
            process = subprocess.Popen(
                [word.replace("4711", str(os.getpid())) for word in words],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            said = process.stdout.readline()
            time.sleep(2)
            act(server, one, two, reader, writer)
            time.sleep(1)  # it reads what the kernel has noted a moment later
            process.send_signal(signal.SIGINT)
            print("SAID", json.dumps(said + process.communicate()[0]), flush=True)
    """


@pytest.mark.nightly
def test_each_line_sees_what_it_says(guest: MakeGuest) -> None:
    if shutil.which("bpftrace") is None:
        pytest.skip("needs bpftrace: apt-get install bpftrace")
    lines = [
        shlex.split(line)
        for line in shell_lines(HOME / "docs/howto/observe.md")
        if line.startswith("bpftrace ")
    ]
    a = guest(PROGRAM, argv=[json.dumps(lines)], memory="512M", cpus=2)
    pid = int(a.expect("PID").split()[1])
    said = [json.loads(a.expect("SAID", 300).partition(" ")[2]) for _ in lines]
    assert a.wait() == 0
    rings, rings_of_channels, taken, waits, joins, ends = said
    assert 20 <= count(rings, f"@rings[python, {pid}]") < 100  # others also write 8 bytes
    assert count(rings_of_channels, f"@rings_of_channels[python, {pid}]") == 1
    assert count(taken, f"@taken[python, {pid}]") >= 21
    assert re.search(r"^@waits\[python\]: *\n(.*\n)*\[64M, 128M\) +[1-9]", waits, re.MULTILINE)
    assert len(re.findall(r"^join: descriptor \d+$", joins, re.MULTILINE)) == 1
    shut = re.findall(r"^set-up sent, or end: descriptor (\d+)$", ends, re.MULTILINE)
    assert shut.count(shut[0]) == 2  # and once by the peer itself, which is this process, too


def count(said: str, what: str) -> int:
    """The value of one key of a map that bpftrace printed."""
    found = re.search(rf"^{re.escape(what)}: (\d+)$", said, re.MULTILINE)
    assert found is not None, said
    return int(found[1])
