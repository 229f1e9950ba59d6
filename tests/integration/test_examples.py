"""The programs of examples/ run, in processes of their own."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.pages import HOME
from support.waiting import PATIENCE

from ivshmem import Directory, Region, Server, channel

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


def test_each_example_is_run() -> None:
    tests = Path(__file__).read_text()
    for example in filter(Path.is_file, EXAMPLES.iterdir()):  # test_monitoring.py has the folder
        assert example.stem in tests, example
