"""Fixtures of all tests, and the guard that fails a test which leaves something behind."""

from __future__ import annotations

import gc
import itertools
import os
import re
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from support.commands import forking
from support.leaks import OWN, SHM, Guard

import ivshmem

# No examples kept on disk: a failure prints what reproduces it.
hypothesis.settings.register_profile(
    "ivshmem",
    database=None,
    deadline=None,  # noisy machines
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    max_examples=25,
)
hypothesis.settings.load_profile("ivshmem")
hypothesis.settings.register_profile("nightly", max_examples=400)  # the rest as above

# Tests run in a user's environment: with PYTHONUNBUFFERED, for one, an output that nobody reads
# hangs nowhere. PYTHONMALLOC is for the sanitizers, PYTHONPATH for pytest-xdist.
for _name in [name for name in os.environ if name.startswith("PYTHON")]:
    if _name not in ("PYTHONMALLOC", "PYTHONPATH"):
        del os.environ[_name]

# Nor do nohup(1) and a shell's `&` change what signals do: what a process ignores, its children
# ignore. The tests themselves still outlive a hangup.
for _number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
    if signal.getsignal(_number) == signal.SIG_IGN:
        _interrupts = _number == signal.SIGINT
        signal.signal(_number, signal.default_int_handler if _interrupts else lambda *_: None)

# What CI may skip: what this Python, or this QEMU, cannot do, and a picture. Every other skip hides
# a failure there: no huge pages, no right to mount, no compiler.
_MAY_BE_SKIPPED = re.compile(r"in Python (before|3\.)|QEMU \d+|matplotlib|this is an sdist")

_FAILED = pytest.StashKey[bool]()
_GUARD = Guard()
_numbers = itertools.count()
_tests = itertools.count(1)


@pytest.hookimpl(tryfirst=True)  # before pytest looks at -m
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave all but every Nth case of a test that is marked sampled(N) to the night.

    Guests come first: the worker that has them boots them once, and the others take the rest.
    """
    items.sort(key=lambda item: not item.nodeid.startswith("tests/vm/"))
    seen: Counter[str] = Counter()
    for item in items:
        if (mark := item.get_closest_marker("sampled")) is None:
            continue
        test = item.nodeid.partition("[")[0]
        if seen[test] % mark.args[0]:
            item.add_marker("nightly")
        seen[test] += 1


def look_no_more() -> None:
    """Have later collections not look at what exists now, which is not garbage.

    They take a quarter of a second else, once some thousand tests have run.
    """
    gc.collect()
    gc.freeze()


def pytest_collection_finish() -> None:
    look_no_more()


@pytest.hookimpl(hookwrapper=True)  # not wrapper=True, which pytest 7 of Debian 12 lacks
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, Any, None]:
    report = (yield).get_result()
    if report.skipped and "CI" in os.environ and isinstance(report.longrepr, tuple):
        file, line, reason = report.longrepr
        if not _MAY_BE_SKIPPED.search(reason):
            report.outcome = "failed"
            report.longrepr = f"{file}:{line}: in CI a skipped test is a failure: {reason}"
    if report.failed:
        item.stash[_FAILED] = True


def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> None:
    """Not called for a session's, which have descriptors: the guard sees those."""
    if fixturedef.scope != "function":
        _GUARD.changed()


@pytest.fixture(autouse=True)
def leak_guard(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves a descriptor, a shared mapping or a name in /dev/shm behind."""
    if next(_tests) % 200 == 0:
        look_no_more()
    _GUARD.begin()
    yield
    # A failed test's traceback keeps its objects alive, which says nothing.
    if not request.node.stash.get(_FAILED, False):
        left = _GUARD.left()
        assert not left, "left behind:\n  " + "\n  ".join(left)


@pytest.fixture(scope="session")
def commands() -> Iterator[None]:
    """What support.commands.run needs; before the guard looks, since it lasts."""
    with forking():
        yield


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory with a short path, open to every user."""
    path = Path(tempfile.mkdtemp(prefix="ivt", dir="/tmp"))
    path.chmod(0o777)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def socket_path(directory: Path) -> Iterator[str]:
    """A free path for a server's socket, which must be free again afterwards."""
    path = directory / "socket"
    yield str(path)
    assert not os.path.lexists(path), "the socket was left behind"


@pytest.fixture
def shm_name() -> Iterator[str]:
    """A free POSIX name; removed afterwards if the test has made it."""
    name = f"{OWN}{next(_numbers)}"
    yield name
    (SHM / name).unlink(missing_ok=True)


@pytest.fixture
def server(socket_path: str) -> Iterator[Callable[..., ivshmem.Server]]:
    """Makes servers at `socket_path`, started in a thread unless `start=False`; closes them."""
    with ExitStack() as servers:

        def make(
            memory: ivshmem.Region | int | str = 4096,
            vectors: int = 1,
            *,
            start: bool = True,
            **kwargs: Any,
        ) -> ivshmem.Server:
            made = servers.enter_context(ivshmem.Server(socket_path, memory, vectors, **kwargs))
            return made.start() if start else made

        yield make
