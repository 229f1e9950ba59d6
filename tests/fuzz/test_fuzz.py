"""Some inputs for each target, always the same; and that findings are found.

`make fuzz`, and so `make nightly`, runs a million.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest

from fuzz import campaign
from fuzz.campaign import Campaign, Found
from fuzz.target import Finding, Target
from fuzz.targets import TARGETS

COUNTS = {
    "client": 100,
    "server": 60,
    "directory": 100,
    "control": 35,
    "config": 150,
    "channel": 20,
    "header": 1,
}

# A campaign has an alarm of its own.
pytestmark = pytest.mark.timeout(method="thread")


class Strange(Target):
    """A target that does something strange once the input is two bytes long."""

    name = "strange"
    modules = ()
    share = 1

    def __init__(self, act: Callable[[], object] = int) -> None:
        self._act = act
        self.seen = hashlib.sha256()

    def seeds(self) -> Sequence[bytes]:
        return [b"", b"a"]

    def run(self, data: bytes) -> None:
        self.seen.update(data + b"\n")
        if len(data) == 2:
            self._act()

    def mutate(self, data: bytes, numbers: Random, other: bytes) -> bytes:
        return numbers.randbytes(numbers.randrange(3))


@contextmanager
def begun(target: Target, directory: Path, seed: int = 1) -> Iterator[Campaign]:
    with target, (directory / "current").open("wb", buffering=0) as current:
        yield Campaign(target, seed, current)


# By day test_channel_header.py runs the program of "header".
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.nightly] if name == "header" else [])
        for name in TARGETS
    ],
)
def test_some_hundred_inputs(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]()
    with begun(target, tmp_path) as made:
        try:
            made.run(COUNTS[name])
        except Found as found:
            pytest.fail(f"{found.__cause__!r}, of:\n{target.show(found.data)}\n{found.data!r}")
        if not target.modules:  # it is a program in C that reads
            return
        assert len(made.kept) > 1
        assert {Path(code.co_filename).stem for code, _, _ in made.reached} == {
            Path(name).stem for name in target.modules
        }


def test_a_seed_gives_the_same_inputs(tmp_path: Path) -> None:
    def digest(seed: int) -> str:
        target = Strange()
        with begun(target, tmp_path, seed) as made:
            made.run(600)
        return target.seen.hexdigest()

    assert digest(5) == digest(5) != digest(6)


class TestFindings:
    @pytest.fixture
    def left(self) -> Iterator[list[int | mmap.mmap]]:
        left: list[int | mmap.mmap] = []
        yield left
        for each in left:
            if isinstance(each, int):
                os.close(each)
            else:
                each.close()

    def found(self, act: Callable[[], object], directory: Path) -> Found:
        with begun(Strange(act), directory) as made, pytest.raises(Found) as found:
            made.run(600)
        return found.value

    def test_an_error(self, tmp_path: Path) -> None:
        def fail() -> None:
            raise ZeroDivisionError

        found = self.found(fail, tmp_path)
        assert isinstance(found.__cause__, ZeroDivisionError)
        assert len(found.data) == 2
        assert (tmp_path / "current").read_bytes() == found.data

    def test_a_descriptor(self, tmp_path: Path, left: list[int | mmap.mmap]) -> None:
        found = self.found(lambda: left.append(os.eventfd(0)), tmp_path)
        assert "eventfd" in str(found.__cause__)

    def test_a_mapping(self, tmp_path: Path, left: list[int | mmap.mmap]) -> None:
        found = self.found(lambda: left.append(mmap.mmap(-1, 4096)), tmp_path)
        assert isinstance(found.__cause__, Finding)
        assert len(found.data) == 2

    def test_an_error_that_nobody_sees(self, tmp_path: Path) -> None:
        class Fails:
            def __del__(self) -> None:
                raise ZeroDivisionError("unseen")

        assert "unseen" in str(self.found(Fails, tmp_path).__cause__)

    def test_a_hang(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(campaign, "LIMIT", 0.05)
        found = self.found(lambda: time.sleep(30), tmp_path)
        assert "0.05 seconds" in str(found.__cause__)
