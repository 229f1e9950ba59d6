"""The distributions of latency as a picture.

Knows: matplotlib, and what has to be seen at a glance. Does not know: how anything was measured.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .report import Results

# From above; a set-up that is not in the results is left out.
PANELS = {
    "two": "two cores, one end on each",
    "same": "one core for both ends",
    "busy": "two cores, and a third process keeps one of them busy",
}

# Ways whose curve lies on another's, or says what another says.
_LEFT_OUT = {
    "C: eventfd, poll then read",
    "ivshmem: wait(0), echo in C",
    "ivshmem: wait(0, spin=5e-05)",
    'ivshmem: wait(0, spin="auto"), echo in C',
    "os.pipe",
    "socketpair",
    "multiprocessing.SimpleQueue",
}

_INK, _GRID = "#24292f", "#e4e7eb"
_OURS = ["#0a58ca", "#0098d1", "#5b3fd6"]
# The first that a name starts with: other libraries, and what comes with Python.
_OTHERS = {"iceoryx2": "#5f8a2c", "py": "#b0456f", "": "#b9772f"}
_TICKS = [0.0, 50.0, 90.0, 99.0, 99.9, 99.99]
_GAP = 0.046  # of a panel's height, between two labels

# In inches: the width, the height of a panel and of what is above and below it.
_WIDTH, _HEIGHT, _ABOVE, _BELOW = 9.0, 3.6, 0.55, 0.35
_TOP, _BOTTOM = 0.35, 0.2  # of the whole picture
_LEFT, _RIGHT = 0.285, 0.935  # of the width, where panels begin and end

_STYLE = {
    "svg.fonttype": "none",  # text stays text: small, and can be searched
    "svg.hashsalt": "ivshmem",  # the same picture from the same figures
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


def _place(percent: float) -> float:
    """Where a percentile stands: each nine takes the same room."""
    return -math.log10(1 - percent / 100)


def _spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places as near as can be to those wanted (ascending), no two of them nearer than `gap`."""
    groups: list[list[float]] = []  # of labels that touch: [sum of wishes, number]
    for wish in wanted:
        groups.append([wish, 1])
        while len(groups) > 1 and _top(groups[-2], gap) + gap > _bottom(groups[-1], gap):
            total, number = groups.pop()
            groups[-1][0] += total
            groups[-1][1] += number
    places = []
    for group in groups:
        places += [_bottom(group, gap) + gap * i for i in range(int(group[1]))]
    if places and places[0] < low:
        for i in range(len(places)):
            places[i] = max(places[i], low + gap * i)
    if places and places[-1] > high:
        for i in range(len(places)):
            places[-1 - i] = min(places[-1 - i], high - gap * i)
    return places


def _time(microseconds: float) -> str:
    """A power of ten with its unit."""
    if microseconds >= 1e6:
        return f"{microseconds / 1e6:g} s"
    if microseconds >= 1e3:
        return f"{microseconds / 1e3:g} ms"
    return f"{microseconds:g} µs" if microseconds >= 1 else f"{microseconds * 1e3:g} ns"


def _bottom(group: Sequence[float], gap: float) -> float:
    total, number = group
    return total / number - gap * (number - 1) / 2


def _top(group: Sequence[float], gap: float) -> float:
    return _bottom(group, gap) + gap * (group[1] - 1)


def _look(way: str, ours: int) -> dict[str, Any]:
    """How a curve is drawn."""
    if way.startswith("C:"):
        return {"color": _INK, "lw": 1.8, "ls": "-" if "blocking" in way else (0, (4, 1.5))}
    if way.startswith("ivshmem"):
        return {"color": _OURS[ours % len(_OURS)], "lw": 2.2}
    color = next(color for start, color in _OTHERS.items() if way.startswith(start))
    return {"color": color, "lw": 1.2}


def draw(results: Results, path: Path) -> None:
    """Draw what was measured.

    Raises:
        ValueError: nothing in the results is to be drawn.
        ImportError: matplotlib is missing.
    """
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    there = {each["group"] for each in results["benchmarks"]}
    setups = [setup for setup in PANELS if setup in there] or sorted(there)
    if not setups:
        raise ValueError("nothing was measured that could be drawn")
    with matplotlib.rc_context(_STYLE):
        each = _HEIGHT + _ABOVE + _BELOW
        height = _TOP + each * len(setups) + _BOTTOM
        figure = pyplot.figure(figsize=(_WIDTH, height))
        for index, setup in enumerate(setups):
            bottom = height - _TOP - each * (index + 1) + _BELOW
            place = (_LEFT, bottom / height, _RIGHT - _LEFT, _HEIGHT / height)
            axes = figure.add_axes(place)
            _panel(axes, [each for each in results["benchmarks"] if each["group"] == setup])
            figure.text(
                0.015, (bottom + _HEIGHT + 0.2) / height, PANELS.get(setup, setup), fontsize=10.5
            )
        axes.set_xlabel("so many per cent of the round trips took no longer", labelpad=6)
        figure.text(
            0.015,
            1 - 0.36 / height,
            "Round trips between two processes",
            fontsize=13,
            weight="bold",
        )
        figure.savefig(path, facecolor="white", dpi=110, metadata=_metadata(path))
        pyplot.close(figure)


def _metadata(path: Path) -> dict[str, Any] | None:
    return {"Date": None} if path.suffix == ".svg" else None


def _panel(axes: Any, benchmarks: Sequence[dict[str, Any]]) -> None:
    """Curves, and their names on the left, where they are furthest apart."""
    curves = {
        each["params"]["way"]: each["extra_info"]["curve"]
        for each in benchmarks
        if each["params"]["way"] not in _LEFT_OUT
    }
    ours = [way for way in curves if way.startswith("ivshmem")]
    values = [value for curve in curves.values() for _, value in curve]
    low, high = min(values) / 1.6, max(values) * 1.6
    axes.set_yscale("log")
    axes.set_xlim(0, _place(_TICKS[-1]))
    axes.set_ylim(low, high)

    def height(value: float) -> float:
        return math.log(value / low) / math.log(high / low)

    starts = {way: curve[0][1] for way, curve in curves.items()}
    order = sorted(curves, key=starts.__getitem__)
    places = _spread([height(starts[way]) for way in order], _GAP, 0.0, 1.0)
    for way, place in zip(order, places, strict=True):
        look = _look(way, ours.index(way) if way in ours else 0)
        curve = curves[way]
        axes.plot(
            [_place(percent) for percent, _ in curve],
            [value for _, value in curve],
            zorder=3 if way in ours else 2,
            solid_joinstyle="round",
            **look,
        )
        axes.plot(
            [-0.035, -0.028, _place(curve[0][0]) / _place(_TICKS[-1])],
            [place, place, height(curve[0][1])],
            transform=axes.transAxes,
            clip_on=False,
            color=look["color"],
            lw=0.7,
        )
        axes.text(
            -0.04,
            place,
            way.replace("ivshmem: ", "ivshmem "),
            transform=axes.transAxes,
            ha="right",
            va="center",
            color=look["color"],
            fontsize=8.5,
            weight="bold" if way in ours else "normal",
        )
    axes.set_xticks([_place(tick) for tick in _TICKS], [f"{tick:g}" for tick in _TICKS])
    axes.yaxis.tick_right()
    axes.yaxis.set_major_formatter(lambda value, _: _time(value))
    axes.minorticks_off()
    axes.tick_params(length=0)
    axes.grid(color=_GRID, lw=0.8)
    for side in axes.spines.values():
        side.set_visible(False)
