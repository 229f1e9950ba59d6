"""Which servers a plan has hold the news of a QEMU that is unplugged."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from ivshmem.migration import Options, Plan
from ivshmem.migration.servers import _linger
from ivshmem.server.limits import LINGER, LONGEST_LINGER

from .test_migration_plan import Case


def spoiled(options: Options | None = None) -> Case:
    """Its server is of a version that cannot hold news."""
    case = Case("doorbell", options=options)
    here = case.servers["source"]["/here"]
    case.servers["source"]["/here"] = replace(here, can_hold=False)
    return case


def test_a_step_knows_whose_news_are_held() -> None:
    case = Case("doorbell")
    here = case.servers["source"]["/here"]
    step = next(step for step in case.plan().steps if step.kind == "unplug")
    assert (step.control, step.region, step.pid) == (here.control, here.region, 11)


def test_a_plain_device_has_no_news() -> None:
    step = next(step for step in Case("plain").plan().steps if step.kind == "unplug")
    assert (step.control, step.pid) == ("", 0)


def test_a_server_that_cannot_hold_news() -> None:
    (reason,) = spoiled().reasons()
    assert "cannot hold back messages" in reason
    assert "`ivshmem serve --takeover`" in reason
    assert "--force" in reason


def test_the_risk_can_be_taken() -> None:
    plan = spoiled(Options(force=True)).plan()
    assert [step.control for step in plan.steps if step.kind == "unplug"] == [""]


def test_a_plan_that_an_older_version_wrote_down() -> None:
    """It says nothing of all that."""
    plan = Case("plain").plan()
    written = json.loads(json.dumps(plan._to_json()))
    for step in written["steps"]:
        del step["pid"]
    assert Plan._from_json(written) == plan


@pytest.mark.parametrize(
    ("unplug", "hold"),
    [(0.5, LINGER), (LINGER, LINGER), (300.0, 300.0), (float("inf"), LONGEST_LINGER)],
)
def test_a_hold_outlasts_the_unplug_that_it_protects(unplug: float, hold: float) -> None:
    assert _linger(unplug) == hold
