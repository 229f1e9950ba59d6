"""The programs of examples/ run, in processes of their own."""

from __future__ import annotations

import configparser
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from support.emulator import QEMU
from support.pages import HOME
from support.waiting import PATIENCE, until

from ivshmem import Directory, Region, Server, channel, connect
from ivshmem.cli import main
from ivshmem.qemu import cmdline

EXAMPLES = HOME / "examples"


class Program:
    """An example that runs until the test ends it."""

    def __init__(self, *words: str) -> None:
        self.process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def end(self) -> str:
        """End it as Ctrl-C does; what it said of errors."""
        self.process.send_signal(signal.SIGINT)
        assert self.process.stderr is not None
        said = self.process.stderr.read()
        assert self.process.wait(PATIENCE) == 130, said
        return said

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def programs(socket_path: str) -> Iterator[list[Program]]:
    started: list[Program] = []
    with Server(socket_path, "32M", channels="16M").start():
        yield started
        for program in started:
            program.close()


def python(name: str, *words: str) -> tuple[str, ...]:
    return (sys.executable, "-W", "error", str(EXAMPLES / f"{name}.py"), *words)


def output_of(*words: str, status: int = 0) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == status, done.stderr
    return done.stderr if status else done.stdout


def test_frames(socket_path: str, programs: list[Program]) -> None:
    pytest.importorskip("numpy")
    programs.append(Program(*python("frames", "show", socket_path, "2")))
    programs.append(Program(*python("frames", "send", socket_path)))
    for _ in range(2):
        assert programs[0].line().startswith("mean ")
    assert programs[0].process.wait(PATIENCE) == 0


def test_call_server(socket_path: str, programs: list[Program]) -> None:
    programs.append(Program(*python("call_server", "serve", socket_path)))
    assert programs[0].line() == "serving"
    assert output_of(*python("call_server", "ask", socket_path, "2 3 5")) == "10\n"
    said = output_of(*python("call_server", "ask", socket_path, "2 x"), status=1)
    assert "the server cannot do that" in said
    assert "ValueError" in said
    assert programs[0].end() == ""


def test_work_queue(socket_path: str, programs: list[Program]) -> None:
    for _ in range(2):
        programs.append(Program(*python("work_queue", "work", socket_path)))
        assert programs[-1].line() == "ready"
    programs[0].end()
    assert output_of(*python("work_queue", "add", socket_path, "one", "two")) == ""
    assert [programs[1].line() for _ in range(2)] == ["doing one", "doing two"]
    assert programs[1].end() == ""


def test_latest_value(socket_path: str, programs: list[Program]) -> None:
    output_of(*python("latest_value", "set", socket_path, "21.5 C"))
    programs.append(Program(*python("latest_value", "watch", socket_path)))
    assert programs[0].line() == "21.5 C"
    output_of(*python("latest_value", "set", socket_path, "22 C"))
    assert programs[0].line() == "22 C"
    assert programs[0].end() == ""


def test_a_program_in_c(tmp_path: Path) -> None:
    """Python asks, and the program in C answers, in a region that is a file."""
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("no cc: apt-get install gcc")
    program = tmp_path / "channel"
    command = [compiler, "-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror"]
    command += [f"-I{channel.get_include()}", str(EXAMPLES / "channel.c"), "-o", str(program)]
    subprocess.run(command, check=True)
    path = tmp_path / "region"
    with Region.create("1M", path=path) as region:
        Directory.create(region, channels="512K").close()
        with channel.open(region) as channels:
            questions = channels.create_queue("questions", limit=256)
            answers = channels.create_queue("answers", limit=256)
            process = subprocess.Popen([program, path], stderr=subprocess.PIPE)
            with questions.writer() as writer, answers.reader() as reader, process:
                for i in range(100):
                    writer.put(b"what is %d?" % i, PATIENCE)
                    assert reader.get(PATIENCE) == b"WHAT IS %d?" % i
                assert [place.name for place in channels.places()].count("channel.c") == 1
                writer.put(b"", PATIENCE)
                assert process.wait(PATIENCE) == 0
            assert all(place.name != "channel.c" for place in channels.places())


def test_asyncio_server(socket_path: str) -> None:
    server = Program(*python("asyncio_server", socket_path))
    try:
        assert server.line() == "serving"
        with connect(socket_path, timeout=PATIENCE), connect(socket_path, timeout=PATIENCE) as two:
            assert [server.line().split(":")[0] for _ in range(2)] == [
                "peer 0 joined",
                "peer 1 joined",
            ]
            two.ring(0)
        assert server.line().startswith("peer 1 left: ")
        assert server.end() == ""
    finally:
        server.close()


# -- what other programs read ---------------------------------------------------------------------


def doorbell_of_web() -> tuple[str, list[str]]:
    """What `ivshmem qemu` prints for the server of the examples: XML, and words."""
    path = "/run/ivshmem-web.sock"
    return (
        cmdline.libvirt_doorbell(path, 4, name="web"),
        cmdline.doorbell(path, 4, ident="web"),
    )


def test_a_libvirt_domain() -> None:
    """libvirt's schema takes it; its device is the one that `ivshmem qemu --libvirt` prints."""
    domain = ElementTree.parse(EXAMPLES / "libvirt.xml").getroot()  # noqa: S314
    shmem = domain.find("devices/shmem")
    iommu = domain.find("devices/iommu")
    ioapic = domain.find("features/ioapic")
    assert shmem is not None
    assert iommu is not None
    assert ioapic is not None
    printed = ElementTree.fromstring(doorbell_of_web()[0])  # noqa: S314
    assert facts(shmem) == facts(printed)
    wanted = cmdline.libvirt_iommu("x86_64").split("-->")
    assert facts(ioapic) == facts(ElementTree.fromstring(wanted[1].split("<!--")[0]))  # noqa: S314
    assert facts(iommu) == facts(ElementTree.fromstring(wanted[2]))  # noqa: S314
    schema = Path(os.environ.get("LIBVIRT_SCHEMAS", "/usr/share/libvirt/schemas"), "domain.rng")
    if not (schema.exists() and shutil.which("xmllint")):
        pytest.skip(
            "libvirt's schema or xmllint is missing: apt-get install libvirt0 libxml2-utils"
        )
    words = ("xmllint", "--noout", "--nonet", "--relaxng", str(schema))
    output_of(*words, str(EXAMPLES / "libvirt.xml"))


def facts(element: ElementTree.Element) -> tuple[str, dict[str, str], dict[str, object]]:
    return element.tag, element.attrib, {child.tag: facts(child) for child in element}


def test_a_line_for_proxmox(socket_path: str) -> None:
    """QEMU takes exactly these words, and then has the device."""
    (line,) = re.findall(r"^args: (.*)$", (EXAMPLES / "proxmox.conf").read_text(), re.M)
    words = shlex.split(line)
    assert words == doorbell_of_web()[1]
    if not shutil.which(QEMU):
        pytest.skip("no QEMU: apt-get install qemu-system-x86")
    words = [word.replace("/run/ivshmem-web.sock", socket_path) for word in words]
    with Server(socket_path, "1M", vectors=4).start() as server:
        process = subprocess.Popen(
            [QEMU, "-S", "-nodefaults", "-display", "none", "-machine", "pc", *words],
            stderr=subprocess.PIPE,
        )
        try:
            until(lambda: server.peers or process.poll() is not None)
            assert process.poll() is None
            with connect(socket_path, timeout=PATIENCE) as host:
                host.ring(0, 3)
        finally:
            process.terminate()
            said = process.communicate(timeout=PATIENCE)[1]
        assert b"rror" not in said


def test_units_of_systemd(tmp_path: Path) -> None:
    """The drop-ins have options that the server takes; systemd finds no fault in the units."""
    unit = configparser.RawConfigParser()
    unit.read(EXAMPLES / "systemd/web.conf")
    options = unit["Service"]["Environment"].strip('"').removeprefix("OPTIONS=")
    words = ["serve", *shlex.split(options)]
    main._parser(words).parse_args(words)
    if not shutil.which("systemd-analyze"):
        pytest.skip("no systemd-analyze: apt-get install systemd")
    for unit_file in (HOME / "systemd/system").iterdir():
        text = unit_file.read_text().replace("ExecStart=ivshmem", f"ExecStart={sys.executable}")
        (tmp_path / unit_file.name).write_text(text)
    for kind, name in (("service", "web"), ("socket", "web-socket")):
        folder = tmp_path / f"ivshmem@web.{kind}.d"
        folder.mkdir()
        shutil.copy(EXAMPLES / f"systemd/{name}.conf", folder / "web.conf")
    service = (EXAMPLES / "systemd/frames.service").read_text()
    shutil.copy(EXAMPLES / "frames.py", tmp_path)
    (tmp_path / "frames.service").write_text(service.replace("/usr/bin/python3", sys.executable))
    said = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / "frames.service")],
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    ours = [line for line in said.stderr.splitlines() if re.search("web|frames", line)]
    assert not ours


def test_each_example_is_run() -> None:
    """And the table of examples/README.md has each."""
    tests = Path(__file__).read_text() + (HOME / "tests/vm/test_first_hour.py").read_text()
    page = (EXAMPLES / "README.md").read_text()
    for example in EXAMPLES.iterdir():
        if example.is_dir():  # test_monitoring.py has one of them
            assert f"`{example.name}/`" in page, example
        elif example.name != "README.md":
            assert f"]({example.name})" in page, example
            assert example.stem in tests, example
