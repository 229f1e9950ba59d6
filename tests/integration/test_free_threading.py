"""A free-threaded CPython keeps its lock off when it has the package, and nothing goes wrong then.

On an ordinary CPython this is asked of a free-threaded one: IVSHMEM_FREE_THREADED names it, or it
is python3.14t or python3.13t on PATH. It runs the wheel that `make wheels` makes for it. `make
nightly` builds one by tests/support/free_threaded.py.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from support import unpacked, wheels

pytestmark = pytest.mark.nightly

CHECKOUT = Path(__file__).parents[2]

# -W error: a module that does not declare itself safe turns the lock on, with a warning.
PROBE = """
import importlib, importlib.machinery, sys
endings = tuple(importlib.machinery.EXTENSION_SUFFIXES)
for name in sys.argv[1:]:
    module = importlib.import_module("ivshmem." + name)
    assert module.__file__.endswith(endings), module
print(sys._is_gil_enabled())
"""


def probe(interpreter: str, *names: str, **environment: str) -> str:
    """Whether the lock is on after importing these modules, which are compiled."""
    environment = {**os.environ, **environment}
    environment.pop("PYTHON_GIL", None)  # it would decide the question
    result = subprocess.run(
        [interpreter, "-W", "error", "-c", PROBE, *names],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        check=False,
        cwd="/",
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def free(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, str]]:
    """A free-threaded interpreter, and the environment in which it has the package."""
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return sys.executable, {}
    wish = os.environ.get("IVSHMEM_FREE_THREADED")
    interpreter = wish or next(filter(None, map(shutil.which, wheels.NAMES)), None)
    if interpreter is None:
        pytest.skip("no free-threaded CPython: `make nightly` builds one")
    if lacking := wheels.missing():
        pytest.skip(lacking)
    try:
        built = wheels.extracted("cp3*t-*", tmp_path_factory.mktemp("free"))
    except unpacked.CannotError as error:
        pytest.fail(str(error), pytrace=False)
    return interpreter, {"PYTHONPATH": str(built)}


def test_the_lock_stays_off(free: tuple[str, dict[str, str]]) -> None:
    interpreter, environment = free
    rooms = CHECKOUT / "src/ivshmem"
    files = [file.relative_to(rooms).with_suffix("") for file in rooms.rglob("*.pyx")]
    assert len(files) > 10
    names = sorted(".".join(file.parts) for file in files)
    assert probe(interpreter, *names, **environment) == "False\n"


# What a lock would hide: views that another thread's close() meets, arrays that grow while others
# read them, doorbells that are closed while they are rung.
STRESS = """
import os, sys, threading
from ivshmem import ClosedError, Directory, NoSuchPeer, NoSuchVector, Region
from ivshmem._core import Doorbells

for _ in range(100):
    with Region.create("16K") as region, Directory.create(region, beat=1e-6) as table:
        table.publish("a", id=1)
        region.close()

class Bells(Doorbells):
    def _read_news(self): pass
    def _look_for(self, peer, vector):
        raise NoSuchPeer(str(peer))

fails = []
for _ in range(20):
    bells = Bells()
    bells._add_vector(os.eventfd(0, os.EFD_NONBLOCK))
    theirs = os.eventfd(0, os.EFD_NONBLOCK)
    bells._add_bell(1, os.dup(theirs))
    begin = threading.Barrier(5)

    def use(ring):
        begin.wait()
        try:
            for number in range(3000):
                try:
                    ring(number)
                except (NoSuchPeer, NoSuchVector):
                    pass
        except ClosedError:
            pass
        except BaseException as error:
            fails.append(error)

    def grow(number):
        bells._add_bell(1, os.dup(theirs))
        if number % 100 == 99:
            bells._drop_peer(1)
        if number == 2000:
            bells.close()

    users = [grow, lambda n: bells.ring(1, n % 64), lambda n: bells.ring_nowait(1, n % 64),
             lambda n: bells.ring_all_nowait([1], [0, n % 64]),
             lambda n: bells._doorbell_nowait(1, n % 64).ring()]
    threads = [threading.Thread(target=use, args=(user,)) for user in users]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    bells.close()
    os.close(theirs)
print(sys._is_gil_enabled(), fails, flush=True)
"""


def test_nothing_rests_on_the_lock(free: tuple[str, dict[str, str]]) -> None:
    interpreter, environment = free
    result = subprocess.run(
        [interpreter, "-W", "error", "-X", "faulthandler", "-c", STRESS],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
        check=False,
        cwd="/",
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "False []\n"


def test_channels_do_not_rest_on_it(free: tuple[str, dict[str, str]]) -> None:
    interpreter, environment = free
    paths = [environment.get("PYTHONPATH"), str(CHECKOUT / "tests")]
    result = subprocess.run(
        [interpreter, "-W", "error", "-X", "faulthandler", "-m", "support.channel_stress", "3"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        check=False,
        cwd="/",
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "False\n"
