"""Tuples with named fields: as those of typing.NamedTuple."""

from __future__ import annotations

import pickle

import pytest

from ivshmem.system.named_tuple import NamedTuple


class Point(NamedTuple):
    """A place."""

    x: int
    y: int = 2

    @property
    def sum(self) -> int:
        return self.x + self.y


def test_fields_defaults_and_methods() -> None:
    point = Point(1)
    assert point == (1, 2) == Point(x=1, y=2)
    assert (point.x, point.y, point.sum) == (1, 2, 3)
    assert repr(point) == "Point(x=1, y=2)"
    assert point._replace(y=5) == (1, 5)
    assert isinstance(point, tuple)
    assert Point.__doc__ == "A place."
    assert Point.__module__ == __name__


def test_nothing_can_be_added_or_changed() -> None:
    point = Point(1)
    for name in ("x", "z"):
        with pytest.raises(AttributeError):
            setattr(point, name, 3)
    with pytest.raises(TypeError):
        Point()  # type: ignore[call-arg]


def test_a_copy_by_pickle_is_of_the_same_class() -> None:
    copy = pickle.loads(pickle.dumps(Point(3, 4)))  # noqa: S301
    assert type(copy) is Point
    assert copy == (3, 4)
