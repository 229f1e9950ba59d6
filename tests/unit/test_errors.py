"""Exceptions: each survives pickle, as concurrent.futures and multiprocessing use it."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable

import pytest

from ivshmem import errors

# How those are made that take more than a message.
OTHERS: dict[str, Callable[[], BaseException]] = {
    "AlreadyMigrated": lambda: errors.AlreadyMigrated("gone", wholly=False),
    "MessagesLost": lambda: errors.MessagesLost("3 were lost", 3),
    "ControlError": lambda: errors.ControlError("no", "no-such-peer"),
    "MigrationRefused": lambda: errors.MigrationRefused(["one", "two", "three"]),
    "MigrationUnfinished": lambda: errors.MigrationUnfinished("it", "migrate a", "a", "/f"),
    "QmpError": lambda: errors.QmpError("no", "GenericError"),
}
NAMES = [
    name
    for name, thing in vars(errors).items()
    if inspect.isclass(thing) and issubclass(thing, BaseException)
]


def made(name: str) -> list[BaseException]:
    if name in OTHERS:
        return [OTHERS[name]()]
    kind = getattr(errors, name)
    if issubclass(kind, OSError):
        return [kind("a reason"), kind(2, "a reason"), kind(2, "a reason", "/path")]
    return [kind("a reason")]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "copied",
    [lambda error: pickle.loads(pickle.dumps(error)), copy.copy],  # noqa: S301 - our own bytes
    ids=["pickle", "copy"],
)
def test_an_exception_survives(name: str, copied: Callable[[BaseException], BaseException]) -> None:
    for error in made(name):
        error.a_note = "of the program"  # type: ignore[attr-defined]
        other = copied(error)
        assert type(other) is type(error)
        assert str(other) == str(error)
        assert other.args == error.args
        assert vars(other) == vars(error)
        if isinstance(error, OSError):
            assert isinstance(other, OSError)
            assert (other.errno, other.filename) == (error.errno, error.filename)


def test_each_constructor_of_its_own_is_tried() -> None:
    own = {name for name in NAMES if "__init__" in vars(getattr(errors, name))}
    assert own - OTHERS.keys() <= {"MigrationError"}
