"""What is made of measured durations: figures, JSON, Markdown.

Knows: percentiles, ratios, which rounds count, pytest-benchmark's schema. Does not know: what was
measured, or how.
"""

from __future__ import annotations

import collections
import datetime
import os
import platform
import statistics
from array import array
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeAlias

from ivshmem.bench.noise import LIMIT
from ivshmem.bench.percentiles import Sample
from ivshmem.bench.roundtrip import Measured

Results: TypeAlias = dict[str, Any]  # as pytest-benchmark writes it

ENOUGH = 3  # clean rounds, below which the spoilt ones count as well

# Points of a distribution curve: evenly spread in nines, and those that have a name.
_CURVE = sorted(
    {10.0, 50.0, 90.0, 99.0, 99.9, 99.99}
    | {round(100 - 100 / 10 ** (step / 10), 4) for step in range(2, 41)}
)

_PACKAGES = ("ivshmem", "pyzmq", "pynng", "posix_ipc", "iceoryx2", "eclipse-zenoh", "tachyon-ipc")


# -- figures ---------------------------------------------------------------------------------------


def counted(rounds: Sequence[Measured], floor: Sequence[Measured]) -> list[int]:
    """The numbers of the rounds that count: the clean ones, or all if those are not enough."""
    everything = range(min(len(rounds), len(floor)))
    clean = [i for i in everything if not (rounds[i].noise.spoilt or floor[i].noise.spoilt)]
    return clean if len(clean) >= min(ENOUGH, len(everything)) else list(everything)


def figures(rounds: Sequence[Measured], floor: Sequence[Measured]) -> dict[str, Any]:
    """Percentiles in microseconds of the rounds that count, together, and ratios to the floor.

    A ratio is the median of the rounds' own ratios.
    """
    numbers = counted(rounds, floor)
    pairs = [(Sample(rounds[i].durations), Sample(floor[i].durations)) for i in numbers]
    sample = Sample(d for i in numbers for d in rounds[i].durations)
    return {
        **{f"{name}_us": round(value / 1000, 3) for name, value in sample.summary().items()},
        "mean_us": round(statistics.fmean(sample.nanoseconds) / 1000, 3),
        "p50_to_c": _ratio(pairs, 50),
        "p99.9_to_c": _ratio(pairs, 99.9),
        "rounds": len(rounds),
        "counted": len(numbers),
        "spoilt": {
            i + 1: list(map(str, each.noise.culprits))
            for i, each in enumerate(rounds)
            if each.noise.spoilt
        },
        "curve": [
            [at, round(sample.percentile(at) / 1000, 3)] for at in _CURVE if _known(at, sample)
        ],
    }


def _ratio(pairs: Sequence[tuple[Sample, Sample]], percent: float) -> float:
    each = [ours.percentile(percent) / floor.percentile(percent) for ours, floor in pairs]
    return round(statistics.median(each), 3)


def _known(percent: float, sample: Sample) -> bool:
    """Whether so many durations say anything of this percentile."""
    return (100 - percent) / 100 * len(sample) >= 1


# -- JSON ------------------------------------------------------------------------------------------


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _cpu() -> str:
    lines = (_read("/proc/cpuinfo") or "").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "node": "",
        "machine": platform.machine(),
        "system": platform.system(),
        "release": platform.release(),
        "python_implementation": platform.python_implementation(),
        "python_version": platform.python_version(),
        "cpu": {"brand_raw": _cpu(), "count": len(os.sched_getaffinity(0))},
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
    }


def empty() -> Results:
    """Results without a measurement yet."""
    return {
        "machine_info": machine(),
        "commit_info": {},
        "benchmarks": [],
        "datetime": datetime.datetime.now(datetime.timezone.utc).isoformat(),
        "version": _version("pytest-benchmark") or "5.0.0",
    }


def add(
    results: Results,
    setup: str,
    measured: Mapping[str, list[Measured]],
    floor: str,
    like: Mapping[str, str],
) -> None:
    """Add what was measured of each way.

    Args:
        floor: the way that all others are compared with.
        like: for some ways another that does the same in C, to be compared with as well.

    Raises:
        ValueError: the floor is not among them, so there is nothing to compare with.
    """
    if floor not in measured:
        raise ValueError(f"{floor} could not be measured, and all ratios are to it")
    for way, rounds in measured.items():
        numbers = counted(rounds, measured[floor])
        info = figures(rounds, measured[floor])
        if (other := like.get(way, "")) in measured:
            info["like"] = other
            info["p50_to_like"] = figures(rounds, measured[other])["p50_to_c"]
        results["benchmarks"].append(
            {
                "group": setup,
                "name": f"{way} [{setup}]",
                "fullname": f"bench.roundtrips::{way} [{setup}]",
                "params": {"way": way, "setup": setup},
                "param": f"{way}-{setup}",
                "extra_info": info,
                "options": {},
                "stats": _stats([rounds[i].durations for i in numbers]),
            }
        )


def _stats(durations: Sequence[array[int]]) -> dict[str, Any]:
    """The figures that pytest-benchmark has for each benchmark, in seconds."""
    sample = [
        nanoseconds / 1e9
        for nanoseconds in Sample(d for each in durations for d in each).nanoseconds
    ]
    count, total = len(sample), sum(sample)
    mean = total / count
    stddev = (sum((each - mean) ** 2 for each in sample) / max(count - 1, 1)) ** 0.5
    q1, median, q3 = (sample[count * quarter // 4] for quarter in (1, 2, 3))
    low, high = q1 - 1.5 * (q3 - q1), q3 + 1.5 * (q3 - q1)
    inside = [each for each in sample if low <= each <= high]
    beyond_iqr = count - len(inside)
    beyond_stddev = sum(abs(each - mean) > stddev for each in sample)
    return {
        "min": sample[0],
        "max": sample[-1],
        "mean": mean,
        "stddev": stddev,
        "rounds": count,
        "median": median,
        "iqr": q3 - q1,
        "q1": q1,
        "q3": q3,
        "iqr_outliers": beyond_iqr,
        "stddev_outliers": beyond_stddev,
        "outliers": f"{beyond_stddev};{beyond_iqr}",
        "ld15iqr": inside[0],
        "hd15iqr": inside[-1],
        "ops": 1 / mean,
        "total": total,
        "iterations": 1,
    }


# -- Markdown --------------------------------------------------------------------------------------

_COLUMNS = ("p50", "p90", "p99", "p99.9", "max", "mean")

_NAMED = 6  # disturbers that are named below a table

_SAID = {
    "same": "both ends on one core",
    "two": "each end on a core of its own",
    "free": "wherever the kernel puts them",
    "busy": "each end on a core of its own, and a third process keeps the echo end's busy",
}


def markdown(results: Results) -> str:
    """Tables of all that was measured, one for each set-up, and what is to be said of them."""
    benchmarks = results["benchmarks"]
    lines = [machine_line(results["machine_info"]), ""]
    for setup in dict.fromkeys(each["group"] for each in benchmarks):
        here = [each for each in benchmarks if each["group"] == setup]
        lines += [f"**{setup}**: {_SAID.get(setup, setup)}. Round trips in microseconds.", ""]
        lines += [f"| way | {' | '.join(_COLUMNS)} | p50 to C | p99.9 to C | rounds |"]
        lines += ["|---" * (len(_COLUMNS) + 4) + "|"]
        for each in here:
            info = each["extra_info"]
            values = [_short(info[f"{name}_us"]) for name in _COLUMNS]
            values += [_ratio_text(info["p50_to_c"]), _ratio_text(info["p99.9_to_c"])]
            values += [f"{info['counted']} of {info['rounds']}"]
            lines.append(f"| {' | '.join([each['params']['way'], *values])} |")
        # On one core a spin waits for its time slice to end: nothing to compare with.
        like = _like_lines(here) if setup in ("two", "busy") else []
        lines += ["", *like, *_noise_lines(here), ""]
    return "\n".join(lines).rstrip()


def machine_line(info: Mapping[str, Any]) -> str:
    """What `machine` found, in one line."""
    said = [
        f"{info['system']} {info['release']}",
        f"{info['cpu']['count']} cores of {info['cpu']['brand_raw']}",
        f"{info['python_implementation']} {info['python_version']}",
        f"governor {info.get('governor') or 'unknown'}",
        *(f"{name} {version}" for name, version in info.get("packages", {}).items()),
    ]
    return ", ".join(said) + "."


def _short(microseconds: float) -> str:
    return f"{microseconds:.2f}" if microseconds < 10 else f"{microseconds:.0f}"


def _like_lines(benchmarks: Sequence[Mapping[str, Any]]) -> list[str]:
    """What does the same in C, and the ratio to it."""
    said = [
        f"{each['params']['way']} {_ratio_text(each['extra_info']['p50_to_like'])}"
        f" ({each['extra_info']['like']})"
        for each in benchmarks
        if "like" in each["extra_info"]
    ]
    return [f"p50 to what does the same in C: {'; '.join(said)}.", ""] if said else []


def _ratio_text(ratio: float) -> str:
    return (
        f"{ratio:.2f}" if 0.1 <= ratio < 100 else f"{ratio:.0f}" if ratio >= 100 else f"{ratio:.3f}"
    )


def _noise_lines(benchmarks: Sequence[Mapping[str, Any]]) -> list[str]:
    """How many measurements others spoilt, who, and what became of them."""
    every = [each["extra_info"] for each in benchmarks]
    taken = sum(info["rounds"] for info in every)
    spoilt = [culprits for info in every for culprits in info["spoilt"].values()]
    if not spoilt:
        return [f"No measurement was spoilt: nobody else took more than {LIMIT:.0%} of a core."]
    left_out = sum(info["rounds"] - info["counted"] for info in every)
    names = collections.Counter(
        each.partition(" took ")[0] for culprits in spoilt for each in culprits
    )
    who = ", ".join(f"{name} {times} times" for name, times in names.most_common(_NAMED))
    return [
        f"{len(spoilt)} of {taken} measurements were spoilt, as others took more than {LIMIT:.0%}"
        f" of a core: {who}. {left_out} were left out for that, or because C's of the same round"
        f" was spoilt; where fewer than {ENOUGH} clean rounds remained, all were counted."
    ]
