"""Fixtures of the vm tests; all of them carry the marker `vm`."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import pytest

import ivshmem

from . import image, kernels, residents
from .harness import Guest, MakeGuest
from .host import TIMEOUT, Events

_T = TypeVar("_T")

HERE = f"{Path(__file__).parent}/"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if str(item.path).startswith(HERE):  # is_relative_to: a second for all tests
            item.add_marker("vm")
            if item.get_closest_marker("timeout") is None:
                # An emulated guest takes four times as long on a machine with much else to do.
                item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="session", autouse=True)
def vm_image() -> image.Image:
    """Ready to boot. Skips what cannot run here, which is a failure in CI (tests/conftest.py)."""
    if (reason := image.missing()) is not None:
        pytest.skip(reason)
    return image.prepare()


@pytest.fixture
def guest() -> Iterator[MakeGuest]:
    """Starts guests, as many as asked for; ends them with the test, which shows their reports."""
    with ExitStack() as guests:

        def make(
            program: str | Path = "", *, waiting_for: Guest | None = None, **kwargs: Any
        ) -> Guest:
            made = Guest(program, **kwargs) if waiting_for is None else waiting_for.twin(**kwargs)
            guests.enter_context(made)
            guests.callback(lambda: print(made.report()))
            return made

        yield make


@pytest.fixture(scope="package")
def pair(vm_image: image.Image) -> Iterator[residents.Pair]:
    """Two guests for all tests that ask for them. Their host is a client of its own each time."""
    with residents.pair() as pair:
        yield pair


@pytest.fixture(scope="package")
def manual(vm_image: image.Image) -> Iterator[residents.Manual]:
    """A guest with both devices, by the lines of QEMU's manual, for all tests that ask for it."""
    with residents.manual() as manual:
        yield manual


@pytest.fixture
def pair_host(pair: residents.Pair) -> Iterator[ivshmem.Client]:
    """A client of the server of `pair`."""
    with residents.fresh_client(pair.server.path) as client:
        yield client


@pytest.fixture
def manual_host(manual: residents.Manual) -> Iterator[ivshmem.Client]:
    """A client of the server of `manual`."""
    with residents.fresh_client(manual.path) as client:
        yield client


@pytest.fixture(scope="session")
def driver() -> Path:
    """The UIO driver, built."""
    return _built(kernels.missing_for_modules, kernels.uio_driver)


@pytest.fixture(scope="session")
def kernel() -> image.Image:
    """The kernel with vfio's no-IOMMU mode, built: that may take minutes."""
    return _built(kernels.missing_for_kernels, kernels.noiommu)


def _built(missing: Callable[[], str | None], build: Callable[[], _T]) -> _T:
    if (reason := missing()) is not None:
        if os.environ.get("CI"):
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    return build()


@pytest.fixture
def events() -> Events:
    return Events()


@pytest.fixture
def server(tmp_path: Path, events: Events) -> Iterator[ivshmem.Server]:
    """1 MiB and four vectors."""
    with ivshmem.Server(
        tmp_path / "socket",
        "1M",
        vectors=4,
        on_join=events.joined.append,
        on_leave=events.left.append,
    ).start() as server:
        yield server


@pytest.fixture
def host(server: ivshmem.Server) -> Iterator[ivshmem.Client]:
    """A client of that server."""
    with ivshmem.connect(server.path, timeout=TIMEOUT) as client:
        yield client
