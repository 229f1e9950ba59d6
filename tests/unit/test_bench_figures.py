"""The arithmetic of benchmarks: percentiles, who disturbed a measurement, which rounds count."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from array import array
from pathlib import Path

import pytest
from bench import picture, report
from hypothesis import given
from hypothesis import strategies as st

from ivshmem.bench import noise as bench_noise
from ivshmem.bench.noise import Account, Core, Noise, Process, Snapshot
from ivshmem.bench.percentiles import Sample
from ivshmem.bench.roundtrip import Measured

MS = 10**6
TICK = 10**9 // os.sysconf("SC_CLK_TCK")


# -- percentiles -----------------------------------------------------------------------------------


@given(
    st.lists(st.integers(0, 10**12), min_size=1, max_size=200),
    st.one_of(st.floats(0, 100), st.sampled_from([0.0, 50.0, 90.0, 99.0, 99.9, 99.99, 100.0])),
)
def test_a_percentile_is_the_least_that_so_many_do_not_exceed(
    durations: list[int], percent: float
) -> None:
    found = Sample(durations).percentile(percent)
    wanted = math.ceil(len(durations) * percent / 100)
    assert found in durations
    assert sum(each <= found for each in durations) >= wanted
    assert all(
        sum(each <= lower for each in durations) < wanted for lower in durations if lower < found
    )


# -- what /proc says -------------------------------------------------------------------------------


def test_cores() -> None:
    text = """\
cpu  1378273 7 373342 3171945 2890 0 1688 2761 0 0
cpu0 668639 3 174986 1619492 614 2 695 1387 0 0
cpu1 709634 4 198355 1552452 2275 0 992 1374 0 0
intr 44698345 0 0
ctxt 90
"""
    assert bench_noise.parse_cores(text) == {
        0: Core((668639 + 3 + 174986 + 2 + 695) * TICK, 1387 * TICK),
        1: Core((709634 + 4 + 198355 + 992) * TICK, 1374 * TICK),
    }


@pytest.mark.parametrize("name", ["cc1", "a (strange) name", "tmux: server", ") 1 2"])
def test_a_process(name: str) -> None:
    text = (
        f"123 ({name}) S 1 123 123 0 -1 4194560 3284 14060 0 2 31 12 40 13 20 0 1 0 2545 7655424 "
        "1024 18446744073709551615 94 94 140 0 0 0 65536 4 65538 1 0 0 17 1 0 0 0 0 0 94 94 94 140 "
        "140 140 140 0\n"
    )
    assert bench_noise.parse_process(text) == Process(name, 1, (31 + 12) * TICK)


def test_an_account() -> None:
    assert bench_noise.parse_account("33973559 12048204 115\n") == Account(33973559, 12048204)


def test_this_process_is_seen() -> None:
    found = bench_noise.snapshot([os.getpid()], [os.getppid()])
    assert os.getpid() in found.ends[0]  # its first thread
    assert found.ends[0][os.getpid()].ran > 0
    assert found.known > 0
    assert not {os.getpid(), os.getppid()} & found.others.keys()
    assert os.sched_getaffinity(0) <= found.cores.keys()


# -- who disturbed ---------------------------------------------------------------------------------

TWO = ({0}, {1})
SAME = ({1}, {1})


def looks(
    *,
    ping: tuple[int, int] = (40, 0),
    echo: tuple[int, int] = (40, 0),
    busy: tuple[int, int] = (40, 40),
    stolen: tuple[int, int] = (0, 0),
    known: int = 0,
    others: dict[int, tuple[str, int, int]] | None = None,
) -> tuple[Snapshot, Snapshot]:
    """Two looks, between which that happened, in milliseconds; the others: name, core, used."""
    others = others or {}
    before = Snapshot(
        {0: Core(7 * TICK, 0), 1: Core(9 * TICK, 0)},
        ({10: Account(5 * MS, MS)}, {20: Account(6 * MS, 0)}),
        1000 * MS,
        {pid: Process(name, core, 50 * TICK) for pid, (name, core, _) in others.items()},
        dict.fromkeys(others, 500 * MS),
    )
    after = Snapshot(
        {
            core: Core(before.cores[core].busy + busy[core] * MS, stolen[core] * MS)
            for core in (0, 1)
        },
        (
            {10: Account((5 + ping[0]) * MS, (1 + ping[1]) * MS)},
            {20: Account((6 + echo[0]) * MS, echo[1] * MS)},
        ),
        (1000 + known) * MS,
        {
            pid: Process(name, core, 50 * TICK + used * MS // TICK * TICK)
            for pid, (name, core, used) in others.items()
        },
        {pid: (500 + used) * MS for pid, (_, _, used) in others.items()},
    )
    return before, after


def noise(cores: tuple[set[int], set[int]], looked: tuple[Snapshot, Snapshot]) -> Noise:
    return bench_noise.noise_between(*looked, cores, 100 * MS)


def test_nobody() -> None:
    found = noise(TWO, looks())
    assert (found.share, found.spoilt, str(found)) == (0, False, "nobody")


def test_somebody_on_a_core_that_is_used() -> None:
    found = noise(TWO, looks(echo=(40, 20), busy=(40, 74), others={123: ("cc1", 1, 34)}))
    assert found.spoilt
    assert str(found) == "cc1 (pid 123) took 34% of core 1"


def test_somebody_elsewhere_is_nobody() -> None:
    assert str(noise(SAME, looks(others={123: ("cc1", 0, 90)}))) == "nobody"


def test_a_little_is_no_harm() -> None:
    found = noise(TWO, looks(others={123: ("top", 1, 3)}))
    assert not found.spoilt
    assert str(found) == "top (pid 123) took 3% of core 1"


def test_steal() -> None:
    found = noise(TWO, looks(stolen=(0, 20)))
    assert found.spoilt
    assert str(found) == "steal took 20% of core 1"


def test_nobody_who_can_be_seen() -> None:
    found = noise(TWO, looks(ping=(40, 30)))
    assert found.spoilt
    assert found.share == pytest.approx(0.3)
    assert str(found) == f"{bench_noise.UNKNOWN} took 30% of a core"


def test_a_core_that_is_busier_than_can_be_explained() -> None:
    assert noise(TWO, looks(busy=(40, 160))).spoilt


def test_ends_on_one_core_wait_for_one_another() -> None:
    looked = looks(ping=(50, 50), echo=(50, 50), busy=(0, 100))
    assert not noise(SAME, looked).spoilt
    assert noise(TWO, looked).spoilt


def test_a_load_that_is_measured_is_no_disturbance() -> None:
    looked = looks(echo=(40, 60), busy=(40, 100), known=60)
    assert not noise(TWO, looked).spoilt


def test_a_process_that_has_begun_since() -> None:
    before, after = looks(others={7: ("ld", 0, 40)})
    before.others.clear()
    before.main.clear()
    found = bench_noise.noise_between(before, after, TWO, 1000 * MS)
    assert found.spoilt
    assert str(found).startswith("ld (pid 7) took ")


# -- which rounds count ----------------------------------------------------------------------------

CLEAN = Noise(0.0, ())
SPOILT = Noise(0.5, (bench_noise.Culprit("cc1 (pid 9)", 0.5, 1),))


def rounds(*medians: int, spoilt: tuple[int, ...] = ()) -> list[Measured]:
    return [
        Measured(array("q", [median - 1, median, median + 1]), SPOILT if i in spoilt else CLEAN)
        for i, median in enumerate(medians)
    ]


def test_a_ratio_is_the_median_of_the_ratios_of_the_rounds() -> None:
    found = report.figures(rounds(2000, 9000, 3000), rounds(1000, 3000, 3000))
    assert found["p50_to_c"] == 2.0


def test_spoilt_rounds_are_left_out_while_enough_are_clean() -> None:
    floor = rounds(1000, 1000, 1000, 1000, 1000, spoilt=(1,))
    found = report.figures(rounds(2000, 9000, 2000, 9000, 2000, spoilt=(3,)), floor)
    assert (found["p50_to_c"], found["rounds"], found["counted"]) == (2.0, 5, 3)
    assert found["max_us"] == 2.001
    assert found["spoilt"] == {4: ["cc1 (pid 9) took 50% of core 1"]}


def test_all_count_when_too_few_are_clean() -> None:
    found = report.figures(rounds(2000, 3000, 4000, spoilt=(0,)), rounds(1000, 1000, 1000))
    assert (found["p50_to_c"], found["counted"]) == (3.0, 3)


def results(*ways: str) -> report.Results:
    made = report.empty()
    measured = {way: rounds(*range(2000, 2005)) for way in ways}
    report.add(made, "two", measured, ways[0], {ways[-1]: ways[0]})
    return made


def test_the_floor_is_needed() -> None:
    with pytest.raises(ValueError, match="C could not be measured"):
        report.add(report.empty(), "two", {"ours": rounds(1)}, "C", {})


def test_pytest_benchmark_compares_our_json(tmp_path: Path) -> None:
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file in files:
        file.write_text(json.dumps(results("C", "ours")))
    command = [sys.executable, "-m", "pytest_benchmark", "compare", *map(str, files)]
    command += ["--columns=min,max,mean,stddev,median,iqr,outliers,ops,rounds,iterations"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ours [two]") == done.stdout.count("C [two]") == 2


def test_markdown() -> None:
    lines = report.markdown(json.loads(json.dumps(results("C", "ours")))).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert rows[0].count("|") == rows[1].count("|") == rows[2].count("|")
    assert rows[3].startswith("| ours | 2.00 | 2.00 |")
    assert "p50 to what does the same in C: ours 1.00 (C)." in lines
    assert any("nobody else took more than 5% of a core" in line for line in lines)


def test_markdown_names_who_disturbed() -> None:
    made = report.empty()
    measured = {"C": rounds(1000, 1000, 1000, 1000, spoilt=(2,))}
    report.add(made, "busy", measured, "C", {})
    (line,) = [line for line in report.markdown(made).splitlines() if "spoilt" in line]
    assert line.startswith("1 of 4 measurements were spoilt")
    assert "cc1 (pid 9) 1 times. 1 were left out" in line


# -- the picture -----------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1), max_size=20).map(sorted))
def test_labels_are_apart_in_order_and_inside(wanted: list[float]) -> None:
    places = picture._spread(wanted, 0.05, 0.0, 1.0)
    assert len(places) == len(wanted)
    for lower, upper in itertools.pairwise(places):
        assert upper - lower >= 0.05 - 1e-9
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in places)


def test_a_label_that_has_room_stays_where_it_is() -> None:
    assert picture._spread([0.2, 0.5], 0.05, 0, 1) == [0.2, 0.5]


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    code = "import json, sys; from pathlib import Path; from bench import picture; "
    code += "picture.draw(json.load(sys.stdin), Path(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.svg")],
        input=json.dumps(results("C: eventfd, blocking read", "ivshmem: wait(0)")),
        text=True,
        capture_output=True,
        cwd=Path(report.__file__).parent.parent,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "ivshmem wait(0)" in (tmp_path / "a.svg").read_text()
