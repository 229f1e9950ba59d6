"""Other modules in Cython ring, wait and run whole loops by way of the installed _core.pxd."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import shared
from support.waiting import Background, interrupt_when_asleep

import ivshmem
from ivshmem import testing

SOURCE = """
# cython: language_level=3
from libc.stdint cimport int64_t
from ivshmem.native.bell cimport Doorbell
from ivshmem._core cimport begin_wait, Doorbells, Wait
from ivshmem.native.mapping cimport AtomicU32
from ivshmem.native.spin cimport SPIN_AUTO


def echo(Doorbells endpoint, peer, int rounds, bint spin):
    cdef Doorbell bell = endpoint.doorbell(peer)
    cdef int64_t n = 0
    cdef int done = 0
    cdef int code = 0
    cdef Wait wait
    begin_wait(&wait, -1, SPIN_AUTO if spin else 0)
    while done < rounds:
        with nogil:
            while done < rounds:
                n = endpoint.wait_nogil(0, &wait)
                if n <= 0:
                    break
                begin_wait(&wait, -1, SPIN_AUTO if spin else 0)
                code = bell.ring_nogil()
                done += 1
        if n <= 0:
            endpoint.attend(n)
    return code


cdef struct Sum:
    int64_t rings
    int calls


cdef int add(void *context, int64_t rings) noexcept nogil:
    cdef Sum *total = <Sum *>context
    total.rings += rings
    total.calls += 1
    return 42 if total.calls == 3 else 0


def sum_up(Doorbells endpoint, int64_t rounds, int64_t timeout):
    cdef Sum total
    cdef int stopped
    total.rings = total.calls = 0
    done = endpoint.serve(1, add, &total, rounds, timeout, 0, &stopped)
    return done, total.rings, total.calls, stopped


def once(Doorbells endpoint, int64_t vector, int64_t timeout, int64_t spin=0):
    cdef int64_t n = -1
    cdef int calls = 0
    cdef Wait wait
    begin_wait(&wait, timeout, spin)
    while n < 0:
        with nogil:
            n = endpoint.wait_nogil(vector, &wait)
        calls += 1
        if n < 0:
            endpoint.attend(n)
    return n, calls


def peek(AtomicU32 word):
    return word.peek()
"""


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A module that is compiled against the installed package, as its users would."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler: apt-get install gcc")
    name = f"embedded{sysconfig.get_config_var('EXT_SUFFIX')}"

    def make(folder: Path) -> None:
        folder.mkdir()
        (folder / "embedded.pyx").write_text(SOURCE)
        cython = [sys.executable, "-m", "cython", "-3", "embedded.pyx"]
        subprocess.run(cython, cwd=folder, check=True)
        include = f"-I{sysconfig.get_paths()['include']}"
        options = ["-O1", "-shared", "-fPIC", "-w", include, "embedded.c", "-o", name]
        subprocess.run([compiler, *options], cwd=folder, check=True)

    library = shared.made_once(shared.folder(tmp_path_factory, "embedding") / "all", make) / name
    spec = importlib.util.spec_from_file_location("embedded", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def pair() -> Iterator[tuple[ivshmem.Client, ivshmem.Client]]:
    with (
        testing.server("64K", vectors=2) as server,
        ivshmem.connect(server.path) as a,
        ivshmem.connect(server.path) as b,
    ):
        yield a, b


Pair = tuple[ivshmem.Client, ivshmem.Client]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("spin", [False, True])
def test_a_loop_of_its_own(embedded: Any, pair: Pair, spin: bool) -> None:
    a, b = pair
    assert a.peers == [b.id]
    answering = Background(lambda: embedded.echo(b, a.id, 1000, spin))
    for _ in range(1000):
        a.ring(b.id)
        assert a.wait(0) == 1
    assert answering.result() == 0


def test_a_callback_in_c(embedded: Any, pair: Pair) -> None:
    a, b = pair
    a.ring(b.id, 1)
    a.ring(b.id, 1)
    assert embedded.sum_up(b, 10, 0) == (1, 2, 1, 0)
    waiting = Background(lambda: embedded.sum_up(b, 10, -1))
    waiting.wait_until_asleep()
    rung = 0
    while waiting.running:
        a.ring(b.id, 1)
        rung += 1
    result: Any = waiting.result()
    done, rings, calls, stopped = result
    assert (done, calls, stopped) == (3, 3, 42)
    assert 3 <= rings <= rung


def test_its_ends(embedded: Any, pair: Pair) -> None:
    a, b = pair
    assert embedded.once(b, 0, 0) == (0, 1)
    assert embedded.once(b, 0, 1_000_000) == (0, 1)
    assert embedded.once(b, 0, 20_000_000, 50_000_000)[0] == 0, "the spin does not renew the limit"
    a.ring(b.id)
    assert embedded.once(b, 0, -1) == (1, 1)
    with pytest.raises(OSError, match="not an eventfd"):
        embedded.once(b, 7, 0)
    with pytest.raises(KeyboardInterrupt), interrupt_when_asleep():
        embedded.echo(b, a.id, 1, False)
    waiting = Background(lambda: embedded.echo(b, a.id, 1, False))
    waiting.wait_until_asleep()
    b.close()
    with pytest.raises(ivshmem.ClosedError):
        waiting.result()
    with pytest.raises(ivshmem.ClosedError):
        embedded.once(b, 0, -1)
    with pytest.raises(ivshmem.ClosedError):
        embedded.echo(b, a.id, 1, False)


def test_a_word(embedded: Any, pair: Pair) -> None:
    word = pair[0].region.atomic_u32(64)
    word.store(7)
    assert embedded.peek(pair[1].region.atomic_u32(64)) == 7


def test_what_is_needed_is_installed() -> None:
    home = Path(ivshmem.__file__).parent
    parts = "bell", "descriptors", "syscalls", "mapping", "spin"
    for name in ("_core", *(f"native/{n}" for n in parts)):
        assert os.path.exists(home / f"{name}.pxd"), name
