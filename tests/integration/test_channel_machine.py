"""What compilers make of ivshmem_channel.h: the fences of each kind of mapping, on each processor.

TCG and qemu-user run each instruction at once, so that a fence that is missing shows nothing there.
The model (tests/model) says where one must be; here the machine code has it. By night the header is
compiled for arm64, too, and its programs run.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ivshmem import channel

PROGRAMS = Path(__file__).parents[1] / "channel"


@dataclasses.dataclass(frozen=True)
class Machine:
    """A processor, and the programs for it."""

    prefix: str  # of the compiler's programs
    packages: str
    store_barrier: dict[str, list[str]]
    load_barrier: dict[str, list[str]]
    full_fence: dict[str, list[str]]
    exchange: dict[str, list[str]]
    instructions: str  # those that matter, as a pattern

    def program(self, name: str) -> str:
        program = self.prefix + name
        if shutil.which(program) is None:
            pytest.skip(f"no {program}: apt-get install {self.packages}")
        return program


KINDS = ("write_back", "write_combining", "uncached")


def by_kind(write_back: list[str], others: list[str]) -> dict[str, list[str]]:
    return {kind: write_back if kind == "write_back" else others for kind in KINDS}


MACHINES = {
    "x86_64": Machine(
        prefix="",
        packages="gcc binutils",
        store_barrier=by_kind([], ["sfence"]),
        load_barrier=by_kind([], ["lfence"]),
        full_fence=by_kind(["lock orl $0x0,(%rsp)"], ["mfence"]),
        exchange=by_kind(["lock cmpxchg"], ["sfence", "lock cmpxchg"]),
        instructions=r"[sml]fence|lock (?:orl \S+|cmpxchg)|mov +.*\(%rdi\).*",
    ),
    "aarch64": Machine(
        prefix="aarch64-linux-gnu-",
        packages="gcc-aarch64-linux-gnu libc6-dev-arm64-cross",
        store_barrier=by_kind(["dmb ishst"], ["dmb oshst"]),
        load_barrier=by_kind(["dmb ishld"], ["dmb oshld"]),
        full_fence=by_kind(["dmb ish"], ["dmb sy"]),
        exchange=by_kind(["dmb ish", "cas", "dmb ish"], ["dmb sy", "cas", "dmb sy"]),
        instructions=r"dmb \w+|ldar .*|stlr .*|cas\w* .*|bl .*<__aarch64_cas8_acq_rel.*",
    ),
}
HERE = os.uname().machine
BOTH = [
    pytest.param(name, marks=[] if name == HERE else [pytest.mark.nightly]) for name in MACHINES
]


def disassembled(machine: Machine, folder: Path, level: str) -> dict[str, list[str]]:
    """The instructions of each function of machine.c that order or move words."""
    object_ = folder / "machine.o"
    options = ["-std=c11", level, "-c", f"-I{channel.get_include()}"]
    command = [machine.program("gcc"), *options, str(PROGRAMS / "machine.c"), "-o", str(object_)]
    subprocess.run(command, check=True)
    command = [machine.program("objdump"), "-d", "--no-show-raw-insn", str(object_)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    functions: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        if head := re.fullmatch(r"[0-9a-f]+ <(\w+)>:", line):
            functions[head[1]] = found = []
        elif line.startswith(" ") and ":" in line:
            words = " ".join(line.split(":", 1)[1].split())
            if match := re.fullmatch(rf"({machine.instructions})(?:,\S+)?.*", words):
                found.append(named(match[1]))
    return functions


def named(instruction: str) -> str:
    """An instruction of either processor by what it does with a shared word, or as it is."""
    if re.match(r"mov +%|stlr ", instruction):
        return "store"
    if re.match(r"mov +0x|ldar ", instruction):
        return "load"
    return "cas" if "cas" in instruction else instruction


@pytest.mark.parametrize("level", ["-O2", pytest.param("-O3", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("name", BOTH)
def test_fences_in_the_machine_code(tmp_path: Path, name: str, level: str) -> None:
    """A word is one load or one store. What a compiler may omit, it has not omitted."""
    machine = MACHINES[name]
    found = disassembled(machine, tmp_path, level)
    for kind in KINDS:
        barrier = machine.store_barrier[kind]
        assert found[f"store_barrier_{kind}"] == barrier
        assert found[f"load_barrier_{kind}"] == machine.load_barrier[kind]
        assert found[f"full_fence_{kind}"] == machine.full_fence[kind]
        assert found[f"load_{kind}"] == ["load"]
        assert found[f"store_{kind}"] == ["store"]
        after = [] if kind == "write_back" else barrier
        assert found[f"announce_{kind}"] == [*barrier, "store", *after]
        assert found[f"exchange_{kind}"] == machine.exchange[kind]


def built(machine: Machine, folder: Path, name: str, *options: str) -> Path:
    program = folder / name
    command = [machine.program("gcc"), "-std=gnu11", "-O2", "-static", "-pthread", *options]
    source = [f"-I{channel.get_include()}", str(PROGRAMS / f"{name}.c"), "-o", str(program)]
    subprocess.run([*command, *source], check=True)
    return program


def test_only_a_queue_exchanges_words(tmp_path: Path) -> None:
    """Messages, values and bytes need no read-modify-write: it locks the bus on such memory."""
    here = dataclasses.replace(MACHINES[HERE], prefix="")
    said = subprocess.check_output(built(here, tmp_path, "traffic"), text=True)
    exchanges = dict(re.findall(r"^(\w+): [1-9].* (\d+) exchanges$", said, re.M))
    if HERE == "x86_64":
        assert exchanges.pop("queue") == "2000"
    assert exchanges == {"messages": "0", "value": "0", "bytes": "0"}


RUNS = [
    *(("steps_messages", way, name) for way in ("kill", "stop") for name in ("write", "adopt")),
    *(("steps_messages", way, name) for way in ("kill", "stop") for name in ("block", "discard")),
    *(("steps_queue", way, name) for way in ("kill", "stop") for name in ("put", "take", "get")),
    *(("steps_calls", way, name) for way in ("kill", "stop") for name in ("serve", "call")),
    *(("steps_bytes", way, name) for way in ("kill", "stop") for name in ("call", "accept")),
    ("hostile", "20000", "1"),
    ("threads", "1000"),
    ("discard",),
    ("overtaken",),
    ("traffic",),
]


@pytest.mark.nightly
@pytest.mark.parametrize("run", RUNS, ids=" ".join)
def test_on_arm64(tmp_path: Path, run: tuple[str, ...]) -> None:
    """A process is killed or stopped at each step; hostile words; threads. By qemu-user."""
    if shutil.which("qemu-aarch64") is None:
        pytest.skip("no qemu-aarch64: apt-get install qemu-user")
    program = built(MACHINES["aarch64"], tmp_path, run[0])
    done = subprocess.run(
        ["qemu-aarch64", str(program), *run[1:]], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if run[0] == "traffic":
        assert "queue: not in this mapping" in done.stdout
        assert done.stdout.count(", 0 exchanges") == 3
    elif run[0].startswith("steps"):
        assert re.fullmatch(rf"{run[2]}: \d\d+ steps\n", done.stdout)
