"""Every interleaving of each kind of channel, in small cases, and with each point removed.

A case that has a fault fails with the shortest schedule that shows it. Each point of the protocol
(a fence, a check, a second look) is removed in turn, and the explorer must find the fault: a point
whose removal shows nothing is superfluous, or its case is missing.
"""

from __future__ import annotations

import ast
import inspect
from typing import Any

import pytest
from model import calls, creation, discard, messages_cases, places, queue, role, streams, value
from model.explorer import explore, holds
from model.role import named_points

KINDS: dict[str, Any] = {
    "places": places,
    "creation": creation,
    "messages": messages_cases,
    "discard": discard,
    "queue": queue,
    "value": value,
    "calls": calls,
    "streams": streams,
}
BY_DAY = [(kind, name) for kind, module in KINDS.items() for name in module.BY_DAY]
BY_NIGHT = [(kind, name) for kind, module in KINDS.items() for name in module.BY_NIGHT]
POINTS = [(kind, point) for kind, module in KINDS.items() for point in module.POINTS]
LONG = [
    (kind, point) for kind, point in POINTS if KINDS[kind].POINTS[point] in KINDS[kind].BY_NIGHT
]


@pytest.mark.sampled(16)
@pytest.mark.parametrize(("kind", "name"), BY_DAY)
def test_no_interleaving_has_a_fault(kind: str, name: str) -> None:
    assert holds(KINDS[kind].BY_DAY[name].case()).ends


@pytest.mark.nightly
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("kind", "name"), BY_NIGHT)
def test_no_interleaving_of_a_large_case_has_a_fault(kind: str, name: str) -> None:
    assert holds(KINDS[kind].BY_NIGHT[name].case()).ends


def fault_without(kind: str, point: str) -> str | None:
    module = KINDS[kind]
    setting = (module.BY_DAY | module.BY_NIGHT)[module.POINTS[point]]
    return explore(setting.case(without=[point])).fault


@pytest.mark.sampled(16)
@pytest.mark.parametrize(("kind", "point"), [each for each in POINTS if each not in LONG])
def test_each_point_is_needed(kind: str, point: str) -> None:
    assert fault_without(kind, point)


@pytest.mark.nightly
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("kind", "point"), LONG)
def test_each_point_is_needed_in_a_large_case(kind: str, point: str) -> None:
    assert fault_without(kind, point)


@pytest.mark.parametrize("kind", [*KINDS])
def test_every_point_of_the_model_is_named(kind: str) -> None:
    """A point is a string in the model's source; one that no test removes would go unnoticed."""
    module = KINDS[kind]
    assert named_points(*module.ROLES) == set(module.POINTS)


@pytest.mark.parametrize("kind", [*KINDS])
def test_nothing_is_half_computed_while_a_model_waits(kind: str) -> None:
    """What an expression has computed before a yield is in no variable, and so in no state."""
    for module in (*KINDS[kind].ROLES, KINDS[kind], role):
        parents = {
            child: parent
            for parent in ast.walk(ast.parse(inspect.getsource(module)))
            for child in ast.iter_child_nodes(parent)
        }
        for node, parent in parents.items():
            if isinstance(node, (ast.Yield, ast.YieldFrom)):
                first = isinstance(parent, ast.Compare) and parent.left is node
                alone = isinstance(
                    parent,
                    (ast.Assign, ast.BoolOp, ast.Expr, ast.If, ast.Return, ast.UnaryOp, ast.While),
                )
                assert first or alone, f"{module.__name__}:{node.lineno}"
