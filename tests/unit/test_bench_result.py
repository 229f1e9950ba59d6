"""What rounds add up to: which of them count, ratios, who is to blame."""

from __future__ import annotations

from array import array

import pytest

from ivshmem.bench.noise import Culprit, Noise
from ivshmem.bench.result import Result, ResultGroup, disturbers
from ivshmem.cli.bench import _lines

QUIET = Noise(0.0, ())
LOUD = Noise(0.5, (Culprit("make (pid 7)", 0.5, 1),))


def result(*rounds: tuple[list[int], Noise], size: int = 0) -> Result:
    made = Result("it", size)
    for durations, noise in rounds:
        made.add(array("q", durations), noise)
    return made


def test_disturbed_rounds_do_not_count() -> None:
    it = result(([1, 2, 3], QUIET), ([1000], LOUD), ([4, 5], QUIET))
    assert not it.spoilt
    assert it.sample().nanoseconds == [1, 2, 3, 4, 5]
    summary = it.summary(None)
    assert (summary["rounds"], summary["spoilt_rounds"], summary["count"]) == (3, 1, 5)


def test_if_all_are_disturbed_all_count() -> None:
    it = result(([1, 2], LOUD), ([3], LOUD))
    assert it.spoilt
    assert it.sample().nanoseconds == [1, 2, 3]


def test_ratios_are_of_the_same_round() -> None:
    """The machine became ten times slower in the last round, for both."""
    yardstick = result(([10], QUIET), ([10], QUIET), ([100], QUIET))
    it = result(([20], QUIET), ([30], QUIET), ([200], QUIET))
    assert it.ratio(yardstick) == 2


def test_a_round_is_compared_if_neither_was_disturbed() -> None:
    yardstick = result(([10], QUIET), ([10], LOUD), ([10], QUIET))
    it = result(([20], QUIET), ([90], QUIET), ([90], LOUD))
    assert it.ratio(yardstick) == 2


def test_a_yardstick_of_nothing() -> None:
    """What takes less than the clock can tell."""
    assert result(([5], QUIET)).ratio(result(([0], QUIET))) == 5


def test_bytes_a_second() -> None:
    summary = result(([1000] * 3, QUIET), size=4096).summary(None)
    assert summary["gigabytes_per_second"] == pytest.approx(4.096)


def test_a_table_fits() -> None:
    """Into 80 columns, with the widest of everything."""
    group = ResultGroup("peer 65535, vector 2047", note="no " * 60)
    yardstick = group.add("os.eventfd, two processes here", size=1 << 20)
    for result in yardstick, group.add('wait(2047, spin="auto")', yardstick, 1 << 20):
        result.add(array("q", [5 * 10**9] * 1000), LOUD)
    lines = list(_lines([group], 10.0))
    assert max(map(len, lines)) <= 80
    (row,) = (line for line in lines if "wait(2047" in line)
    assert row.split() == [
        *("*", "wait(2047,", 'spin="auto")'),
        *("5000000", "5000000", "5000000", "5000000", "1.00", "0.000"),
    ]
    assert "disturbed, by make (pid 7) (50% of a core)." in " ".join(lines)


def test_percentiles_that_nobody_knows() -> None:
    """Of fifty durations there is no 99.9th percentile."""
    group = ResultGroup("group")
    group.add("it").add(array("q", range(50)), QUIET)
    (row,) = (line for line in _lines([group], 1.0) if line.startswith("  it"))
    assert row.split() == ["it", "0.024", "-", "-", "0.049"]


def test_who_disturbed() -> None:
    group = ResultGroup("group")
    worse = Noise(0.9, (Culprit("make (pid 7)", 0.9, 0), Culprit("cc (pid 8)", 0.1, 0)))
    harmless = Noise(0.01, (Culprit("sshd (pid 9)", 0.01, 0),))
    for noise in (LOUD, worse, harmless):
        group.add("it").add(array("q", [1]), noise)
    assert disturbers([group]) == [("make (pid 7)", 0.9), ("cc (pid 8)", 0.1)]
