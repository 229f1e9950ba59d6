"""The dashboard and the alerts of examples/monitoring name figures that a server really gives."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from support.running import Running

from ivshmem.cli.main import SUBCOMMANDS
from ivshmem.service import metrics

MONITORING = Path(__file__).parents[2] / "examples" / "monitoring"
OF_PROMETHEUS = {"instance", "job"}  # labels that it adds to what it scrapes
WORDS = re.compile(r"\b(?:ivshmem|process)_\w+")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """The labels of each figure, as scraped from a server."""
    path = str(tmp_path_factory.mktemp("server") / "socket")
    with Running({"default": path}, 1) as running:
        served = running.add(metrics.Metrics("127.0.0.1:0", running.service))
        running.start()
        with urllib.request.urlopen(f"http://{served.address}/metrics", timeout=30) as answer:
            text = answer.read().decode()
    found: dict[str, set[str]] = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, labels = re.fullmatch(r"(\w+)(?:\{(.*)\})? \S+", line).groups()  # type: ignore[union-attr]
            found[name] = set(re.findall(r"(\w+)=", labels or ""))
    return found


def dashboard() -> Any:
    return json.loads((MONITORING / "grafana.json").read_text())


def alerts() -> list[Any]:
    (group,) = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]
    rules: list[Any] = group["rules"]
    return rules


def expressions() -> Iterator[tuple[str, str]]:
    """Each expression, and the text that is shown with it."""
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            yield target["expr"], target["legendFormat"]
    for variable in dashboard()["templating"]["list"]:
        yield variable.get("definition", ""), ""
    for rule in alerts():
        yield rule["expr"], json.dumps(rule["annotations"]).replace("$labels.", "")


@pytest.mark.parametrize(("expression", "shown"), list(expressions()))
def test_figures_and_labels_exist(
    exported: dict[str, set[str]], expression: str, shown: str
) -> None:
    names = set(WORDS.findall(expression))
    assert names <= exported.keys(), names - exported.keys()
    labels = set.union(OF_PROMETHEUS, *(exported[name] for name in names))
    used = {
        *re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", expression),
        *re.findall(r"\{\{\s*(\w+)\s*\}\}", shown),
    }
    assert used <= labels, used - labels


def test_all_figures_of_a_region_are_shown(exported: dict[str, set[str]]) -> None:
    shown = {name for expression, _ in expressions() for name in WORDS.findall(expression)}
    regions = {name for name, labels in exported.items() if "region" in labels}
    assert regions - shown == {"ivshmem_vectors"}


def test_panels_stand_side_by_side() -> None:
    """No two at one place, and each has a number of its own."""
    panels = dashboard()["panels"]
    places = [
        (x, y)
        for panel in panels
        for at in [panel["gridPos"]]
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(places) == len(set(places))
    assert all(x < 24 for x, _ in places)
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_commands_in_alerts_exist() -> None:
    """What an alert tells its reader to type."""
    text = (MONITORING / "alerts.yml").read_text()
    named = set(re.findall(r"`ivshmem (\w+)", text))
    assert named
    assert named <= SUBCOMMANDS.keys()


@pytest.mark.nightly
def test_promtool() -> None:
    """Prometheus' own opinion, and the alerts fire and do not fire as alerts_test.yml says."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool: apt-get install prometheus")
    for words in (["check", "config", "prometheus.yml"], ["test", "rules", "alerts_test.yml"]):
        subprocess.run([promtool, *words], cwd=MONITORING, check=True, timeout=60)
